#include "driver.hpp"

#include <functional>
#include <numeric>
#include <utility>

#include "orders.hpp"

namespace leannorm {

Plan::Plan(bool channels_last, int64_t channels, std::vector<int64_t> sizes, std::vector<int64_t> boxes,
           std::vector<double> shares, bool drawn)
    : channels_last(channels_last),
      channels(channels),
      sizes(std::move(sizes)),
      boxes(std::move(boxes)),
      shares(std::move(shares)) {
  if (!this->boxes.empty() && !drawn) fixed.emplace(places(nullptr));
}

int64_t Plan::spatial() const {
  return std::accumulate(sizes.begin() + 1, sizes.end(), int64_t{1}, std::multiplies<>());
}

Places Plan::places(const int64_t* draw) const {
  return Places(sizes, draw, boxes, shares, [this, n = spatial()](int64_t position) {
    return channels_last ? position * channels : position / n * n * channels + position % n;
  });
}

int64_t Plan::sign_bytes() const {
  constexpr int64_t kReadBeyond = 3;
  const bool whole = channels_last ? rows::begin_at_whole_bytes(*this) : planes::begin_at_whole_bytes(*this);
  return whole ? sizes[0] * channels * spatial() / 8 + kReadBeyond : 0;
}

void batch_norm(const Kernels& kernels, const Plan& plan, const Call& call, float* mean, float* var) {
  (plan.channels_last ? rows::batch_norm : planes::batch_norm)(kernels, plan, call, mean, var);
}

void batch_norm_backward(const Kernels& kernels, const Plan& plan, const Call& call, const float* mean,
                         const float* var, float* sum_g_xhat, float* sum_g) {
  (plan.channels_last ? rows::batch_norm_backward : planes::batch_norm_backward)(kernels, plan, call, mean, var,
                                                                                   sum_g_xhat, sum_g);
}

void normalize(const Kernels& kernels, const Plan& plan, const Call& call, const float* mean, const float* var) {
  (plan.channels_last ? rows::normalize : planes::normalize)(kernels, plan, call, mean, var);
}

void backward_fused(const Kernels& kernels, const Plan& plan, const Call& call, const float* mean, const float* var,
                    float* sum_g_xhat, float* sum_g) {
  (plan.channels_last ? rows::backward_fused : planes::backward_fused)(kernels, plan, call, mean, var, sum_g_xhat,
                                                                       sum_g);
}

}  // namespace leannorm
