// Pointwise convolutions, a block of rows at a time: see pointwise.hpp.
#pragma once

#include <type_traits>

#include "activations.hpp"
#include "kernels.hpp"
#include "tiles.hpp"

namespace leannorm::LEANNORM_ISA {
namespace {

constexpr int64_t kSummedRows = 32;  // whose g is added up in float before it goes to double

int64_t at_most(int64_t most, int64_t n) { return n < most ? n : most; }

int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// The filters as the right matrix, the part of a thread. Forward: a row an input, a column an output. Else a row an
// output, times its factor, a column an input.
void pointwise_pack(const Pointwise& p, const float* weight, const float* factors, bool forward, int thread,
                    int threads, float* packed) {
  const Panels panels(forward ? p.outputs : p.inputs);
  const int64_t depth = forward ? p.inputs : p.outputs;
  for (int64_t panel = panels.count * thread / threads; panel < panels.count * (thread + 1) / threads; ++panel) {
    const int64_t first = panels.begin(panel), width = panels.width(panel), size = panels.size(panel);
    float* const to = packed + first * depth;
    if (forward) {
      constexpr int64_t kBlock = 16;  // inputs whose part of the panel stays in the first cache
      for (int64_t block = 0; block < depth; block += kBlock)
        for (int64_t c = 0; c < width; ++c)
          for (int64_t d = block; d < at_most(depth, block + kBlock); ++d)
            to[d * width + c] = c < size ? weight[(first + c) * depth + d] : 0;
    } else {
      for (int64_t d = 0; d < depth; ++d)
        each_vector(size, [&](int64_t c, auto lanes) {
          const Vec row = factors[d] * load<Float32>(weight + d * p.inputs + first + c, lanes);
          store<Float32>(to + d * width + c, row, All{});
        });
    }
  }
}

// act(z) of some outputs of rows, from what the convolution gives: `step` apart, that of the i-th for the row output(i).
template <class Output>
void finish(const Tensors& t, const Pointwise& p, const Channels& channels, const float* u, int64_t step, int64_t rows,
            Output output, int64_t first, int64_t size) {
  with_activation(t.activation, [&, around = t.stream](auto act) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t offset = output(i) * p.outputs + first;
      auto *out = at<Float32>(t.out, offset), *kept = at<Float32>(t.dresidual, offset);
      const auto* residual = at<Float32>(t.residual, offset);
      each_vector(size, [&](int64_t c, auto lanes) {
        const auto of = [&](const float* values) { return load<Float32>(values + first + c, All{}); };
        const Vec centred = load<Float32>(u + i * step + c, lanes) - of(channels.mean);
        Vec z = multiply_add(centred, of(channels.scale), of(channels.bias));
        if (residual) z += load<Float32>(residual + c, lanes);
        if (kept) put<Float32>(kept + c, z, around, lanes);
        put<Float32>(out + c, act(z), around, lanes);
      });
    }
  });
}

void pointwise_forward(const Tensors& t, const Pointwise& p, const float* filters, const Channels& channels,
                       const RowPairs& rows, int64_t first, int64_t last, float* scratch) {
  const Panels panels(p.outputs);
  const auto* x = at<Float32>(t.x);
  const int64_t block = pointwise_rows(p.inputs, kForwardBlock), step = pointwise_step(p.inputs);
  alignas(64) float tile[kTileRows * kTileColumns];
  for (int64_t begin = first; begin < last; begin += block) {
    const int64_t count = at_most(block, last - begin), next = begin + count, coming = at_most(block, last - next);
    for (int64_t i = 0; i < count; ++i) {
      const float* const from = x + rows.input(begin + i) * p.inputs;
      each_vector(p.inputs, [&](int64_t c, auto lanes) {
        store<Float32>(scratch + i * step + c, load<Float32>(from + c, lanes), lanes);
      });
    }
    AheadOfTiles ahead(tiles_of(count) * panels.count);
    if (coming > 0 && rows.dense) {
      const int64_t row = rows.output(next), between = rows.output(next + coming - 1) + 1 - row;
      ahead.add(x + row * p.inputs, between * p.inputs);
      if (t.residual) ahead.add(at<Float32>(t.residual, row * p.outputs), between * p.outputs);
    }
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t c = panels.begin(panel), width = panels.width(panel), size = panels.size(panel);
      for (int64_t i = 0; i < count; i += kTileRows) {
        ahead.step();
        multiply<false>(width, p.inputs, {scratch + i * step, step, 1}, filters + c * p.inputs, tile);
        const auto output = [&](int64_t r) { return rows.output(begin + i + r); };
        finish(t, p, channels, tile, width, at_most(kTileRows, count - i), output, c, size);
      }
    }
  }
}

