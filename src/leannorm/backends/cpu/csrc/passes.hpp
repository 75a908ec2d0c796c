// Forward and backward of some rows or of a stretch of a plane: what all kernels of batch norm itself consist of.
#pragma once

#include "activations.hpp"
#include "blocks.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace leannorm::LEANNORM_ISA {
namespace {

// A channel's value for each lane: read from memory in channels-last, the same one in a plane.

struct PerLane {
  const float* p;
  Vec operator()(int64_t i) const { return load<Float32>(p + i, All{}); }
};

struct Uniform {
  Vec v;
  Uniform(const float* p, int64_t channel) : v(broadcast(p[channel])) {}
  Vec operator()(int64_t) const { return v; }
};

template <class Value>
struct Point {
  Value mean, scale, bias, centre, slope;
};

Channels from(const Channels& c, int64_t channel) {
  return {c.mean + channel, c.scale + channel, c.bias + channel, c.centre + channel, c.slope + channel};
}

Point<PerLane> point_of(const Channels& c) { return {{c.mean}, {c.scale}, {c.bias}, {c.centre}, {c.slope}}; }

Point<Uniform> point_of(const Channels& c, int64_t channel) {
  return {{c.mean, channel}, {c.scale, channel}, {c.bias, channel}, {c.centre, channel}, {c.slope, channel}};
}

struct LaneSums {
  float *g, *g_centred;
  void add(int64_t i, Vec a, Vec b) {
    store<Float32>(g + i, PerLane{g}(i) + a, All{});
    store<Float32>(g_centred + i, PerLane{g_centred}(i) + b, All{});
  }
};

struct PlaneSums {
  Vec g{}, g_centred{};
  void add(int64_t, Vec a, Vec b) {
    g += a;
    g_centred += b;
  }
};

// Rows of n elements that are taken together: where they begin, their weights, and what will be wanted a while later.
// That is asked for ahead of time, since the hardware's prefetching ends at each page.

struct Adjacent {
  int64_t offset, n, ahead;
  int64_t begin(int r) const { return offset + r * n; }
  int64_t later(int r) const { return begin(r) + ahead; }
  int64_t outer(int r) const { return begin(r); }  // of y and dy
  int64_t outer_later(int r) const { return later(r); }
  static float weight(int) { return 1.0f; }
};

struct Scattered {
  const int64_t *offsets, *later_offsets;
  const float* weights;
  int64_t begin(int r) const { return offsets[r]; }
  int64_t later(int r) const { return later_offsets[r]; }
  int64_t outer(int r) const { return begin(r); }
  int64_t outer_later(int r) const { return later(r); }
  float weight(int r) const { return weights[r]; }
};

struct AdjacentColumns {
  const Columns& columns;
  int64_t row, ahead;
  int64_t begin(int r) const { return (row + r) * columns.size; }
  int64_t later(int r) const { return begin(r) + ahead * columns.size; }
  int64_t outer(int r) const { return (row + r) * columns.width + columns.first; }
  int64_t outer_later(int r) const { return outer(r) + ahead * columns.width; }
  static float weight(int) { return 1.0f; }
};

struct ScatteredColumns {
  const Columns& columns;
  const int64_t *rows, *later_rows;
  const float* weights;
  int64_t begin(int r) const { return rows[r] * columns.size; }
  int64_t later(int r) const { return later_rows[r] * columns.size; }
  int64_t outer(int r) const { return rows[r] * columns.width + columns.first; }
  int64_t outer_later(int r) const { return later_rows[r] * columns.width + columns.first; }
  float weight(int r) const { return weights[r]; }
};

// Forward and backward are inlined: a call for each small plane would cost as much as its work.

template <class T, bool kResidual, class Act, class Value, class Place, class Rows>
inline __attribute__((always_inline))
void forward(const Tensors& t, const Act& act, const Point<Value>& point, const Place& place, int64_t n, Rows rows) {
  const auto *x = at<T>(t.x), *residual = at<T>(t.residual);
  auto* y = at<T>(t.out);
  uint8_t* const signs = t.signs;
  const bool around_caches = t.stream;
  each_vector(n, [&](int64_t i, auto lanes) {
    const Vec mean = point.mean(i), scale = point.scale(i), bias = point.bias(i);
#pragma GCC unroll kRows
    for (int r = 0; r < rows.value; ++r) {
      const int64_t k = place.begin(r) + i, later = place.later(r) + i;
      prefetch(x + later);
      Vec z = multiply_add(load<T>(x + k, lanes) - mean, scale, bias);
      if constexpr (kResidual) {
        prefetch(residual + later);
        z += load<T>(residual + k, lanes);
      }
      const Vec value = act(z);
      put<T>(y + place.outer(r) + i, value, around_caches, lanes);
      if constexpr (kResidual && Act::kTakesOutput)
        if (signs) store_bits(signs, k, bits_where(act.is_one(T::unpack(T::pack(value)))), lanes);
    }
  });
}

// Calls body<T, kResidual>(activation).
template <class Body>
void with_forward(const Tensors& t, Body body) {
  with_dtype(t.dtype, [&]<class T>(T) {
    with_activation(t.activation, [&](auto act) {
      if (t.residual) body.template operator()<T, true>(act);
      else body.template operator()<T, false>(act);
    });
  });
}

// Backward

// What tells act' beside x: nothing; the residual, or the output where the activation takes it; or the signs.
enum class Extra { none, tensor, signs };

template <class T, Extra kExtra, class Act>
struct Gradient {
  const Act& act;
  const typename T::Scalar *dy, *extra;
  const uint8_t* signs;

