#include "concatenated.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "layout.hpp"
#include "scratch.hpp"

namespace leannorm {
namespace {

constexpr int64_t kBlockBytes = 1 << 17;
constexpr int64_t kCacheBytes = 8 << 20;  // larger calls write around the caches

void copy(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kStep = 64;  // a size that the compiler knows, since rows of a part are short
  for (; bytes >= kStep; bytes -= kStep, to += kStep, from += kStep) std::memcpy(to, from, kStep);
  std::memcpy(to, from, bytes);
}

// Some rows of the concatenation, which lie next to each other in a block, and in the parts at row(i).
template <class Row>
struct Block {
  const Parts& parts;
  int64_t element, width;  // bytes
  int64_t count;
  Row row;

  void read(char* block) const {
    each([&](const Part& part, int64_t i, int64_t begin, int64_t bytes) {
      copy(block + i * width + begin, part.x + row(i) * bytes, bytes);
    });
  }
  void write(const char* block) const {
    each([&](const Part& part, int64_t i, int64_t begin, int64_t bytes) {
      if (part.dx) copy(part.dx + row(i) * bytes, block + i * width + begin, bytes);
    });
  }

 private:
  // Part by part, as they lie in memory.
  template <class Body>
  void each(Body body) const {
    int64_t begin = 0;
    for (const Part& part : parts) {
      const int64_t bytes = part.channels * element;
      for (int64_t i = 0; i < count; ++i) body(part, i, begin, bytes);
      begin += bytes;
    }
  }
};

// Calls body(first, count) for the rows of a thread's share, as many at a time as stay in its cache.
template <class Body>
void each_block(Range rows, int64_t width, Body body) {
  const int64_t most = std::max<int64_t>(1, kBlockBytes / width);
  for (int64_t first = rows.begin; first < rows.end; first += most) body(first, std::min(most, rows.end - first));
}

Partials moments_of_places(const Kernels& kernels, const Call& call, const Parts& parts, const Layout& layout,
                           const Places& places) {
  const int threads = threads_for(layout, places);
  Partials sums(threads, layout.channels);
  parallel(threads, [&](int thread) {
    const auto [begin, end] = share_of(places.size(), thread, threads);
    std::vector<float> scratch(scratch_size(layout.channels));
    std::vector<int64_t> offsets(end - begin);
    Tensors t = call.tensors;
    int64_t channel = thread * layout.channels;
    for (const Part& part : parts) {
      t.x = part.x;
      for (int64_t i = begin; i < end; ++i)
        offsets[i - begin] = places.offsets[i] / layout.channels * part.channels;
      const Sampled sampled{offsets.data(), places.weights.data() + begin, end - begin};
      kernels.moments_sampled_rows(t, part.channels, sampled, {&sums.first[channel], &sums.second[channel]},
                                   scratch.data());
      channel += part.channels;
    }
    sums.counts[thread] = std::accumulate(places.weights.data() + begin, places.weights.data() + end, 0.0);
  });
  return sums;
}

}  // namespace

void concatenated_batch_norm(const Kernels& kernels, const Plan& plan, const Call& call, const Parts& parts,
                             float* mean, float* var) {
  const Layout layout(plan);
  const Sample places(plan, call.draw);
  const int64_t element = size_of(call.tensors.dtype), width = layout.channels * element;
  ChannelBuffers buffers(layout);
  finish_moments(call, moments_of_places(kernels, call, parts, layout, *places), {0, layout.channels}, mean, var,
                 buffers);
  const Tensors all = with_streaming(call.tensors, layout, kCacheBytes, layout.channels);
  over_shares(layout.count(), layout.threads, [&](Range share) {
    each_block(share, width, [&](int64_t first, int64_t count) {
      char* const block = scratch_of<char, Of::thread>(std::max(kBlockBytes, width));
      Block{parts, element, width, count, [&](int64_t i) { return first + i; }}.read(block);
      Tensors t = all;
      t.x = block;
      t.out = static_cast<char*>(all.out) + first * width;
      kernels.forward_rows(t, buffers.view(), 0, count, layout.channels);
    });
  });
}

void concatenated_batch_norm_backward(const Kernels& kernels, const Plan& plan, const Call& call, const Parts& parts,
                                      const float* mean, const float* var, float* sum_g_xhat, float* sum_g) {
  const Layout layout(plan);
  const Sample places(plan, call.draw);
  const int64_t element = size_of(call.tensors.dtype), width = layout.channels * element;
  const int64_t block_bytes = std::max(kBlockBytes, width);
  const auto* const dy = static_cast<const char*>(call.tensors.dy);
  ChannelBuffers buffers(layout);
  set_point(call, {0, layout.channels}, mean, var, buffers);
  Partials sums(layout.threads, layout.channels);
  parallel(layout.threads, [&](int thread) {
    std::vector<float> scratch(scratch_size(layout.channels));
    char* const block = scratch_of<char, Of::thread>(2 * block_bytes);
    Tensors t = call.tensors;
    t.x = block;
    t.out = block + block_bytes;
    each_block(share_of(layout.count(), thread, layout.threads), width, [&](int64_t first, int64_t count) {
      const Block rows{parts, element, width, count, [&](int64_t i) { return first + i; }};
      rows.read(block);
      t.dy = dy + first * width;
      kernels.backward_rows(t, buffers.view(), Backward::fused, 0, count, layout.channels, sums.at(thread),
                            scratch.data());
      rows.write(block + block_bytes);
    });
  });
  finish_sums(call, sums, {0, layout.channels}, places->count, var, sum_g_xhat, sum_g, buffers);
  over_shares(places->size(), threads_for(layout, *places), [&](Range share) {
    char* const block = scratch_of<char, Of::thread>(3 * block_bytes);
    Tensors t = call.tensors;
    t.x = block;
    t.out = block + block_bytes;
    t.dy = block + 2 * block_bytes;
    std::vector<int64_t> offsets(std::max<int64_t>(1, block_bytes / width));
    for (size_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<int64_t>(i) * layout.channels;
    each_block(share, width, [&](int64_t first, int64_t count) {
      const int64_t* const sampled = &places->offsets[first];
      const Block rows{parts, element, width, count, [&](int64_t i) { return sampled[i] / layout.channels; }};
      rows.read(block);
      for (int64_t i = 0; i < count; ++i)
        copy(block + 2 * block_bytes + i * width, dy + sampled[i] * element, width);
      kernels.correct_rows(t, buffers.view(), layout.channels, {offsets.data(), &places->weights[first], count});
      rows.write(block + block_bytes);
    });
  });
}

}  // namespace leannorm
