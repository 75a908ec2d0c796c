#include "convolution.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "places.hpp"

namespace leannorm {
namespace {

constexpr int64_t kCacheBytes = 8 << 20;  // larger results are written around the caches

}  // namespace

double Scale::rstd(int64_t c) const { return 1 / std::sqrt(var[c] + call.eps); }

bool streams(const Tensors& t, int64_t rows, int64_t width) {
  return rows * width * size_of(t.dtype) > kCacheBytes && has_whole_lines(t, width);
}

SampledRows SampledOutputs::view(const void* sample) const {
  return {positions.data(), rows.data(), weights.data(), static_cast<int64_t>(positions.size()), sample};
}

SampledRegions::SampledRegions(std::vector<int64_t> sizes, std::vector<int64_t> boxes, std::vector<double> shares,
                               bool drawn)
    : sizes_(std::move(sizes)), boxes_(std::move(boxes)), shares_(std::move(shares)) {
  if (!drawn) fixed_ = outputs(nullptr);
}

const SampledOutputs& SampledRegions::at(const int64_t* draw, std::optional<SampledOutputs>& drawn) const {
  return fixed_ ? *fixed_ : drawn.emplace(outputs(draw));
}

SampledOutputs SampledRegions::outputs(const int64_t* draw) const {
  const auto numbers = static_cast<int64_t>(4 * sizes_.size());  // of a region
  SampledOutputs found;
  std::vector<double> weights;
  for (size_t r = 0; r < shares_.size(); ++r) {
    const auto box = boxes_.begin() + r * numbers;
    const Places region(sizes_, draw ? draw + r * sizes_.size() : nullptr, {box, box + numbers}, {1.0},
                        [](int64_t position) { return position; });
    found.by_region.insert(found.by_region.end(), region.offsets.begin(), region.offsets.end());
    weights.insert(weights.end(), region.size(), shares_[r] / region.count);
  }
  const double largest = *std::max_element(weights.begin(), weights.end());
  for (const double weight : weights) found.weights_by_region.push_back(static_cast<float>(weight / largest));
  found.count = std::accumulate(found.weights_by_region.begin(), found.weights_by_region.end(), 0.0);

  std::vector<int64_t> order(weights.size());
  std::iota(order.begin(), order.end(), 0);
  if (shares_.size() > 1)
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return found.by_region[a] < found.by_region[b]; });
  for (const int64_t row : order) {
    if (!found.positions.empty() && found.positions.back() == found.by_region[row]) {
      found.weights.back() += found.weights_by_region[row];
      continue;
    }
    found.positions.push_back(found.by_region[row]);
    found.rows.push_back(row);
    found.weights.push_back(found.weights_by_region[row]);
  }
  return found;
}

SampledMoments sampled_moments(const Kernels& kernels, Dtype dtype, const void* x, int64_t width, const int64_t* rows,
                               const SampledOutputs& sampled, Range channels) {
  const auto count = static_cast<int64_t>(sampled.weights_by_region.size());
  std::vector<int64_t> offsets(count);
  for (int64_t i = 0; i < count; ++i) offsets[i] = (rows ? rows[i] : i) * width;
  Tensors t{.dtype = dtype, .activation = {}};
  t.x = static_cast<const char*>(x) + channels.begin * size_of(dtype);
  SampledMoments found{std::vector<double>(channels.size()), std::vector<double>(channels.size())};
  std::vector<float> scratch(scratch_size(channels.size()));
  kernels.moments_sampled_rows(t, channels.size(), {offsets.data(), sampled.weights_by_region.data(), count},
                               {found.means.data(), found.variances.data()}, scratch.data());
  for (double& sum : found.means) sum /= sampled.count;
  for (double& square : found.variances) square /= sampled.count;
  return found;
}

}  // namespace leannorm