  Gradient(const Tensors& t, const Act& act)
      : act(act), dy(at<T>(t.dy)), extra(at<T>(Act::kTakesOutput ? t.y : t.residual)), signs(t.signs) {}

  void ask_for(int64_t k) const {
    prefetch(dy + k);
    if constexpr (kExtra == Extra::tensor) prefetch(extra + k);
  }

  template <class Lanes>
  Vec operator()(int64_t k, Lanes lanes, Vec centred, Vec scale, Vec bias) const {
    const Vec incoming = load<T>(dy + k, lanes);
    if constexpr (kExtra == Extra::signs) return act.backward_where(incoming, where_bits(load_bits(signs, k)));
    else if constexpr (kExtra == Extra::tensor && Act::kTakesOutput)
      return act.backward(incoming, load<T>(extra + k, lanes));
    else {
      Vec z = multiply_add(centred, scale, bias);
      if constexpr (kExtra == Extra::tensor) z += load<T>(extra + k, lanes);
      return act.backward(incoming, z);
    }
  }
};

template <class T, Backward kMode, Extra kExtra, class Act, class Value, class Accumulator, class Place, class Rows>
inline __attribute__((always_inline))
void backward(const Tensors& t, const Act& act, const Point<Value>& point, const Place& place, int64_t n, Rows rows,
              Accumulator& sums) {
  const auto* x = at<T>(t.x);
  const Gradient<T, kExtra, Act> gradient(t, act);
  auto *dx = at<T>(t.out), *dresidual = at<T>(t.dresidual);
  const bool around_caches = t.stream, dx_around_caches = t.stream && !t.in_place();
  each_vector(n, [&](int64_t i, auto lanes) {
    const Vec mean = point.mean(i), scale = point.scale(i), bias = point.bias(i);
    Vec centre, slope, sum{}, sum_centred{};
    if constexpr (kMode == Backward::exact) centre = point.centre(i), slope = point.slope(i);
#pragma GCC unroll kRows
    for (int r = 0; r < rows.value; ++r) {
      const int64_t k = place.begin(r) + i;
      prefetch(x + place.later(r) + i);
      gradient.ask_for(place.outer_later(r) + i);
      const Vec centred = load<T>(x + k, lanes) - mean;
      const Vec g = gradient(place.outer(r) + i, lanes, centred, scale, bias);
      if constexpr (kMode != Backward::exact) {
        sum += g;
        sum_centred = multiply_add(g, centred, sum_centred);
      }
      if constexpr (kMode == Backward::reduce) continue;
      Vec d;
      if constexpr (kMode == Backward::exact)
        d = multiply_add(scale, g, -place.weight(r) * multiply_add(slope, centred, centre));
      else d = scale * g;
      put<T>(dx + k, d, dx_around_caches, lanes);
      if (dresidual) put<T>(dresidual + k, g, around_caches, lanes);
    }
    if constexpr (kMode != Backward::exact) sums.add(i, sum, sum_centred);
  });
}

template <class Body>
void with_mode(Backward mode, Body body) {
  switch (mode) {
    case Backward::reduce: return body.template operator()<Backward::reduce>();
    case Backward::fused: return body.template operator()<Backward::fused>();
    case Backward::exact: return body.template operator()<Backward::exact>();
  }
}

// Calls body<T, kExtra>(activation).
template <class Body>
void with_gradient(const Tensors& t, Body body) {
  with_dtype(t.dtype, [&]<class T>(T) {
    with_activation(t.activation, [&]<class Act>(Act act) {
      if constexpr (Act::kTakesOutput)
        if (t.signs) return body.template operator()<T, Extra::signs>(act);
      if (Act::kTakesOutput ? t.y : t.residual) body.template operator()<T, Extra::tensor>(act);
      else body.template operator()<T, Extra::none>(act);
    });
  });
}

}  // namespace
}  // namespace leannorm::LEANNORM_ISA
