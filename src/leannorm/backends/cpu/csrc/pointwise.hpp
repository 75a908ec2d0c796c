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

// What the convolution reads, and what becomes of that one's gradient. Rows are numbers of the output's, or of a list.
class PointwiseInputs {
 public:
  virtual ~PointwiseInputs() = default;
  // Whether there is a gradient to be computed.
  virtual bool has_gradient() const = 0;
  // The channels' means over the sample.
  virtual void means(const SampledOutputs&, float* centre) const = 0;

  // As the kernels of these names do; backward and correct get the number of the thread.
  virtual void forward(const Tensors&, const float* filters, const Channels&, const RowPairs&, Range rows) const = 0;
  virtual void backward(const Tensors&, const float* filters, const float* centre, Range rows, int thread,
                        double* sum_g, float* dweight) = 0;
  virtual void correct(const Tensors&, const float* filters, const float* centre, const Channels&, const SampledRows&,
                       Range rows, int thread, float* dweight) = 0;
};

// Writes tensors.out, tensors.dresidual as z where it is not null, and the rest.
void pointwise_forward_of(const Kernels&, const PointwisePlan&, const ConvolutionCall&, const PointwiseInputs&,
                          void* sample, float* mean, float* var);

// Writes tensors.dresidual where it is not null, and the rest; dweight as (outputs, inputs).
void pointwise_backward_of(const Kernels&, const PointwisePlan&, const ConvolutionCall&, PointwiseInputs&,
                           const void* sample, const float* mean, const float* var, float* dweight, float* sum_g_xhat,
                           float* sum_g);

// The same of inputs that are the tensor x, whose gradient is written to tensors.out where it is not null.

void pointwise_forward(const Kernels&, const PointwisePlan&, const ConvolutionCall&, void* sample, float* mean,
                       float* var);

void pointwise_backward(const Kernels&, const PointwisePlan&, const ConvolutionCall&, const void* sample,
                        const float* mean, const float* var, float* dweight, float* sum_g_xhat, float* sum_g);

}  // namespace leannorm
