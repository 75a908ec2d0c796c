// Depthwise convolutions, a row of outputs at a time: see depthwise.hpp. Memory is read and written in its order;
// between that, rows lie in buffers.
#pragma once

#include <type_traits>

#include "activations.hpp"
#include "depthwise_rows.hpp"
#include "kernels.hpp"

namespace leannorm::LEANNORM_ISA {
namespace {

// Calls body(place in the row, offset in memory, lanes) in memory's order.
template <class Body>
inline __attribute__((always_inline)) void each_in_order(Row row, int64_t channels, Body body) {
  const int64_t positions = row.before + row.count + row.behind;
  float* place = row.at(0, 0);
  for (int64_t i = 0, k = 0; i < row.count; ++i, k += channels, place += kLanes)
    each_vector(channels, [=](int64_t c, auto lanes) { body(place + c * positions, k + c, lanes); });
}

// Inputs in buffers: each row is read when an output sees it first.
template <class T>
class Inputs {
 public:
  Inputs(const Depthwise& d, const void* x, float* scratch)
      : d_(d), x_(at<T>(x)), ring_(scratch, d.rows.span_of_seen, d.input_row(), inputs_at(d, nullptr), d.padded) {}

  // Those that a row of outputs, counted over all samples, sees.
  LinkedRows seen_by(int64_t row) {
    const LinkRange range = d_.rows.seen[row % d_.rows.outputs];
    const int64_t before = row / d_.rows.outputs * d_.rows.size;
    for (int64_t i = 0; i < range.count; ++i) fetch(before, range.links[i].at);
    return {range, ring_};
  }

  // Those that the row behind it sees first.
  void add_to(Ahead& ahead, int64_t row) const {
    const int64_t next = row + 1, rows = d_.rows.stride < d_.rows.span_of_seen ? d_.rows.stride : d_.rows.span_of_seen;
    const LinkRange range = d_.rows.seen[next % d_.rows.outputs];
    if (range.count == 0) return;
    const int64_t last = next / d_.rows.outputs * d_.rows.size + range.links[range.count - 1].at;
    ahead.add(x_ + (last - rows + 1) * d_.columns.size * d_.channels, rows * d_.columns.size * d_.channels);
  }

 private:
  void fetch(int64_t before, int64_t row) {
    const int64_t place = row % d_.rows.span_of_seen, counted = before + row + 1;
    if (place < kMostTaps) {
      if (there_[place] == counted) return;
      there_[place] = counted;
    }
    const auto* x = x_ + (before + row) * d_.columns.size * d_.channels;
    each_in_order(ring_.row(row), d_.channels, [=](float* to, int64_t k, auto lanes) {
      store<Float32>(to, load<T>(x + k, lanes), All{});
    });
  }

  const Depthwise& d_;
  const typename T::Scalar* x_;
  Ring ring_;
  int64_t there_[kMostTaps]{};  // the row, counted over all samples, from 1, in each place of the ring
};

// The taps of one output, for some of the channels.
template <class T>
struct TapsOfOutput {
  const typename T::Scalar* sources[kMostTaps];
  const float* values[kMostTaps];
  int count;

