// Running statistics: they move by a factor towards those of a batch.
#pragma once

#include <cstdint>

namespace leannorm {

struct Running {
  float *mean, *var;
  int64_t* batches;  // their number, or null where somebody else counts them
};

// Counts a batch, and moves the statistics. `unbiased` turns the batch's biased variance into an unbiased estimate. With
// `between_steps` the variance of the mean between steps is added; with `guarded` channels whose statistics are not
// finite stay as they are.
void track(const Running& running, const float* mean, const float* var, int64_t channels, float unbiased, float factor,
           bool between_steps, bool guarded);

}  // namespace leannorm