void pointwise_sampled(const Tensors& t, const Pointwise& p, const Channels& channels, const SampledRows& sampled,
                       int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const auto* u = at<Float32>(sampled.sample, sampled.rows[i] * p.outputs);
    finish(t, p, channels, u, 0, 1, [&](int64_t) { return sampled.positions[i]; }, 0, p.outputs);
  }
}

// What rows of gradients do, with the inputs less their centre: fill(first, count, to) writes a block of them, `step` apart, and asks for the next block.
// The filters' gradient is added to; dx, where it is wanted, is written or, of rows that have been written, added to.
template <bool kAdd, class InputRow, class Fill>
void backward_rows(const Tensors& t, const Pointwise& p, const float* filters, const float* centre, int64_t first,
                   int64_t last, float* dweight, float* scratch, InputRow input_row, Fill fill) {
  const Panels panels(p.inputs);
  const int64_t block = pointwise_rows(p.inputs + p.outputs, kBackwardBlock), step = pointwise_step(p.outputs);
  float *const g = scratch, *const x = scratch + block * step;
  alignas(64) float tile[kTileRows * kTileColumns];
  for (int64_t begin = first; begin < last; begin += block) {
    const int64_t count = at_most(block, last - begin);
    AheadOfTiles ahead((tiles_of(count) + tiles_of(p.outputs)) * panels.count);
    fill(begin, count, at_most(block, last - begin - count), g, ahead);
    for (int64_t i = 0; i < count; ++i) {
      const float* const from = at<Float32>(t.x, input_row(begin + i) * p.inputs);
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t c = panels.begin(panel), width = panels.width(panel);
        each_vector(panels.size(panel), [&](int64_t k, auto lanes) {
          const Vec centred = load<Float32>(from + c + k, lanes) - load<Float32>(centre + c + k, All{});
          store<Float32>(x + c * count + i * width + k, centred, All{});
        });
      }
    }
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t c = panels.begin(panel), width = panels.width(panel), size = panels.size(panel);
      for (int64_t n = 0; n < p.outputs; n += kTileRows) {
        ahead.step();
        float* const to = dweight + c * pointwise_padded(p.outputs) + n * width;
        multiply<true>(width, count, {g + n, 1, step}, x + c * count, to);
      }
      for (int64_t i = 0; i < count && t.out; i += kTileRows) {
        ahead.step();
        multiply<false>(width, p.outputs, {g + i * step, step, 1}, filters + c * p.outputs, tile);
        for (int64_t r = 0; r < at_most(kTileRows, count - i); ++r) {
          float* const dx = at<Float32>(t.out, input_row(begin + i + r) * p.inputs + c);
          each_vector(size, [&, around = t.stream](int64_t k, auto lanes) {
            const Vec value = load<Float32>(tile + r * width + k, All{});
            if constexpr (kAdd) store<Float32>(dx + k, load<Float32>(dx + k, lanes) + value, lanes);
            else put<Float32>(dx + k, value, around, lanes);
          });
        }
      }
    }
  }
}

