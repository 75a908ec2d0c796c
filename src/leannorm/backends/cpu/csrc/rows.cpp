// Channels-last memory: rows of all channels, cut into stretches of memory.
#include <numeric>
#include <vector>

#include "layout.hpp"
#include "orders.hpp"

namespace leannorm {
namespace {

constexpr int64_t kWidth = 256;           // lanes that a row should have at least
constexpr int64_t kChunk = 1 << 15;       // elements that are one step of a thread

struct Rows : Layout {
  explicit Rows(const Plan& plan) : Layout(plan) {
    const int64_t whole = 32 / std::gcd(channels, int64_t{32});  // makes wide rows whole vectors and cache lines
    fold = whole * std::max<int64_t>(1, kWidth / (channels * whole));
    if (width() > 16 * kWidth) fold = 1;
  }

  int64_t units() const { return count() / fold; }
  int64_t rest() const { return count() % fold; }  // rows that fill no wide row
  int64_t rest_offset() const { return units() * width(); }

  // Partial statistics: for each thread its wide rows, and the rest.
  int64_t parts() const { return threads * fold + 1; }

  // Calls body(begin, end, thread) for chunks of units, in memory's order or against it.
  template <class Body>
  void each_chunk(bool reverse, Body body) const {
    const int64_t chunk = std::max<int64_t>(1, kChunk * units() / elements());
    parallel(threads, [&](int thread) {
      const auto [begin, end] = share_of(units(), thread, threads);
      const int64_t chunks = divide_up(end - begin, chunk);
      for (int64_t k = 0; k < chunks; ++k) {
        const int64_t first = begin + (reverse ? chunks - 1 - k : k) * chunk;
        body(first, std::min(first + chunk, end), thread);
      }
    });
  }

