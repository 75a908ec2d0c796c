// The sampled elements that regions stand for. See leannorm.statistics for what a region is.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace leannorm {

// Positions in ascending order, each once; regions that overlap add up their weights. The largest weight of an element is
// about 1, so that those of one region are exactly 1.
struct Places {
  std::vector<int64_t> positions;
  std::vector<float> weights;
  std::vector<int64_t> first;   // of each sample: its elements are [first[n], first[n + 1])
  std::vector<double> counts;   // of each sample: the sum of its weights
  double count = 0;             // the sum of all weights

  // boxes: for each region, for N and each spatial dimension: start, span, count, step. draw may be null.
  Places(const std::vector<int64_t>& sizes, const int64_t* draw, const std::vector<int64_t>& boxes,
         const std::vector<double>& shares);

  Sampled of_range(int64_t begin, int64_t end) const {
    return {positions.data() + begin, weights.data() + begin, end - begin};
  }
  Sampled of_sample(int64_t n) const { return of_range(first[n], first[n + 1]); }

  // Positions counted within a sample in place of the whole batch.
  void within_samples(int64_t per_sample);
};

}  // namespace leannorm
