// Batch normalization of a concatenation along channels that is never written, with sampled statistics.
#pragma once

#include "driver.hpp"
#include "parts.hpp"

namespace leannorm {

// x and dx of the tensors are not looked at; those of the parts are.

void concatenated_batch_norm(const Kernels&, const Plan&, const Call&, const Parts&, float* mean, float* var);

void concatenated_batch_norm_backward(const Kernels&, const Plan&, const Call&, const Parts&, const float* mean,
                                      const float* var, float* sum_g_xhat, float* sum_g);

}  // namespace leannorm