  // Asks for the sources.
  void set(const Depthwise& d, const void* x, const float* filters, int64_t position, int64_t begin, int64_t channels) {
    const int64_t row = position / d.columns.outputs, column = position % d.columns.outputs;
    const LinkRange rows = d.rows.seen[row % d.rows.outputs], columns = d.columns.seen.links;
    const auto* image = at<T>(x, row / d.rows.outputs * d.rows.size * d.columns.size * d.channels);
    constexpr int64_t kLine = 64 / sizeof *image;
    count = 0;
    for (int64_t r = 0; r < rows.count; ++r)
      for (int64_t k = 0; k < columns.count; ++k) {
        const int64_t input = column * d.columns.seen.stride + columns.links[k].at;
        if (input < 0 || input >= d.columns.size) continue;
        sources[count] = image + (rows.links[r].at * d.columns.size + input) * d.channels + begin;
        values[count] = filters + (rows.links[r].tap * d.kernel_columns + columns.links[k].tap) * d.padded + begin;
        for (int64_t c = 0; c < channels; c += kLine) prefetch(sources[count] + c);
        ++count;
      }
  }
};

// The channels [begin, end) of the convolution at some positions, into the rows of tensors.out.
void depthwise_at(const Tensors& t, const Depthwise& d, const float* filters, const int64_t* positions, int64_t count,
                  int64_t begin, int64_t end) {
  constexpr int64_t kAheadOutputs = 4;
  with_dtype(t.dtype, [&]<class T>(T) {
    TapsOfOutput<T> outputs[kAheadOutputs];
    for (int64_t i = 0; i < count + kAheadOutputs; ++i) {
      auto& taps = outputs[i % kAheadOutputs];
      if (i >= kAheadOutputs) {
        auto* out = at<T>(t.out, (i - kAheadOutputs) * d.channels + begin);
        each_vector(end - begin, [&](int64_t c, auto lanes) {
          Vec u{};
          for (int k = 0; k < taps.count; ++k)
            u = multiply_add(load<T>(taps.sources[k] + c, lanes), load<Float32>(taps.values[k] + c, All{}), u);
          store<T>(out + c, u, lanes);
        });
      }
      if (i < count) taps.set(d, t.x, filters, positions[i], begin, end - begin);
    }
  });
}

void depthwise_forward(const Tensors& t, const Depthwise& d, const float* filters, const float* shift, int64_t first,
                       int64_t last, float* scratch) {
  float* const table = scratch + d.rows.span_of_seen * d.input_row();
  const Row buffer = outputs_at(d, table + d.taps * d.padded);
  copy_table(d, filters, table);
  with_dtype(t.dtype, [&]<class T>(T) {
    Inputs<T> inputs(d, t.x, scratch);
    for (int64_t row = first; row < last; ++row) {
      const LinkedRows linked = inputs.seen_by(row);
      Ahead ahead(d.columns.outputs * d.padded / kLanes);
      inputs.add_to(ahead, row);
      for (int64_t c = 0; c < d.channels; c += kLanes)
        convolve(d, d.columns.seen, linked, c, table, load<Float32>(shift + c, All{}), buffer, ahead);
      const int64_t offset = row * d.columns.outputs * d.channels;
      auto *out = at<T>(t.out, offset), *kept = at<T>(t.dresidual, offset);
      const auto* residual = at<T>(t.residual, offset);
      with_activation(t.activation, [&, stream = t.stream](auto act) {
        each_in_order(buffer, d.channels, [=](const float* place, int64_t k, auto lanes) {
          Vec z = load<Float32>(place, All{});
          if (residual) z += load<T>(residual + k, lanes);
          if (kept) put<T>(kept + k, z, stream, lanes);
          put<T>(out + k, act(z), stream, lanes);
        });
      });
    }
  });
}

// Those of a row's positions that are sampled.
class SampledOfRow {
 public:
  SampledOfRow(const SampledRows& sampled, int64_t row, int64_t count)
      : sampled_(sampled), start_(row * count), begin_(reached(start_)), end_(reached(start_ + count)) {}

  // Calls body(column, weight, row in the sample).
  template <class Body>
  void each(Body body) const {
    for (int64_t i = begin_; i < end_; ++i)
      body(sampled_.positions[i] - start_, sampled_.weights[i], sampled_.rows[i]);
  }

 private:
  int64_t reached(int64_t position) const {
    int64_t begin = 0, end = sampled_.count;
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (sampled_.positions[middle] < position) begin = middle + 1;
      else end = middle;
    }
    return begin;
  }

