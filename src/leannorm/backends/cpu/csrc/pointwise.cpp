#include "pointwise.hpp"

#include <algorithm>
#include <optional>
#include <utility>

#include "layout.hpp"
#include "scratch.hpp"

namespace leannorm {
namespace {

void pack(const Kernels& kernels, const Pointwise& p, const float* weight, const float* factors, bool forward,
          float* packed) {
  const int threads = threads_for(p.inputs * p.outputs);
  parallel(threads, [&](int thread) { kernels.pointwise_pack(p, weight, factors, forward, thread, threads, packed); });
}

// The rows of the input that sampled outputs see.
std::vector<int64_t> inputs_of(const PointwisePlan& plan, std::vector<int64_t> positions) {
  if (!plan.places.empty())
    for (int64_t& position : positions) position = plan.places[position];
  return positions;
}

}  // namespace

PointwisePlan::PointwisePlan(int64_t samples, int64_t inputs, int64_t outputs, std::array<int64_t, 2> sizes,
                             std::array<int64_t, 2> stride, std::vector<int64_t> boxes, std::vector<double> shares,
                             bool drawn)
    : rows(samples * divide_up(sizes[0], stride[0]) * divide_up(sizes[1], stride[1])),
      inputs(inputs),
      outputs(outputs),
      input_rows(samples * sizes[0] * sizes[1]),
      regions({samples, divide_up(sizes[0], stride[0]), divide_up(sizes[1], stride[1])}, std::move(boxes),
              std::move(shares), drawn) {
  for (int64_t line = 0; rows != input_rows && line < samples * sizes[0]; ++line)
    for (int64_t column = 0; line % sizes[0] % stride[0] == 0 && column < sizes[1]; column += stride[1])
      places.push_back(line * sizes[1] + column);
  std::optional<SampledOutputs> unused;
  if (!drawn) fixed_ = rest(regions.at(nullptr, unused));
}

const PointwisePlan::Rest& PointwisePlan::rest(const SampledOutputs& sampled, std::optional<Rest>& drawn) const {
  return fixed_ ? *fixed_ : drawn.emplace(rest(sampled));
}

PointwisePlan::Rest PointwisePlan::rest(const SampledOutputs& sampled) const {
  Rest found;
  found.outputs.reserve(rows);
  auto next = sampled.positions.begin();
  for (int64_t row = 0; row < rows; ++row)
    if (next != sampled.positions.end() && *next == row) ++next;
    else found.outputs.push_back(row);
  if (!places.empty()) found.inputs = inputs_of(*this, found.outputs);
  return found;
}

Pointwise PointwisePlan::view() const { return {inputs, outputs, places.empty() ? nullptr : places.data()}; }

void pointwise_forward(const Kernels& kernels, const PointwisePlan& plan, const ConvolutionCall& call, void* sample,
                       float* mean, float* var) {
  const Pointwise p = plan.view();
  std::optional<SampledOutputs> drawn;
  const SampledOutputs& sampled = plan.regions.at(call.draw, drawn);
  const std::vector<int64_t> inputs = inputs_of(plan, sampled.by_region);
  const auto count = static_cast<int64_t>(inputs.size());
  float* const filters = scratch_of<float, Of::call>(pointwise_packed(p));
  pack(kernels, p, call.weight, nullptr, true, filters);
  const auto compute = [&](const Tensors& t, const RowPairs& pairs, const Channels& channels, int64_t rows) {
    over_shares(rows, threads_for(rows * p.inputs * p.outputs), [&](Range range) {
      float* const scratch = scratch_of<float, Of::thread>(pointwise_scratch(p));
      kernels.pointwise_forward(t, p, filters, channels, pairs, range.begin, range.end, scratch);
    });
  };

  ChannelBuffers values({1, p.outputs, 1, 1, 1});
  std::fill_n(values.scale, p.outputs, 1.0f);
  Tensors plain{.dtype = call.tensors.dtype, .activation = {Kind::identity, 0, 0}};
  plain.x = call.tensors.x;
  plain.out = sample;
  compute(plain, {inputs.data(), nullptr, false}, values.view(), count);
  const Scale scale{call, var};
  over_channels(p.outputs, count * p.outputs, [&](Range channels) {
    const auto moments = sampled_moments(kernels, plain.dtype, sample, p.outputs, nullptr, sampled, channels);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const double average = moments.means[c - channels.begin];
      values.mean[c] = mean[c] = static_cast<float>(average);
      var[c] = static_cast<float>(moments.variances[c - channels.begin]);
      values.scale[c] = static_cast<float>(scale(c));
      values.bias[c] = static_cast<float>((call.beta ? call.beta[c] : 0.0f) - scale(c) * (average - mean[c]));
    }
  });
  Tensors t = call.tensors;
  t.stream = streams(t, plan.rows, p.outputs);
  const SampledRows places = sampled.view(sample);
  over_shares(places.count, threads_for(places.count * p.outputs), [&](Range range) {
    kernels.pointwise_sampled(t, p, values.view(), places, range.begin, range.end);
  });
  std::optional<PointwisePlan::Rest> rest_of_draw;
  const PointwisePlan::Rest& rest = plan.rest(sampled, rest_of_draw);
  const bool strided = !plan.places.empty();
  compute(t, {strided ? rest.inputs.data() : rest.outputs.data(), rest.outputs.data(), !strided}, values.view(),
          static_cast<int64_t>(rest.outputs.size()));
}

