// What convolutions have in common that are one operator with the batch norm after them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.hpp"
#include "layout.hpp"

namespace leannorm {

struct ConvolutionCall {
  Tensors tensors;            // backward takes y or z as y
  const int64_t* draw;        // may be null
  const float* weight;        // (C, numbers of a filter)
  const float *gamma, *beta;  // may be null
  double eps;
};

constexpr int64_t kWidestLanes = 16;  // of the widest vectors of any instruction set

// Calls body(range) for shares of n channels, whole vectors but for the last one's end.
template <class Body>
void over_channels(int64_t n, int64_t work, Body body) {
  over_shares(divide_up(n, kWidestLanes), threads_for(work), [&](Range vectors) {
    body(Range{vectors.begin * kWidestLanes, std::min(vectors.end * kWidestLanes, n)});
  });
}

// What batch norm multiplies a channel with.
struct Scale {
  const ConvolutionCall& call;
  const float* var;
  double rstd(int64_t c) const;
  double operator()(int64_t c) const { return rstd(c) * (call.gamma ? call.gamma[c] : 1.0f); }
};

// Whether results of rows of `width` elements are written around the caches.
bool streams(const Tensors&, int64_t rows, int64_t width);

// Positions and weights: region after region, as the sample has them; and each once, ascending, with its row in the
// sample. Those of one region have weight 1.
struct SampledOutputs {
  std::vector<int64_t> by_region;
  std::vector<float> weights_by_region;
  std::vector<int64_t> positions, rows;
  std::vector<float> weights;
  double count = 0;  // the sum of all weights

  SampledRows view(const void* sample) const;
};

// Regions of outputs of these sizes (samples, rows, columns), as the contract's boxes and shares have them.
class SampledRegions {
 public:
  SampledRegions(std::vector<int64_t> sizes, std::vector<int64_t> boxes, std::vector<double> shares, bool drawn);
  SampledRegions(const SampledRegions&) = delete;

  // Those that a draw gives, in `drawn`; without one, those that never move.
  const SampledOutputs& at(const int64_t* draw, std::optional<SampledOutputs>& drawn) const;

 private:
  SampledOutputs outputs(const int64_t* draw) const;

  std::vector<int64_t> sizes_, boxes_;
  std::vector<double> shares_;
  std::optional<SampledOutputs> fixed_;
};

// Moments over the sample of some channels, the first one's first. `width` channels are a row; rows[i], or i without
// rows, is that of the sample's i-th position.
struct SampledMoments {
  std::vector<double> means, variances;
};
SampledMoments sampled_moments(const Kernels&, Dtype, const void* x, int64_t width, const int64_t* rows,
                               const SampledOutputs&, Range channels);

}  // namespace leannorm
