#include "preactivated.hpp"

#include <algorithm>
#include <limits>

#include "scratch.hpp"

namespace leannorm {
namespace {

constexpr int64_t kElement = sizeof(float);

class Preactivated final : public PointwiseInputs {
 public:
  Preactivated(const Kernels& kernels, const PointwisePlan& plan, const Call& call, const Parts& parts,
               const Channels& channels)
      : kernels_(kernels),
        call_(call),
        parts_(parts),
        channels_(channels),
        p_(plan.view()),
        rows_(pointwise_rows(3 * p_.inputs + p_.outputs, kBackwardBlock)),
        sums_(threads_for(std::numeric_limits<int64_t>::max()), p_.inputs) {
    for (int64_t i = 0; i < rows_; ++i) numbers_.push_back(i), offsets_.push_back(i * p_.inputs);
  }

  bool has_gradient() const override { return true; }

  void means(const SampledOutputs& sampled, float* centre) const override {
    const auto count = static_cast<int64_t>(sampled.by_region.size());
    const int threads = threads_for(count * p_.inputs);
    Partials found(threads, p_.inputs);
    parallel(threads, [&](int thread) {
      const Buffers at = buffers();
      std::vector<float> scratch(scratch_size(p_.inputs));
      std::vector<double> sum(p_.inputs), unused(p_.inputs);
      Tensors t{.dtype = Dtype::float32, .activation = {}};
      t.x = at.z;
      each_block(share_of(count, thread, threads), rows_, [&](int64_t first, int64_t n) {
        activate(rows_at(n, [&](int64_t i) { return sampled.by_region[first + i]; }), n, at);
        std::fill(sum.begin(), sum.end(), 0.0);
        std::fill(unused.begin(), unused.end(), 0.0);
        kernels_.moments_sampled_rows(t, p_.inputs, {offsets_.data(), &sampled.weights_by_region[first], n},
                                      {sum.data(), unused.data()}, scratch.data());
        for (int64_t c = 0; c < p_.inputs; ++c) found.first[thread * p_.inputs + c] += sum[c];
      });
    });
    for (int64_t c = 0; c < p_.inputs; ++c) {
      double sum = 0;
      for (int thread = 0; thread < threads; ++thread) sum += found.first[thread * p_.inputs + c];
      centre[c] = static_cast<float>(sum / sampled.count);
    }
  }

  void forward(const Tensors& all, const float* filters, const Channels& channels, const RowPairs& pairs,
               Range rows) const override {
    const Buffers at = buffers();
    each_block(rows, rows_, [&](int64_t first, int64_t n) {
      activate(rows_at(n, [&](int64_t i) { return pairs.input(first + i); }), n, at);
      Tensors t = all;
      t.x = at.z;
      if (!pairs.outputs) t.out = static_cast<float*>(all.out) + first * p_.outputs;
      const RowPairs here{nullptr, pairs.outputs ? pairs.outputs + first : nullptr, false};
      kernels_.pointwise_forward(t, p_, filters, channels, here, 0, n, scratch());
    });
  }

  void backward(const Tensors& all, const float* filters, const float* centre, Range rows, int thread, double* sum_g,
                float* dweight) override {
    const Buffers at = buffers();
    std::vector<float> scratch_of_rows(scratch_size(p_.inputs));
    each_block(rows, rows_, [&](int64_t first, int64_t n) {
      const auto here = rows_at(n, [&](int64_t i) { return first + i; });
      activate(here, n, at);
      Tensors t = all;
      t.x = at.z, t.out = at.dz;
      t.dy = static_cast<const float*>(all.dy) + first * p_.outputs;
      if (all.y) t.y = static_cast<const float*>(all.y) + first * p_.outputs;
      kernels_.pointwise_backward(t, p_, filters, centre, 0, n, sum_g, dweight, scratch());
      through_first(n, thread, at, scratch_of_rows.data());
      here.write(at.dz);
    });
  }

  void correct(const Tensors& all, const float* filters, const float* centre, const Channels& channels,
               const SampledRows& places, Range rows, int thread, float* dweight) override {
    const Buffers at = buffers();
    std::vector<float> scratch_of_rows(scratch_size(p_.inputs));
    each_block(rows, rows_, [&](int64_t first, int64_t n) {
      const auto here = rows_at(n, [&](int64_t i) { return places.positions[first + i]; });
      activate(here, n, at);
      std::fill_n(reinterpret_cast<float*>(at.dz), n * p_.inputs, 0.0f);
      Tensors t = all;
      t.x = at.z, t.out = at.dz;
      const SampledRows sampled{numbers_.data(), places.rows + first, places.weights + first, n, places.sample};
      kernels_.pointwise_correct(t, p_, filters, centre, channels, sampled, 0, n, dweight, scratch());
      through_first(n, thread, at, scratch_of_rows.data());
      here.add(at.dz);
    });
  }

