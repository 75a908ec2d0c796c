#include "places.hpp"

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>

namespace leannorm {
namespace {

struct Place {
  int64_t position;
  double weight;
};

void append(std::vector<Place>& places, const std::vector<int64_t>& sizes, const int64_t* draw, const int64_t* box,
            double share) {
  const size_t dimensions = sizes.size();
  std::vector<int64_t> inner{0};  // positions spanned by the dimensions behind the present one
  int64_t stride = 1, count = 1;
  for (size_t d = dimensions; d-- > 0;) {
    const auto [start, span, n, step] = std::array{box[4 * d], box[4 * d + 1], box[4 * d + 2], box[4 * d + 3]};
    const int64_t origin = start + (draw ? draw[d] % span : 0);
    std::vector<int64_t> outer;
    outer.reserve(inner.size() * n);
    for (int64_t i = 0; i < n; ++i)
      for (const int64_t position : inner) outer.push_back((origin + i * step) * stride + position);
    inner = std::move(outer);
    stride *= sizes[d];
    count *= n;
  }
  for (const int64_t position : inner) places.push_back({position, share / count});
}

}  // namespace

Places::Places(const std::vector<int64_t>& sizes, const int64_t* draw, const std::vector<int64_t>& boxes,
               const std::vector<double>& shares) {
  std::vector<Place> places;
  const size_t dimensions = sizes.size();
  for (size_t r = 0; r < shares.size(); ++r)
    append(places, sizes, draw ? draw + r * dimensions : nullptr, &boxes[4 * dimensions * r], shares[r]);
  double largest = 0;
  for (const Place& place : places) largest = std::max(largest, place.weight);
  if (shares.size() > 1)
    std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.position < b.position; });
  offsets.reserve(places.size());
  weights.reserve(places.size());
  for (const Place& place : places) {
    const auto weight = static_cast<float>(place.weight / largest);
    if (!offsets.empty() && offsets.back() == place.position) {
      weights.back() += weight;
    } else {
      offsets.push_back(place.position);
      weights.push_back(weight);
    }
  }
  count = std::accumulate(weights.begin(), weights.end(), 0.0);
}

void Places::find_runs() {
  constexpr size_t kLong = 8;  // positions in a run, on the average
  if (std::any_of(weights.begin(), weights.end(), [](float weight) { return weight != 1; })) return;
  for (const int64_t offset : offsets) {
    if (!runs.empty() && offset == runs.back().offset + runs.back().length) {
      ++runs.back().length;
    } else {
      runs.push_back({offset, 1});
    }
  }
  if (offsets.size() < kLong * runs.size()) runs.clear();
}

}  // namespace leannorm