  int threads_to_finish(const Partials& parts) const {
    return parts.parts * parts.channels < kSerial ? 1 : threads;
  }
};

Partials moments_of_all(const Kernels& kernels, const Tensors& t, const Rows& layout) {
  Partials parts(layout.parts(), layout.channels);
  const int64_t width = layout.width(), last = parts.parts - 1;
  parallel(layout.threads, [&](int thread) {
    std::vector<float> scratch(scratch_size(width));
    const auto [begin, end] = share_of(layout.units(), thread, layout.threads);
    const int64_t part = thread * layout.fold;
    kernels.moments_rows(t, begin * width, end - begin, width, parts.at(part), scratch.data());
    std::fill_n(&parts.counts[part], layout.fold, static_cast<double>(end - begin));
    if (thread == 0)
      kernels.moments_rows(t, layout.rest_offset(), layout.rest(), layout.channels, parts.at(last), scratch.data());
  });
  parts.counts[last] = static_cast<double>(layout.rest());
  return parts;
}

Partials moments_of_places(const Kernels& kernels, const Tensors& t, const Rows& layout, const Places& places) {
  const int threads = threads_for(layout, places);
  Partials parts(threads, layout.channels);
  parallel(threads, [&](int thread) {
    std::vector<float> scratch(scratch_size(layout.channels));
    const auto [begin, end] = share_of(places.size(), thread, threads);
    kernels.moments_sampled_rows(t, layout.channels, places.of_range(begin, end), parts.at(thread), scratch.data());
    parts.counts[thread] = std::accumulate(places.weights.data() + begin, places.weights.data() + end, 0.0);
  });
  return parts;
}

void forward_pass(const Kernels& kernels, const Tensors& t, const Rows& layout, const Channels& channels,
                  bool reverse) {
  layout.each_chunk(reverse, [&](int64_t begin, int64_t end, int) {
    kernels.forward_rows(t, channels, begin * layout.width(), end - begin, layout.width());
  });
  kernels.forward_rows(without_streaming(t), channels, layout.rest_offset(), layout.rest(), layout.channels);
}

// One pass that reads x and dy; exact ones begin with what the pass before has left in the cache.
void backward_pass(const Kernels& kernels, const Tensors& t, const Rows& layout, const Channels& channels,
                   Backward mode, Partials& parts) {
  const int64_t width = layout.width(), size = scratch_size(width);
  std::vector<float> scratch(size * layout.threads);
  layout.each_chunk(mode == Backward::exact, [&](int64_t begin, int64_t end, int thread) {
    kernels.backward_rows(t, channels, mode, begin * width, end - begin, width, parts.at(thread * layout.fold),
                          &scratch[thread * size]);
  });
  kernels.backward_rows(without_streaming(t), channels, mode, layout.rest_offset(), layout.rest(), layout.channels,
                        parts.at(parts.parts - 1), scratch.data());
}

}  // namespace

bool rows::begin_at_whole_bytes(const Plan& plan) { return plan.channels % 8 == 0; }

void rows::batch_norm(const Kernels& kernels, const Plan& plan, const Call& call, float* mean, float* var) {
  const Rows layout(plan);
  const Sample places(plan, call.draw);
  const Tensors t = with_streaming(call.tensors, layout, kRowsCacheBytes, layout.width());
  const Partials parts = places ? moments_of_places(kernels, t, layout, *places) : moments_of_all(kernels, t, layout);
  ChannelBuffers buffers(layout);
  over_shares(layout.channels, layout.threads_to_finish(parts),
              [&](Range range) { finish_moments(call, parts, range, mean, var, buffers); });
  forward_pass(kernels, t, layout, buffers.repeated(), !places);
}

void rows::batch_norm_backward(const Kernels& kernels, const Plan& plan, const Call& call, const float* mean,
                               const float* var, float* sum_g_xhat, float* sum_g) {
  const Rows layout(plan);
  const Sample places(plan, call.draw);
  const Tensors t = with_streaming(call.tensors, layout, kRowsCacheBytes, layout.width());
  ChannelBuffers buffers(layout);
  set_point(call, {0, layout.channels}, mean, var, buffers);
  Partials parts(layout.parts(), layout.channels);
  backward_pass(kernels, t, layout, buffers.repeated(), places ? Backward::fused : Backward::reduce, parts);
  const double count = places ? places->count : static_cast<double>(layout.count());
  over_shares(layout.channels, layout.threads_to_finish(parts),
              [&](Range range) { finish_sums(call, parts, range, count, var, sum_g_xhat, sum_g, buffers); });
  const Channels channels = buffers.repeated();
  if (!places) return backward_pass(kernels, t, layout, channels, Backward::exact, parts);
  const Correction correction(with_streaming(call.tensors, layout, kRowsCacheBytes, layout.channels), buffers);
  over_shares(places->size(), threads_for(layout, *places), [&](Range range) {
    kernels.correct_rows(correction.tensors, correction.channels, layout.channels,
                         places->of_range(range.begin, range.end));
  });
}

void rows::normalize(const Kernels& kernels, const Plan& plan, const Call& call, const float* mean, const float* var) {
  const Rows layout(plan);
  ChannelBuffers buffers(layout);
  set_point(call, {0, layout.channels}, mean, var, buffers);
  const Tensors t = with_streaming(call.tensors, layout, kRowsCacheBytes, layout.width());
  forward_pass(kernels, t, layout, buffers.repeated(), false);
}

void rows::backward_fused(const Kernels& kernels, const Plan& plan, const Call& call, const float* mean,
                          const float* var, float* sum_g_xhat, float* sum_g) {
  const Rows layout(plan);
  const Tensors t = with_streaming(call.tensors, layout, kRowsCacheBytes, layout.width());
  ChannelBuffers buffers(layout);
  set_point(call, {0, layout.channels}, mean, var, buffers);
  Partials parts(layout.parts(), layout.channels);
  backward_pass(kernels, t, layout, buffers.repeated(), Backward::fused, parts);
  const double count = static_cast<double>(layout.count());
  over_shares(layout.channels, layout.threads_to_finish(parts),
              [&](Range range) { finish_sums(call, parts, range, count, var, sum_g_xhat, sum_g, buffers); });
}

}  // namespace leannorm
