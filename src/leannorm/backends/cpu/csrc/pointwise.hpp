// A pointwise convolution and the batch norm after it as one operator, of float32 in channels-last memory. The operator
// is that of leannorm.ops.conv_batch_norm. A block of rows stays in the caches from the first step to the last, so that
// forward reads x and writes y, backward reads dy, y and x and writes dx.
//
// With m = sum_i w_i x_i over the sample, sum_i g'_i x_i = sum_i g_i (x_i - m), which needs no dbeta and has no large
// numbers that cancel out. What dbeta and dgamma take off at the sampled rows comes last, where all else has been
// written: to dx, and to the filters' gradient, which the same numbers times x_i - m correct.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "convolution.hpp"
#include "kernels.hpp"

namespace leannorm {

struct PointwisePlan {
  int64_t rows, inputs, outputs;
  int64_t input_rows;
  std::vector<int64_t> places;  // of the input for each row of the output; empty where they are the same
  SampledRegions regions;
  // The rows that are not sampled, whose outputs are to be computed when those of the sample have been.
  struct Rest {
    std::vector<int64_t> inputs, outputs;  // no inputs where they are the same
  };

  PointwisePlan(int64_t samples, int64_t inputs, int64_t outputs, std::array<int64_t, 2> sizes,
                std::array<int64_t, 2> stride, std::vector<int64_t> boxes, std::vector<double> shares, bool drawn);
  Pointwise view() const;
  const Rest& rest(const SampledOutputs&, std::optional<Rest>& drawn) const;

 private:
  Rest rest(const SampledOutputs&) const;
  std::optional<Rest> fixed_;
};

// Writes tensors.out, tensors.dresidual as z where it is not null, and the rest.
void pointwise_forward(const Kernels&, const PointwisePlan&, const ConvolutionCall&, void* sample, float* mean,
                       float* var);

// Writes tensors.out and tensors.dresidual where they are not null, and the rest; dweight as (outputs, inputs).
void pointwise_backward(const Kernels&, const PointwisePlan&, const ConvolutionCall&, const void* sample,
                        const float* mean, const float* var, float* dweight, float* sum_g_xhat, float* sum_g);

}  // namespace leannorm
