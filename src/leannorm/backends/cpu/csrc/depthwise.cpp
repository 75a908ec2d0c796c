#include "depthwise.hpp"

#include <algorithm>
#include <utility>

#include "layout.hpp"
#include "scratch.hpp"

namespace leannorm {
namespace {

LinkRange range_of(const std::vector<Link>& links) { return {links.data(), static_cast<int64_t>(links.size())}; }

int64_t padded(int64_t channels) { return divide_up(channels, kWidestLanes) * kWidestLanes; }

// Tables of a number a tap and channel.
class Filters {
 public:
  explicit Filters(const DepthwisePlan& plan) : plan_(plan), values_(plan.taps * padded(plan.channels)) {}
  const float* data() const { return values_.data(); }

  // Takes the weights of some channels times a factor of each.
  template <class Factor>
  void set(const float* weight, Range channels, Factor factor) {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const double of_channel = factor(c);
      for (int64_t tap = 0; tap < plan_.taps; ++tap)
        values_[tap * padded(plan_.channels) + c] = static_cast<float>(of_channel * weight[c * plan_.taps + tap]);
    }
  }

 private:
  const DepthwisePlan& plan_;
  std::vector<float> values_;
};

}  // namespace

Links::Links(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation)
    : size_(size),
      kernel_(kernel),
      stride_(stride),
      padding_(padding),
      dilation_(dilation),
      outputs_((size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1),
      seen_(outputs_),
      seeing_(size),
      runs_of_seeing_(std::min(stride, size)) {
  for (int64_t output = 0; output < outputs_; ++output)
    for (int64_t tap = 0; tap < kernel; ++tap) {
      const int64_t input = output * stride - padding + tap * dilation;
      if (input < 0 || input >= size) continue;
      seen_[output].push_back({input, tap});
      seeing_[input].push_back({output, tap});
    }
  for (const auto& links : seen_) seen_ranges_.push_back(range_of(links));
  for (const auto& links : seeing_) seeing_ranges_.push_back(range_of(links));
  for (int64_t tap = 0; tap < kernel; ++tap) run_of_seen_.push_back({tap * dilation - padding, tap});
  for (int64_t first = 0; first < std::min(stride, size); ++first) {
    auto& links = runs_of_seeing_[first];
    for (int64_t tap = 0; tap < kernel; ++tap) {
      const int64_t distance = first + padding - tap * dilation;
      if (distance % stride == 0) links.push_back({distance / stride, tap});
    }
    seeing_runs_.push_back({first, stride, divide_up(size - first, stride), 1, range_of(links)});
  }
}

RowLinks Links::as_rows() const {
  const int64_t span = dilation_ * (kernel_ - 1);
  return {size_, outputs_, seen_ranges_.data(), seeing_ranges_.data(), stride_, padding_, span + 1, span / stride_ + 1};
}

ColumnLinks Links::as_columns() const {
  int64_t before = 0, end = outputs_;
  for (const LinkRun& run : seeing_runs_)
    for (int64_t k = 0; k < run.links.count; ++k) {
      before = std::max(before, -run.links.links[k].at);
      end = std::max(end, run.links.links[k].at + run.count);
    }
  const int64_t inputs_end = (outputs_ - 1) * stride_ - padding_ + dilation_ * (kernel_ - 1) + 1;
  return {.size = size_,
          .outputs = outputs_,
          .seen = {0, 1, outputs_, stride_, range_of(run_of_seen_)},
          .seeing = seeing_runs_.data(),
          .seeing_runs = static_cast<int64_t>(seeing_runs_.size()),
          .inputs_before = padding_,
          .inputs_behind = std::max<int64_t>(0, inputs_end - size_),
          .outputs_before = before,
          .outputs_behind = end - outputs_};
}

DepthwisePlan::DepthwisePlan(int64_t samples, int64_t channels, std::array<int64_t, 2> sizes,
                             std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride,
                             std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation,
                             std::vector<int64_t> boxes, std::vector<double> shares, bool drawn)
    : samples(samples),
      channels(channels),
      rows(sizes[0], kernel[0], stride[0], padding[0], dilation[0]),
      columns(sizes[1], kernel[1], stride[1], padding[1], dilation[1]),
      kernel_columns(kernel[1]),
      taps(kernel[0] * kernel[1]),
      regions({samples, rows.outputs(), columns.outputs()}, std::move(boxes), std::move(shares), drawn) {}

Depthwise DepthwisePlan::view() const {
  return {rows.as_rows(), columns.as_columns(), channels, padded(channels), taps, kernel_columns};
}

void depthwise_forward(const Kernels& kernels, const DepthwisePlan& plan, const ConvolutionCall& call, void* sample,
                       float* mean, float* var) {
  const Depthwise d = plan.view();
  std::optional<SampledOutputs> drawn;
  const SampledOutputs& sampled = plan.regions.at(call.draw, drawn);
  const auto count = static_cast<int64_t>(sampled.by_region.size());
  Filters filters(plan);
  std::vector<float> shift(d.padded);
  over_channels(d.channels, count * d.taps * d.channels, [&](Range channels) {
    filters.set(call.weight, channels, [](int64_t) { return 1.0; });
    Tensors t = call.tensors;
    t.out = sample;
    kernels.depthwise_at(t, d, filters.data(), sampled.by_region.data(), count, channels.begin, channels.end);
    const auto moments = sampled_moments(kernels, t.dtype, sample, d.channels, nullptr, sampled, channels);
    const Scale scale{call, var};
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const double average = moments.means[c - channels.begin];
      mean[c] = static_cast<float>(average);
      var[c] = static_cast<float>(moments.variances[c - channels.begin]);
      shift[c] = static_cast<float>((call.beta ? call.beta[c] : 0.0f) - scale(c) * average);
    }
    filters.set(call.weight, channels, scale);
  });
  const int64_t rows = plan.output_rows(), elements = rows * d.columns.outputs * d.channels;
  Tensors t = call.tensors;
  t.stream = streams(t, rows * d.columns.outputs, d.channels);
  over_shares(rows, threads_for(elements), [&](Range range) {
    float* const scratch =
        scratch_of<float, Of::thread>(d.rows.span_of_seen * d.input_row() + d.taps * d.padded + d.output_row());
    kernels.depthwise_forward(t, d, filters.data(), shift.data(), range.begin, range.end, scratch);
  });
}

