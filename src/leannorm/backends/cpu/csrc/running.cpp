#include "running.hpp"

#include <cmath>

namespace leannorm {

void track(const Running& running, const float* mean, const float* var, int64_t channels, float unbiased, float factor,
           bool between_steps, bool guarded) {
  const auto lerp = [factor](float from, float to) {
    return factor < 0.5f ? from + factor * (to - from) : to - (to - from) * (1 - factor);
  };
  if (running.batches) ++*running.batches;
  for (int64_t c = 0; c < channels; ++c) {
    const float shift = mean[c] - running.mean[c];
    const float spread = var[c] * unbiased + (between_steps ? (1 - factor) * (shift * shift) : 0.0f);
    if (guarded && !(std::isfinite(mean[c]) && std::isfinite(spread))) continue;
    running.mean[c] = lerp(running.mean[c], mean[c]);
    running.var[c] = lerp(running.var[c], spread);
  }
}

}  // namespace leannorm
