#include "driver.hpp"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

namespace leannorm {
namespace {

constexpr int64_t kSerial = 1 << 14;       // elements below which a second thread costs more than it saves
constexpr int64_t kPiece = 1 << 16;        // elements of a plane that are one unit of work
constexpr int64_t kWidth = 256;            // lanes that a row should have at least
constexpr int64_t kChunk = 1 << 15;        // elements that are one step of a thread
constexpr int64_t kCacheBytes = 32 << 20;  // a call that touches more writes around the caches

int64_t product(const std::vector<int64_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Body>
void parallel(int threads, Body body) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    body(t);
#if defined(__x86_64__)
    __builtin_ia32_sfence();  // stores around the caches become visible before another thread goes on
#endif
  }
}

struct Range {
  int64_t begin, end;
};

Range share_of(int64_t n, int thread, int threads) { return {n * thread / threads, n * (thread + 1) / threads}; }

// How a problem is cut into units and these over threads.
struct Layout : Geometry {
  bool rows;
  int threads;

  explicit Layout(const Plan& plan)
      : Geometry{plan.sizes[0], plan.channels, plan.spatial(), 1, 1}, rows(plan.channels_last) {
    threads = elements() < kSerial || omp_in_parallel() ? 1 : omp_get_max_threads();
    if (rows) {
      const int64_t whole = 32 / std::gcd(channels, int64_t{32});  // makes wide rows whole vectors and cache lines
      fold = whole * std::max<int64_t>(1, kWidth / (channels * whole));
      if (width() > 16 * kWidth) fold = 1;
    } else {
      pieces = divide_up(spatial, kPiece);
    }
  }

  int64_t elements() const { return samples * channels * spatial; }
  int64_t count() const { return samples * spatial; }
  int64_t units() const { return rows ? count() / fold : samples * channels * pieces; }
  int64_t rest() const { return rows ? count() % fold : 0; }  // rows that fill no wide row
  int64_t rest_offset() const { return units() * width(); }

  // Partial statistics: for each thread its wide rows, and the rest; or for each piece of each sample.
  int64_t parts() const { return rows ? threads * fold + 1 : samples * pieces; }

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
};

// Two sums for each part and channel, and each part's weight.
struct Partials {
  int64_t parts, channels;
  std::vector<double> first, second, counts;
  Partials(int64_t parts, int64_t channels)
      : parts(parts), channels(channels), first(parts * channels), second(parts * channels), counts(parts) {}
  Sums at(int64_t part, int64_t channel = 0) {
    return {&first[part * channels + channel], &second[part * channels + channel]};
  }
};

// Per-channel values, to be repeated for wide rows and padded.
struct ChannelBuffers {
  int64_t channels, width, padded;
  std::vector<float> values;
  float *mean, *scale, *bias, *centre, *slope;

  explicit ChannelBuffers(const Geometry& g)
      : channels(g.channels), width(g.width()), padded(width + 64), values(5 * padded) {
    float* p = values.data();
    for (float** buffer : {&mean, &scale, &bias, &centre, &slope}) *buffer = p, p += padded;
  }

