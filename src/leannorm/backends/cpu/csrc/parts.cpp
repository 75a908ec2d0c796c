#include "parts.hpp"

#include <numeric>

namespace leannorm {

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