  // Those of the first batch norm.
  const Partials& sums() const { return sums_; }

  // Takes off what the sums make of the first batch norm's sampled rows; its channels have the centre and slope.
  void correct_first(const Places& places, int threads) const {
    over_shares(places.size(), threads, [&](Range share) {
      const Buffers at = buffers();
      Tensors t = call_.tensors;
      t.x = at.x, t.dy = t.out = at.dz;
      each_block(share, rows_, [&](int64_t first, int64_t n) {
        const auto here = rows_at(n, [&](int64_t i) { return places.offsets[first + i] / p_.inputs; });
        here.read(at.x);
        std::fill_n(reinterpret_cast<float*>(at.dz), n * p_.inputs, 0.0f);
        kernels_.correct_rows(t, channels_, p_.inputs, {offsets_.data(), &places.weights[first], n});
        here.add(at.dz);
      });
    });
  }

 private:
  struct Buffers {
    char *x, *z, *dz;  // of a block: the concatenation, what is made of it, the gradient
  };
  Buffers buffers() const {
    const int64_t bytes = rows_ * p_.inputs * kElement;
    char* const x = scratch_of<char, Of::thread>(3 * bytes);
    return {x, x + bytes, x + 2 * bytes};
  }
  float* scratch() const { return scratch_of<float, Of::thread>(pointwise_scratch(p_)); }

  template <class Row>
  PartRows<Row> rows_at(int64_t n, Row row) const {
    return PartRows<Row>(parts_, kElement, n, row);
  }

  template <class Row>
  void activate(const PartRows<Row>& rows, int64_t n, const Buffers& at) const {
    rows.read(at.x);
    Tensors t = call_.tensors;
    t.x = at.x, t.out = at.z;
    kernels_.forward_rows(t, channels_, 0, n, p_.inputs);
  }

  // From the gradient of what was activated to that of the concatenation, in place.
  void through_first(int64_t n, int thread, const Buffers& at, float* scratch_of_rows) {
    Tensors t = call_.tensors;
    t.x = at.x, t.dy = t.out = at.dz;
    kernels_.backward_rows(t, channels_, Backward::fused, 0, n, p_.inputs, sums_.at(thread), scratch_of_rows);
  }

  const Kernels& kernels_;
  const Call& call_;
  const Parts& parts_;
  const Channels channels_;
  const Pointwise p_;
  const int64_t rows_;  // of a block
  std::vector<int64_t> numbers_, offsets_;
  Partials sums_;
};

}  // namespace

void preactivated_forward(const Kernels& kernels, const Plan& first, const PointwisePlan& second, const Call& call,
                          const ConvolutionCall& convolution, const Parts& parts, Moments of_first, Moments of_second,
                          void* sample) {
  const Layout layout(first);
  const Sample places(first, call.draw);
  ChannelBuffers buffers(layout);
  finish_moments(call, moments_of_parts(kernels, call.tensors, parts, layout, *places), {0, layout.channels},
                 of_first.mean, of_first.var, buffers);
  const Preactivated inputs(kernels, second, call, parts, buffers.view());
  pointwise_forward_of(kernels, second, convolution, inputs, sample, of_second.mean, of_second.var);
}

void preactivated_backward(const Kernels& kernels, const Plan& first, const PointwisePlan& second, const Call& call,
                           const ConvolutionCall& convolution, const Parts& parts, Moments of_first,
                           Moments of_second, const void* sample, const PreactivatedGradients& to) {
  const Layout layout(first);
  const Sample places(first, call.draw);
  ChannelBuffers buffers(layout);
  const Range all{0, layout.channels};
  set_point(call, all, of_first.mean, of_first.var, buffers);
  Preactivated inputs(kernels, second, call, parts, buffers.view());
  pointwise_backward_of(kernels, second, convolution, inputs, sample, of_second.mean, of_second.var, to.dweight,
                        to.sum_g_xhat, to.sum_g);
  finish_sums(call, inputs.sums(), all, places->count, of_first.var, to.first_sum_g_xhat, to.first_sum_g, buffers);
  inputs.correct_first(*places, threads_for(layout, *places));
}

}  // namespace leannorm
