// Batch normalization of whole tensors: splits them over threads, merges statistics, finishes them per channel.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.hpp"
#include "places.hpp"

namespace leannorm {

// What a layer's calls have in common as long as its input keeps its shape and memory order. Never changes once made.
struct Plan {
  bool channels_last;  // memory order (N, *spatial, C), else (N, C, *spatial)
  int64_t channels;
  std::vector<int64_t> sizes;  // N, *spatial
  std::vector<int64_t> boxes;  // empty: statistics of all elements
  std::vector<double> shares;
  std::optional<Places> fixed;  // where no draw moves them

  Plan(bool channels_last, int64_t channels, std::vector<int64_t> sizes, std::vector<int64_t> boxes,
       std::vector<double> shares, bool drawn);
  int64_t spatial() const;
  int64_t sign_bytes() const;  // of all elements; 0 where stretches of memory begin within a byte
  Places places(const int64_t* draw) const;
};

struct Call {
  Tensors tensors;
  const int64_t* draw;         // may be null
  const float *weight, *bias;  // may be null
  double eps;
};

void batch_norm(const Kernels&, const Plan&, const Call&, float* mean, float* var);

void batch_norm_backward(const Kernels&, const Plan&, const Call&, const float* mean, const float* var,
                         float* sum_g_xhat, float* sum_g);

// With given statistics, whatever regions the plan has: one pass a direction.

void normalize(const Kernels&, const Plan&, const Call&, const float* mean, const float* var);

void backward_fused(const Kernels&, const Plan&, const Call&, const float* mean, const float* var, float* sum_g_xhat,
                    float* sum_g);

}  // namespace leannorm