void pointwise_backward(const Tensors& t, const Pointwise& p, const float* filters, const float* centre,
                        int64_t first, int64_t last, double* sum_g, float* dweight, float* scratch) {
  const int64_t step = pointwise_step(p.outputs);
  float* const sums = scratch + pointwise_scratch(p) - step;
  const auto fill = [&](int64_t begin, int64_t count, int64_t coming, float* g, AheadOfTiles& ahead) {
    const int64_t next = begin + count;
    ahead.add(at<Float32>(t.dy, next * p.outputs), coming * p.outputs);
    if (t.y) ahead.add(at<Float32>(t.y, next * p.outputs), coming * p.outputs);
    if (!p.places) ahead.add(at<Float32>(t.x, next * p.inputs), coming * p.inputs);
    const auto flush = [&] {
      for (int64_t c = 0; c < p.outputs; ++c) sum_g[c] += sums[c];
      clear(sums, step);
    };
    clear(sums, step);
    with_activation(t.activation, [&]<class Act>(Act act) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t offset = (begin + i) * p.outputs;
        const auto *dy = at<Float32>(t.dy, offset), *point = at<Float32>(t.y, offset);
        auto* const dresidual = at<Float32>(t.dresidual, offset);
        each_vector(p.outputs, [&](int64_t c, auto lanes) {
          Vec value = load<Float32>(dy + c, lanes);
          if constexpr (!std::is_same_v<Act, Identity>) value = act.backward(value, load<Float32>(point + c, lanes));
          if (dresidual) store<Float32>(dresidual + c, value, lanes);
          store<Float32>(g + i * step + c, value, All{});
          store<Float32>(sums + c, load<Float32>(sums + c, All{}) + value, All{});
        });
        if (i % kSummedRows == kSummedRows - 1) flush();
      }
    });
    flush();
  };
  const auto input_row = [&](int64_t row) { return p.places ? p.places[row] : row; };
  backward_rows<false>(t, p, filters, centre, first, last, dweight, scratch, input_row, fill);
}

void pointwise_correct(const Tensors& t, const Pointwise& p, const float* filters, const float* centre,
                       const Channels& channels, const SampledRows& sampled, int64_t first, int64_t last,
                       float* dweight, float* scratch) {
  const int64_t step = pointwise_step(p.outputs);
  const auto fill = [&](int64_t begin, int64_t count, int64_t, float* g, AheadOfTiles&) {
    for (int64_t i = 0; i < count; ++i) {
      const float* const sample = at<Float32>(sampled.sample, sampled.rows[begin + i] * p.outputs);
      const float weight = sampled.weights[begin + i];
      each_vector(p.outputs, [&](int64_t c, auto lanes) {
        const auto of = [&](const float* values) { return load<Float32>(values + c, All{}); };
        const Vec xhat = (load<Float32>(sample + c, lanes) - of(channels.mean)) * of(channels.scale);
        store<Float32>(g + i * step + c, -weight * multiply_add(of(channels.slope), xhat, of(channels.centre)), All{});
      });
    }
  };
  const auto input_row = [&](int64_t i) {
    const int64_t row = sampled.positions[i];
    return p.places ? p.places[row] : row;
  };
  backward_rows<true>(t, p, filters, centre, first, last, dweight, scratch, input_row, fill);
}

// Calls body(column, offset in the parts, lanes) for an output's filter.
template <class Body>
inline __attribute__((always_inline)) void each_of_filter(const Pointwise& p, int64_t output, Body body) {
  const Panels panels(p.inputs);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t c = panels.begin(panel), offset = c * pointwise_padded(p.outputs) + output * panels.width(panel);
    each_vector(panels.size(panel), [&](int64_t k, auto lanes) { body(c + k, offset + k, lanes); });
  }
}

// The products of filters and their gradients, which lie in a part a thread.
void pointwise_products(const Pointwise& p, const float* weight, const float* parts, int64_t count, int64_t first,
                        int64_t last, double* products) {
  for (int64_t n = first; n < last; ++n) {
    Vec sum{};
    each_of_filter(p, n, [&](int64_t c, int64_t offset, auto lanes) {
      Vec total{};
      for (int64_t i = 0; i < count; ++i) total += load<Float32>(parts + i * pointwise_part(p) + offset, lanes);
      sum = multiply_add(load<Float32>(weight + n * p.inputs + c, lanes), total, sum);
    });
    products[n] = sum_of(sum);
  }
}

// The filters' gradients: the sums of their parts, times a factor.
void pointwise_filters(const Pointwise& p, const float* parts, int64_t count, const float* factors, int64_t first,
                       int64_t last, float* dweight) {
  for (int64_t n = first; n < last; ++n)
    each_of_filter(p, n, [&](int64_t c, int64_t offset, auto lanes) {
      Vec total{};
      for (int64_t i = 0; i < count; ++i) total += load<Float32>(parts + i * pointwise_part(p) + offset, lanes);
      store<Float32>(dweight + n * p.inputs + c, factors[n] * total, lanes);
    });
}

}  // namespace
}  // namespace leannorm::LEANNORM_ISA