  Channels view() {
    if (width > channels)
      for (float* v : {mean, scale, bias, centre, slope})
        for (int64_t i = channels; i < width; ++i) v[i] = v[i - channels];
    return {mean, scale, bias, centre, slope};
  }
};

float inverse_deviation(float var, double eps) { return static_cast<float>(1 / std::sqrt(var + eps)); }

Partials moments_of_all(const Kernels& kernels, const Tensors& t, const Layout& layout) {
  Partials parts(layout.parts(), layout.channels);
  if (!layout.rows) {
    layout.each_chunk(false, [&](int64_t begin, int64_t end, int) {
      kernels.moments_planes(t, layout, begin, end, parts.at(0));
    });
    for (int64_t part = 0; part < parts.parts; ++part) {
      const Range piece = share_of(layout.spatial, part % layout.pieces, layout.pieces);
      parts.counts[part] = static_cast<double>(piece.end - piece.begin);
    }
    return parts;
  }
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

int threads_for(const Layout& layout, const Places& places) {
  return places.size() * layout.channels < kSerial ? 1 : layout.threads;
}

Partials moments_of_places(const Kernels& kernels, const Tensors& t, const Layout& layout, const Places& places) {
  const int threads = threads_for(layout, places);
  Partials parts(layout.rows ? threads : 1, layout.channels);
  parallel(threads, [&](int thread) {
    if (!layout.rows) {
      const Sums sums = parts.at(0);
      const auto [begin, end] = share_of(layout.channels, thread, threads);
      if (!places.runs.empty()) return kernels.moments_of_runs(t, layout.spatial, begin, end, places.all_runs(), sums);
      std::vector<float> scratch(scratch_size(kWidth));
      return kernels.moments_sampled_planes(t, layout.spatial, begin, end, places.all(), sums, scratch.data());
    }
    std::vector<float> scratch(scratch_size(layout.channels));
    const auto [begin, end] = share_of(places.size(), thread, threads);
    kernels.moments_sampled_rows(t, layout.channels, places.of_range(begin, end), parts.at(thread), scratch.data());
    parts.counts[thread] = std::accumulate(places.weights.data() + begin, places.weights.data() + end, 0.0);
  });
  if (!layout.rows) parts.counts[0] = places.count;
  return parts;
}

// Runs body(range of channels) over the threads where there are many partial sums.
template <class Body>
void over_channels(const Partials& parts, int threads, Body body) {
  if (parts.parts * parts.channels < kSerial) threads = 1;
  parallel(threads, [&](int t) {
    const Range range = share_of(parts.channels, t, threads);
    if (range.begin < range.end) body(range);
  });
}

void finish_moments(Partials& parts, Range range, float* mean, float* var) {
  const int64_t n = range.end - range.begin;
  const double count = std::accumulate(parts.counts.begin(), parts.counts.end(), 0.0);
  std::vector<double> means(n), squares(n);
  for (int64_t part = 0; part < parts.parts; ++part) {
    const double* sum = parts.at(part, range.begin).first;
    for (int64_t c = 0; c < n; ++c) means[c] += sum[c];
  }
  for (int64_t c = 0; c < n; ++c) means[c] /= count;
  for (int64_t part = 0; part < parts.parts; ++part) {
    const double weight = parts.counts[part];
    if (weight == 0) continue;
    const auto [sum, square] = parts.at(part, range.begin);
    for (int64_t c = 0; c < n; ++c) {
      const double distance = sum[c] / weight - means[c];
      squares[c] += square[c] + weight * distance * distance;
    }
  }
  for (int64_t c = 0; c < n; ++c) {
    mean[range.begin + c] = static_cast<float>(means[c]);
    var[range.begin + c] = static_cast<float>(squares[c] / count);
  }
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

bool lines_are_whole(const Layout& layout, const void* p, int64_t bytes) {
  const int64_t stretch = layout.rows ? layout.width() : layout.spatial / layout.pieces;
  return reinterpret_cast<uintptr_t>(p) % 64 == 0 && stretch * bytes % 64 == 0 &&
         (layout.rows || layout.spatial % layout.pieces == 0);
}

Tensors with_streaming(Tensors t, const Layout& layout) {
  const int64_t bytes = size_of(t.dtype);
  const void* all[] = {t.x, t.dy, t.residual, t.y, t.out, t.dresidual};
  const int64_t streams = std::count_if(std::begin(all), std::end(all), [](const void* p) { return p != nullptr; });
  t.stream = streams * layout.elements() * bytes > kCacheBytes && lines_are_whole(layout, t.out, bytes) &&
             lines_are_whole(layout, t.dresidual, bytes);
  return t;
}

Tensors without_streaming(Tensors t) {
  t.stream = false;
  return t;
}

void set_point(const Call& call, Range range, const float* mean, const float* var, ChannelBuffers& buffers) {
  for (int64_t c = range.begin; c < range.end; ++c) {
    buffers.mean[c] = mean[c];
    buffers.scale[c] = inverse_deviation(var[c], call.eps) * (call.weight ? call.weight[c] : 1.0f);
    buffers.bias[c] = call.bias ? call.bias[c] : 0.0f;
  }
}

// One pass that reads x and dy; exact ones begin with what the pass before has left in the cache.
void backward_pass(const Kernels& kernels, const Tensors& t, const Layout& layout, const Channels& channels,
                   Backward mode, Partials& parts) {
  const bool reverse = mode == Backward::exact;
  if (!layout.rows) {
    layout.each_chunk(reverse, [&](int64_t begin, int64_t end, int) {
      kernels.backward_planes(t, channels, mode, layout, begin, end, parts.at(0));
    });
    return;
  }
  const int64_t width = layout.width(), size = scratch_size(width);
  std::vector<float> scratch(size * layout.threads);
  layout.each_chunk(reverse, [&](int64_t begin, int64_t end, int thread) {
    kernels.backward_rows(t, channels, mode, begin * width, end - begin, width, parts.at(thread * layout.fold),
                          &scratch[thread * size]);
  });
  kernels.backward_rows(without_streaming(t), channels, mode, layout.rest_offset(), layout.rest(), layout.channels,
                        parts.at(parts.parts - 1), scratch.data());
}

void correct(const Kernels& kernels, const Tensors& t, const Layout& layout, const Channels& channels,
             const Places& places) {
  const int threads = threads_for(layout, places);
  parallel(threads, [&](int thread) {
    if (layout.rows) {
      const auto [begin, end] = share_of(places.size(), thread, threads);
      kernels.correct_rows(t, channels, layout.channels, places.of_range(begin, end));
    } else {
      const auto [begin, end] = share_of(layout.channels, thread, threads);
      if (places.runs.empty()) kernels.correct_planes(t, channels, layout.spatial, begin, end, places.all());
      else kernels.correct_runs(t, channels, layout.spatial, begin, end, places.all_runs());
    }
  });
}

// Fixed places, or those that a draw gives.
class Sample {
 public:
  Sample(const Plan& plan, const int64_t* draw) {
    if (plan.boxes.empty()) return;
    if (!plan.fixed) drawn_.emplace(plan.places(draw));
    places_ = plan.fixed ? &*plan.fixed : &*drawn_;
  }
  Sample(const Sample&) = delete;
  explicit operator bool() const { return places_; }
  const Places& operator*() const { return *places_; }
  const Places* operator->() const { return places_; }

 private:
  std::optional<Places> drawn_;
  const Places* places_ = nullptr;
};

}  // namespace

Plan::Plan(bool channels_last, int64_t channels, std::vector<int64_t> sizes, std::vector<int64_t> boxes,
           std::vector<double> shares, bool drawn)
    : channels_last(channels_last),
      channels(channels),
      sizes(std::move(sizes)),
      boxes(std::move(boxes)),
      shares(std::move(shares)) {
  if (!this->boxes.empty() && !drawn) fixed.emplace(places(nullptr));
}

int64_t Plan::spatial() const { return product(sizes) / sizes[0]; }

Places Plan::places(const int64_t* draw) const {
  return Places(sizes, draw, boxes, shares, [this, n = spatial()](int64_t position) {
    return channels_last ? position * channels : position / n * n * channels + position % n;
  });
}

void batch_norm(const Kernels& kernels, const Plan& plan, const Call& call, float* mean, float* var) {
  const Layout layout(plan);
  const Sample places(plan, call.draw);
  const Tensors t = with_streaming(call.tensors, layout);
  Partials parts = places ? moments_of_places(kernels, t, layout, *places) : moments_of_all(kernels, t, layout);
  ChannelBuffers buffers(layout);
  over_channels(parts, layout.threads, [&](Range range) {
    finish_moments(parts, range, mean, var);
    set_point(call, range, mean, var, buffers);
  });
  const Channels channels = buffers.view();
  layout.each_chunk(!places, [&](int64_t begin, int64_t end, int) {
    if (!layout.rows) return kernels.forward_planes(t, channels, layout, begin, end);
    kernels.forward_rows(t, channels, begin * layout.width(), end - begin, layout.width());
  });
  kernels.forward_rows(without_streaming(t), channels, layout.rest_offset(), layout.rest(), layout.channels);
}

void batch_norm_backward(const Kernels& kernels, const Plan& plan, const Call& call, const float* mean,
                         const float* var, float* sum_g_xhat, float* sum_g) {
  const Layout layout(plan);
  const Sample places(plan, call.draw);
  const Tensors t = with_streaming(call.tensors, layout);
  ChannelBuffers buffers(layout);
  set_point(call, {0, layout.channels}, mean, var, buffers);
  Partials parts(layout.parts(), layout.channels);
  backward_pass(kernels, t, layout, buffers.view(), places ? Backward::fused : Backward::reduce, parts);

  const double count = places ? places->count : static_cast<double>(layout.count());
  over_channels(parts, layout.threads, [&](Range range) {
    std::vector<double> totals(2 * (range.end - range.begin));
    double *g = totals.data() - range.begin, *g_centred = g + (range.end - range.begin);
    for (int64_t part = 0; part < parts.parts; ++part) {
      const auto [first, second] = parts.at(part);
      for (int64_t c = range.begin; c < range.end; ++c) g[c] += first[c];
      for (int64_t c = range.begin; c < range.end; ++c) g_centred[c] += second[c];
    }
    for (int64_t c = range.begin; c < range.end; ++c) {
      const float rstd = inverse_deviation(var[c], call.eps);
      const double scale = buffers.scale[c] / count;
      sum_g[c] = static_cast<float>(g[c]);
      sum_g_xhat[c] = static_cast<float>(g_centred[c] * rstd);
      buffers.centre[c] = static_cast<float>(scale * g[c]);
      buffers.slope[c] = static_cast<float>(scale * rstd * rstd * g_centred[c]);
    }
  });
  if (places) {
    correct(kernels, without_streaming(t), layout, buffers.view(), *places);
  } else {
    backward_pass(kernels, t, layout, buffers.view(), Backward::exact, parts);
  }
}

}  // namespace leannorm
