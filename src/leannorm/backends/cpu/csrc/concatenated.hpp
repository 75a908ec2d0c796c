// Batch normalization of a concatenation along channels, in channels-last memory, that is never written: blocks of its
// rows are put together in the caches. Statistics are sampled ones.
#pragma once

#include <cstdint>
#include <vector>

#include "driver.hpp"

namespace leannorm {

struct Part {
  const char* x;
  char* dx;  // null where no gradient is wanted
  int64_t channels;
};
using Parts = std::vector<Part>;

// x and dx of the tensors are not looked at; those of the parts are.

void concatenated_batch_norm(const Kernels&, const Plan&, const Call&, const Parts&, float* mean, float* var);

void concatenated_batch_norm_backward(const Kernels&, const Plan&, const Call&, const Parts&, const float* mean,
                                      const float* var, float* sum_g_xhat, float* sum_g);

}  // namespace leannorm