  const SampledRows& sampled_;
  int64_t start_, begin_, end_;
};

// g of a row of outputs, counted over all samples, into a buffer; y is where act' is taken.
template <class T>
void gradient_of_row(const Tensors& t, const Depthwise& d, int64_t row, Row g) {
  const int64_t offset = row * d.columns.outputs * d.channels;
  const auto *dy = at<T>(t.dy, offset), *point = at<T>(t.y, offset);
  auto* dresidual = at<T>(t.dresidual, offset);
  with_activation(t.activation, [&]<class Act>(Act act) {
    each_in_order(g, d.channels, [=](float* place, int64_t k, auto lanes) {
      Vec value = load<T>(dy + k, lanes);
      if constexpr (!std::is_same_v<Act, Identity>) value = act.backward(value, load<T>(point + k, lanes));
      if (dresidual) store<T>(dresidual + k, value, lanes);
      store<Float32>(place, value, All{});
    });
  });
}

// What gradient_of_row reads of the row behind it.
template <class T>
void add_gradient(Ahead& ahead, const Tensors& t, const Depthwise& d, int64_t row) {
  const int64_t elements = d.columns.outputs * d.channels;
  ahead.add(at<T>(t.dy, (row + 1) * elements), elements);
  ahead.add(at<T>(t.y, (row + 1) * elements), elements);
}

// xhat of a sampled position, as far as channels.scale is 1 / sigma.
template <class T, class Lanes>
Vec normalized(const SampledRows& sampled, int64_t row, const Channels& channels, int64_t width, int64_t c,
               Lanes lanes) {
  const Vec u = load<T>(at<T>(sampled.sample, row * width + c), lanes);
  return (u - load<Float32>(channels.mean + c, All{})) * load<Float32>(channels.scale + c, All{});
}

// dbeta, P, Q and R of rows of outputs are added to totals, one behind the other; g goes to dresidual.
void depthwise_sums(const Tensors& t, const Depthwise& d, const SampledRows& sampled, const Channels& channels,
                    int64_t first, int64_t last, double* totals, float* scratch) {
  const int64_t table = d.taps * d.padded, size = d.padded + 3 * table;
  float *sum_g = scratch, *p = scratch + d.padded, *q = p + table, *r = q + table, *inputs_begin = scratch + size;
  const Row g = outputs_at(d, inputs_begin + d.rows.span_of_seen * d.input_row());
  float* const weighted = g.begin + d.output_row();
  const auto flush = [&] {
    for (int64_t c = 0; c < d.padded; ++c) totals[c] += sum_g[c];
    for (int64_t kind = 0; kind < 3; ++kind)
      each_of_table(d, [to = totals + d.padded + kind * table, from = p + kind * table](int64_t i, int64_t k) {
        for (int64_t l = 0; l < kLanes; ++l) to[i + l] += from[k + l];
      });
    clear(scratch, size);
  };
  clear(scratch, size);
  int64_t added = 0;
  with_dtype(t.dtype, [&]<class T>(T) {
    Inputs<T> inputs(d, t.x, inputs_begin);
    for (int64_t row = first; row < last; ++row) {
      const LinkedRows linked = inputs.seen_by(row);
      const SampledOfRow places(sampled, row, d.columns.outputs);
      gradient_of_row<T>(t, d, row, g);
      Ahead ahead(d.columns.outputs * d.padded / kLanes);
      inputs.add_to(ahead, row);
      add_gradient<T>(ahead, t, d, row);
      each_vector(d.channels, [&](int64_t c, auto lanes) {
        Vec sum{};
        for (int64_t i = 0; i < d.columns.outputs; ++i) sum += load<Float32>(g.at(c, i), All{});
        add_to(sum_g + c, sum);
        correlate(d, d.columns.seen, linked, c, g, p, ahead);
        int64_t columns[kSumBlock];
        float weights[kSumBlock];
        int64_t n = 0;
        const auto add = [&] {
          if (n) correlate_sampled(d, {columns, weights, weighted, n}, linked, c, q, r);
          n = 0;
        };
        places.each([&](int64_t column, float weight, int64_t sample_row) {
          const Vec xhat = normalized<T>(sampled, sample_row, channels, d.channels, c, lanes);
          columns[n] = column, weights[n] = weight;
          store<Float32>(weighted + n * kLanes, weight * xhat, All{});
          if (++n == kSumBlock) add();
        });
        add();
      });
      if ((added += d.columns.outputs) >= kSumBlock) flush(), added = 0;
    }
  });
  flush();
}

// dx of the inputs that rows of outputs are the last to see.
void depthwise_backward(const Tensors& t, const Depthwise& d, const float* filters, const SampledRows& sampled,
                        const Channels& channels, int64_t first, int64_t last, float* scratch) {
  const int64_t span = d.rows.span_of_seeing;
  const Ring ring(scratch, span, d.output_row(), outputs_at(d, nullptr), d.padded);
  float* const table = scratch + span * d.output_row();
  const Row buffer = inputs_at(d, table + d.taps * d.padded);
  copy_table(d, filters, table);
  with_dtype(t.dtype, [&]<class T>(T) {
    const auto fill = [&](int64_t sample, int64_t output) {
      const int64_t row = sample * d.rows.outputs + output;
      const Row g = ring.row(output);
      gradient_of_row<T>(t, d, row, g);
      SampledOfRow(sampled, row, d.columns.outputs).each([&](int64_t column, float weight, int64_t sample_row) {
        each_vector(d.channels, [&](int64_t c, auto lanes) {
          const Vec xhat = normalized<T>(sampled, sample_row, channels, d.channels, c, lanes);
          const Vec slope = load<Float32>(channels.slope + c, All{});
          const Vec correction = multiply_add(slope, xhat, load<Float32>(channels.centre + c, All{}));
          add_to(g.at(c, column), -weight * correction);
        });
      });
    };
    const auto write = [&](int64_t sample, int64_t input, const Ahead& ahead) {
      const LinkedRows linked(d.rows.seeing[input], ring);
      for (int64_t c = 0; c < d.channels; c += kLanes)
        for (int64_t run = 0; run < d.columns.seeing_runs; ++run)
          convolve(d, d.columns.seeing[run], linked, c, table, Vec{}, buffer, ahead);
      auto* dx = at<T>(t.out, (sample * d.rows.size + input) * d.columns.size * d.channels);
      each_in_order(buffer, d.channels, [=, stream = t.stream](const float* place, int64_t k, auto lanes) {
        put<T>(dx + k, load<Float32>(place, All{}), stream, lanes);
      });
    };
    for (int64_t row = first; row < last;) {
      const int64_t sample = row / d.rows.outputs, begin = row % d.rows.outputs;
      const int64_t rest = d.rows.outputs - begin, end = begin + (last - row < rest ? last - row : rest);
      for (int64_t output = begin < span ? 0 : begin - span + 1; output < begin; ++output) fill(sample, output);
      int64_t next = begin ? d.rows.complete(begin - 1) : 0;
      for (int64_t output = begin; output < end; ++output) {
        fill(sample, output);
        Ahead ahead(d.columns.size * d.padded / kLanes);
        add_gradient<T>(ahead, t, d, sample * d.rows.outputs + output);
        for (const int64_t complete = d.rows.complete(output); next < complete; ++next) {
          write(sample, next, ahead);
          ahead = Ahead(0);  // the first has asked for all
        }
      }
      row += end - begin;
    }
  });
}

}  // namespace
}  // namespace leannorm::LEANNORM_ISA
