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

class TensorOfInputs final : public PointwiseInputs {
 public:
  TensorOfInputs(const Kernels& kernels, const PointwisePlan& plan, const Tensors& t)
      : kernels_(kernels), plan_(plan), t_(t) {}

  bool has_gradient() const override { return t_.out != nullptr; }

  void means(const SampledOutputs& sampled, float* centre) const override {
    const std::vector<int64_t> rows = inputs_of(plan_, sampled.by_region);
    over_channels(plan_.inputs, static_cast<int64_t>(rows.size()) * plan_.inputs, [&](Range channels) {
      const auto moments = sampled_moments(kernels_, t_.dtype, t_.x, plan_.inputs, rows.data(), sampled, channels);
      std::copy(moments.means.begin(), moments.means.end(), centre + channels.begin);
    });
  }

  void forward(const Tensors& t, const float* filters, const Channels& channels, const RowPairs& pairs,
               Range rows) const override {
    kernels_.pointwise_forward(t, p_, filters, channels, pairs, rows.begin, rows.end, scratch());
  }

  void backward(const Tensors& t, const float* filters, const float* centre, Range rows, int, double* sum_g,
                float* dweight) override {
    kernels_.pointwise_backward(t, p_, filters, centre, rows.begin, rows.end, sum_g, dweight, scratch());
  }

  void correct(const Tensors& t, const float* filters, const float* centre, const Channels& channels,
               const SampledRows& places, Range rows, int, float* dweight) override {
    kernels_.pointwise_correct(t, p_, filters, centre, channels, places, rows.begin, rows.end, dweight, scratch());
  }

 private:
  float* scratch() const { return scratch_of<float, Of::thread>(pointwise_scratch(p_)); }

  const Kernels& kernels_;
  const PointwisePlan& plan_;
  const Tensors& t_;
  const Pointwise p_ = plan_.view();
};

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

void pointwise_forward_of(const Kernels& kernels, const PointwisePlan& plan, const ConvolutionCall& call,
                          const PointwiseInputs& inputs, void* sample, float* mean, float* var) {
  const Pointwise p = plan.view();
  std::optional<SampledOutputs> drawn;
  const SampledOutputs& sampled = plan.regions.at(call.draw, drawn);
  const std::vector<int64_t> rows = inputs_of(plan, sampled.by_region);
  const auto count = static_cast<int64_t>(rows.size());
  float* const filters = scratch_of<float, Of::call>(pointwise_packed(p));
  pack(kernels, p, call.weight, nullptr, true, filters);
  const auto compute = [&](const Tensors& t, const RowPairs& pairs, const Channels& channels, int64_t n) {
    over_shares(n, threads_for(n * p.inputs * p.outputs),
                [&](Range range) { inputs.forward(t, filters, channels, pairs, range); });
  };

  ChannelBuffers values({1, p.outputs, 1, 1, 1});
  std::fill_n(values.scale, p.outputs, 1.0f);
  Tensors plain{.dtype = call.tensors.dtype, .activation = {Kind::identity, 0, 0}};
  plain.x = call.tensors.x;
  plain.out = sample;
  compute(plain, {rows.data(), nullptr, false}, values.view(), count);
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

void pointwise_backward_of(const Kernels& kernels, const PointwisePlan& plan, const ConvolutionCall& call,
                           PointwiseInputs& inputs, const void* sample, const float* mean, const float* var,
                           float* dweight, float* sum_g_xhat, float* sum_g) {
  const Pointwise p = plan.view();
  std::optional<SampledOutputs> drawn;
  const SampledOutputs& sampled = plan.regions.at(call.draw, drawn);
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
  inputs.means(sampled, centre.data());

  float* const filters = scratch_of<float, Of::call>(pointwise_packed(p) + threads * pointwise_part(p));
  float* const parts = filters + pointwise_packed(p);
  if (inputs.has_gradient()) pack(kernels, p, call.weight, factors.data(), false, filters);
  if (t.out) {
    t.stream = streams(t, plan.input_rows, p.inputs);
    if (!plan.places.empty())  // inputs that no output sees
      over_shares(plan.input_rows * p.inputs, threads, [&](Range range) {
        std::fill(static_cast<float*>(t.out) + range.begin, static_cast<float*>(t.out) + range.end, 0.0f);
      });
  }
  std::vector<double> sums(threads * p.outputs), products(p.outputs);
  parallel(threads, [&](int thread) {
    float* const part = &parts[thread * pointwise_part(p)];
    std::fill_n(part, pointwise_part(p), 0.0f);
    inputs.backward(t, filters, centre.data(), share_of(plan.rows, thread, threads), thread, &sums[thread * p.outputs],
                    part);
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
  parallel(threads, [&](int thread) {
    inputs.correct(t, filters, centre.data(), values.view(), places, share_of(places.count, thread, threads), thread,
                   &parts[thread * pointwise_part(p)]);
  });
  over_channels(p.outputs, threads * p.inputs * p.outputs, [&](Range range) {
    kernels.pointwise_filters(p, parts, threads, factors.data(), range.begin, range.end, dweight);
  });
}

void pointwise_forward(const Kernels& kernels, const PointwisePlan& plan, const ConvolutionCall& call, void* sample,
                       float* mean, float* var) {
  pointwise_forward_of(kernels, plan, call, TensorOfInputs(kernels, plan, call.tensors), sample, mean, var);
}

void pointwise_backward(const Kernels& kernels, const PointwisePlan& plan, const ConvolutionCall& call,
                        const void* sample, const float* mean, const float* var, float* dweight, float* sum_g_xhat,
                        float* sum_g) {
  TensorOfInputs inputs(kernels, plan, call.tensors);
  pointwise_backward_of(kernels, plan, call, inputs, sample, mean, var, dweight, sum_g_xhat, sum_g);
}

}  // namespace leannorm
