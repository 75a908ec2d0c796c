// Batch normalization of whole tensors: splits them over threads, merges statistics, finishes them per channel.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace leannorm {

struct Problem {
  Tensors tensors;
  bool channels_last;          // memory order (N, *spatial, C), else (N, C, *spatial)
  int64_t channels;
  std::vector<int64_t> sizes;  // N, *spatial
  const int64_t* draw;         // may be null
  std::vector<int64_t> boxes;  // empty: statistics of all elements
  std::vector<double> shares;
  const float *weight, *bias;  // may be null
  double eps;
};

void batch_norm(const Kernels&, const Problem&, float* mean, float* var);

void batch_norm_backward(const Kernels&, const Problem&, const float* mean, const float* var, float* sum_g_xhat,
                         float* sum_g);

}  // namespace leannorm
