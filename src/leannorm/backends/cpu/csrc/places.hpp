// The sampled elements that regions stand for. See leannorm.statistics for what a region is.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace leannorm {

// Sampled elements in memory's order, each once; regions that overlap add up their weights. The largest weight of an
// element is about 1, so that those of one region are exactly 1.
struct Places {
  std::vector<int64_t> offsets;  // of each sampled position: where its first channel lies
  std::vector<float> weights;
  std::vector<Run> runs;  // the same, where the runs are long and all weights 1; else none
  double count = 0;       // the sum of all weights

  // boxes: for each region, for N and each spatial dimension: start, span, count, step. draw may be null.
  // A position is counted in (N, *spatial); offset_of gives its offset.
  template <class OffsetOf>
  Places(const std::vector<int64_t>& sizes, const int64_t* draw, const std::vector<int64_t>& boxes,
         const std::vector<double>& shares, OffsetOf offset_of)
      : Places(sizes, draw, boxes, shares) {
    for (int64_t& offset : offsets) offset = offset_of(offset);
    find_runs();
  }

  Sampled all() const { return of_range(0, size()); }
  Runs all_runs() const { return {runs.data(), static_cast<int64_t>(runs.size())}; }
  int64_t size() const { return static_cast<int64_t>(offsets.size()); }
  Sampled of_range(int64_t begin, int64_t end) const {
    return {offsets.data() + begin, weights.data() + begin, end - begin};
  }

 private:
  Places(const std::vector<int64_t>& sizes, const int64_t* draw, const std::vector<int64_t>& boxes,
         const std::vector<double>& shares);
  void find_runs();
};

}  // namespace leannorm
