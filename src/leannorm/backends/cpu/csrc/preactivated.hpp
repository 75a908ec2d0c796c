// Batch norm and activation of a concatenation (or of one tensor), a pointwise convolution of that, and the batch norm
// and activation after it as one operator, of float32: what lies between concatenation and result is in the caches
// alone. A block of rows takes the steps that the operators take one by one, by their kernels.
//
// All that backward sums is linear in the gradient of what is activated first. So the corrections of the second batch
// norm's sampled rows are added to the sums and to the gradients of the parts, then those of the first one's.
#pragma once

#include "concatenated.hpp"
#include "pointwise.hpp"

namespace leannorm {

// Of a batch norm: what forward writes, or backward reads.
struct Moments {
  float *mean, *var;
};

// The first call's tensors have dtype and activation, the second one's all else; x and dx are those of the parts.
void preactivated_forward(const Kernels&, const Plan& first, const PointwisePlan& second, const Call&,
                          const ConvolutionCall&, const Parts&, Moments of_first, Moments of_second, void* sample);

struct PreactivatedGradients {
  float *first_sum_g_xhat, *first_sum_g, *dweight, *sum_g_xhat, *sum_g;
};
void preactivated_backward(const Kernels&, const Plan& first, const PointwisePlan& second, const Call&,
                           const ConvolutionCall&, const Parts&, Moments of_first, Moments of_second,
                           const void* sample, const PreactivatedGradients&);

}  // namespace leannorm