void pointwise_backward(const Kernels& kernels, const PointwisePlan& plan, const ConvolutionCall& call,
                        const void* sample, const float* mean, const float* var, float* dweight, float* sum_g_xhat,
                        float* sum_g) {
  const Pointwise p = plan.view();
  std::optional<SampledOutputs> drawn;
  const SampledOutputs& sampled = plan.regions.at(call.draw, drawn);
  const std::vector<int64_t> rows = inputs_of(plan, sampled.by_region);
  const SampledRows places = sampled.view(sample);
  const int threads = threads_for(plan.rows * p.inputs * p.outputs);
  const Scale scale{call, var};
  Tensors t = call.tensors;
  ChannelBuffers values({1, p.outputs, 1, 1, 1});
  std::vector<float> factors(p.outputs), centre(divide_up(p.inputs, kWidestLanes) * kWidestLanes);
  for (int64_t c = 0; c < p.outputs; ++c) {
    values.mean[c] = mean[c];
    values.scale[c] = static_cast<float>(scale.rstd(c));
    factors[c] = static_cast<float>(scale(c));
  }
  over_channels(p.inputs, places.count * p.inputs, [&](Range channels) {
    const auto moments =
        sampled_moments(kernels, t.dtype, call.tensors.x, p.inputs, rows.data(), sampled, channels);
    std::copy(moments.means.begin(), moments.means.end(), centre.begin() + channels.begin);
  });

  float* const filters = scratch_of<float, Of::call>(pointwise_packed(p) + threads * pointwise_part(p));
  float* const parts = filters + pointwise_packed(p);
  if (t.out) {
    pack(kernels, p, call.weight, factors.data(), false, filters);
    t.stream = streams(t, plan.input_rows, p.inputs);
    if (!plan.places.empty())  // inputs that no output sees
      over_shares(plan.input_rows * p.inputs, threads, [&](Range range) {
        std::fill(static_cast<float*>(t.out) + range.begin, static_cast<float*>(t.out) + range.end, 0.0f);
      });
  }
  std::vector<double> sums(threads * p.outputs), products(p.outputs);
  const auto each_part = [&](int64_t n, auto body) {
    parallel(threads, [&](int thread) {
      body(share_of(n, thread, threads), thread, &parts[thread * pointwise_part(p)],
           scratch_of<float, Of::thread>(pointwise_scratch(p)));
    });
  };
  each_part(plan.rows, [&](Range range, int thread, float* part, float* scratch) {
    std::fill_n(part, pointwise_part(p), 0.0f);
    kernels.pointwise_backward(t, p, filters, centre.data(), range.begin, range.end, &sums[thread * p.outputs], part,
                               scratch);
  });
  const double share = 1 / sampled.count;
  over_channels(p.outputs, threads * p.inputs * p.outputs, [&](Range range) {
    kernels.pointwise_products(p, call.weight, parts, threads, range.begin, range.end, products.data());
    for (int64_t c = range.begin; c < range.end; ++c) {
      double dbeta = 0;
      for (int thread = 0; thread < threads; ++thread) dbeta += sums[thread * p.outputs + c];
      const double dgamma = products[c] * scale.rstd(c);
      sum_g[c] = static_cast<float>(dbeta);
      sum_g_xhat[c] = static_cast<float>(dgamma);
      values.centre[c] = static_cast<float>(share * dbeta);
      values.slope[c] = static_cast<float>(share * dgamma);
    }
  });
  each_part(places.count, [&](Range range, int, float* part, float* scratch) {
    kernels.pointwise_correct(t, p, filters, centre.data(), values.view(), places, range.begin, range.end, part,
                              scratch);
  });
  over_channels(p.outputs, threads * p.inputs * p.outputs, [&](Range range) {
    kernels.pointwise_filters(p, parts, threads, factors.data(), range.begin, range.end, dweight);
  });
}

}  // namespace leannorm
