#include "parts.hpp"

#include <numeric>

namespace leannorm {

bool goes_around_caches(const Parts& parts, int64_t element, int64_t rows) {
  constexpr int64_t kCacheBytes = 16 << 20;  // smaller ones are found in the caches where gradients are added up
  int64_t width = 0;
  for (const Part& part : parts) {
    const int64_t bytes = part.channels * element;
    if (bytes % kLine || !starts_a_line(part.dx)) return false;
    width += bytes;
  }
  return 3 * rows * width > kCacheBytes;  // x, dy, dx
}

Partials moments_of_parts(const Kernels& kernels, const Tensors& tensors, const Parts& parts, const Layout& layout,
                          const Places& places) {
  const int threads = threads_for(layout, places);
  Partials sums(threads, layout.channels);
  parallel(threads, [&](int thread) {
    const auto [begin, end] = share_of(places.size(), thread, threads);
    std::vector<float> scratch(scratch_size(layout.channels));
    std::vector<int64_t> offsets(end - begin);
    Tensors t = tensors;
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

}  // namespace leannorm