void depthwise_backward(const Kernels& kernels, const DepthwisePlan& plan, const ConvolutionCall& call,
                        const void* sample, const float* mean, const float* var, float* dweight, float* sum_g_xhat,
                        float* sum_g) {
  const Depthwise d = plan.view();
  std::optional<SampledOutputs> drawn;
  const SampledOutputs& sampled = plan.regions.at(call.draw, drawn);
  const SampledRows places = sampled.view(sample);
  const int64_t rows = plan.output_rows(), elements = rows * d.columns.outputs * d.channels;
  const int threads = threads_for(elements);
  const Scale scale{call, var};
  std::vector<float> values(4 * d.padded);
  float *centre = &values[d.padded], *slope = &values[2 * d.padded], *rstd = &values[3 * d.padded];
  std::copy_n(mean, d.channels, values.begin());
  for (int64_t c = 0; c < d.channels; ++c) rstd[c] = static_cast<float>(scale.rstd(c));
  const Channels channels{values.data(), rstd, nullptr, centre, slope};

  const int64_t table = d.taps * d.padded, size = d.padded + 3 * table;
  double* const totals = scratch_of<double, Of::call>(threads * size);
  std::fill_n(totals, threads * size, 0.0);
  parallel(threads, [&](int thread) {
    const Range range = share_of(rows, thread, threads);
    float* const scratch = scratch_of<float, Of::thread>(size + d.rows.span_of_seen * d.input_row() + d.output_row() +
                                             d.columns.outputs * kWidestLanes);
    kernels.depthwise_sums(call.tensors, d, places, channels, range.begin, range.end, &totals[thread * size], scratch);
  });

  Filters filters(plan);
  const double share = 1 / sampled.count;
  over_channels(d.channels, threads * size, [&](Range range) {
    for (int thread = 1; thread < threads; ++thread)
      for (int64_t k = 0; k < 1 + 3 * d.taps; ++k)
        for (int64_t c = range.begin; c < range.end; ++c)
          totals[k * d.padded + c] += totals[thread * size + k * d.padded + c];
    for (int64_t c = range.begin; c < range.end; ++c) {
      double *p = &totals[d.padded + c], *q = p + table, *r = q + table;
      const float* weight = call.weight + c * d.taps;
      const double dbeta = totals[c];
      double product = 0;
      for (int64_t tap = 0; tap < d.taps; ++tap) {
        p[tap * d.padded] -= dbeta * share * q[tap * d.padded];
        product += weight[tap] * p[tap * d.padded];
      }
      const double dgamma = product * scale.rstd(c), a = scale(c);
      for (int64_t tap = 0; tap < d.taps; ++tap)
        dweight[c * d.taps + tap] =
            static_cast<float>(a * (p[tap * d.padded] - dgamma * share * r[tap * d.padded]));
      sum_g[c] = static_cast<float>(dbeta);
      sum_g_xhat[c] = static_cast<float>(dgamma);
      centre[c] = static_cast<float>(share * dbeta);
      slope[c] = static_cast<float>(share * dgamma);
    }
    filters.set(call.weight, range, scale);
  });

  Tensors t = call.tensors;
  if (!t.out) return;
  t.dresidual = nullptr;
  t.stream = streams(t, plan.samples * d.rows.size * d.columns.size, d.channels);
  over_shares(rows, threads, [&](Range range) {
    float* const scratch =
        scratch_of<float, Of::thread>(d.rows.span_of_seeing * d.output_row() + d.taps * d.padded + d.input_row());
    // the last sample first: its dy is still in the cache
    for (int64_t end = range.end; end > range.begin;) {
      const int64_t begin = std::max(range.begin, (end - 1) / d.rows.outputs * d.rows.outputs);
      kernels.depthwise_backward(t, d, filters.data(), places, channels, begin, end, scratch);
      end = begin;
    }
  });
}

}  // namespace leannorm
