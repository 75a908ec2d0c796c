// A depthwise convolution and the batch norm after it as one operator, in channels-last memory: forward never writes
// what the convolution gives, backward never what batch norm passes back to it. The operator is that of
// leannorm.ops.conv_batch_norm; the sums of its backward are taken apart, so that one pass gives them, x_i being what a
// tap sees of the input for output i:
//
//   P = sum_i g_i x_i,  Q = sum_i w_i x_i,  R = sum_i w_i xhat_i x_i     a number a channel and tap
//   dgamma = <W, P - dbeta Q> / sigma,  dW = a (P - dbeta Q - dgamma R)
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "convolution.hpp"
#include "kernels.hpp"

namespace leannorm {

// The outputs that see each input, and the inputs that each output sees, in one dimension.
class Links {
 public:
  Links(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation);
  Links(const Links&) = delete;
  int64_t outputs() const { return outputs_; }
  RowLinks as_rows() const;
  ColumnLinks as_columns() const;

 private:
  int64_t size_, kernel_, stride_, padding_, dilation_, outputs_;
  std::vector<std::vector<Link>> seen_, seeing_;
  std::vector<LinkRange> seen_ranges_, seeing_ranges_;
  std::vector<Link> run_of_seen_;
  std::vector<std::vector<Link>> runs_of_seeing_;
  std::vector<LinkRun> seeing_runs_;
};

struct DepthwisePlan {
  int64_t samples, channels;
  Links rows, columns;
  int64_t kernel_columns, taps;
  SampledRegions regions;

  DepthwisePlan(int64_t samples, int64_t channels, std::array<int64_t, 2> sizes, std::array<int64_t, 2> kernel,
                std::array<int64_t, 2> stride, std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation,
                std::vector<int64_t> boxes, std::vector<double> shares, bool drawn);
  int64_t output_rows() const { return samples * rows.outputs(); }
  Depthwise view() const;
};

// Writes tensors.out, tensors.dresidual as z where it is not null, and the rest.
void depthwise_forward(const Kernels&, const DepthwisePlan&, const ConvolutionCall&, void* sample, float* mean,
                       float* var);

// Writes tensors.out and tensors.dresidual where they are not null, and the rest; dweight as (C, taps).
void depthwise_backward(const Kernels&, const DepthwisePlan&, const ConvolutionCall&, const void* sample,
                        const float* mean, const float* var, float* dweight, float* sum_g_xhat, float* sum_g);

}  // namespace leannorm
