// Compiled once for each instruction set. Nothing of the C++ library that could be shared between them is used here.
#include "kernels.hpp"

#include "activations.hpp"
#include "depthwise_kernels.hpp"
#include "moments.hpp"
#include "pointwise_kernels.hpp"
#include "simd.hpp"
#include "stage.hpp"

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
  static float weight(int) { return 1.0f; }
};

struct Scattered {
  const int64_t *offsets, *later_offsets;
  const float* weights;
  int64_t begin(int r) const { return offsets[r]; }
  int64_t later(int r) const { return later_offsets[r]; }
  float weight(int r) const { return weights[r]; }
};

// Forward and backward are inlined: a call for each small plane would cost as much as its work.

template <class T, bool kResidual, class Act, class Value, class Rows>
inline __attribute__((always_inline))
void forward(const Tensors& t, const Act& act, const Point<Value>& point, int64_t offset, int64_t n, Rows rows) {
  const auto *x = at<T>(t.x), *residual = at<T>(t.residual);
  auto* y = at<T>(t.out);
  uint8_t* const signs = t.signs;
  const bool around_caches = t.stream;
  const Adjacent place{offset, n, elements_ahead<T>(n, rows.value)};
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
      put<T>(y + k, value, around_caches, lanes);
      if constexpr (kResidual && Act::kTakesOutput)
        if (signs) store_bits(signs, k, bits_where(act.is_one(T::unpack(T::pack(value)))), lanes);
    }
  });
}

// Calls body(channel, offset, n, tensors) for planes, at most kMost elements at a time. Results that are to go around the
// caches from planes of no whole cache lines are written to a stage in place of the tensor.
template <class T, int64_t kMost, bool kWrites, class Body>
inline __attribute__((always_inline))
void each_part(const Tensors& t, const Geometry& geometry, Pieces pieces, Body body) {
  static_assert(kMost <= Stage<T>::kMost);
  const bool whole_lines = geometry.spatial % (geometry.pieces * Stage<T>::kLine) == 0;
  const bool staged = kWrites && t.stream && !whole_lines;
  Stage<T> out(t.out), dresidual(t.dresidual);
  each_piece(geometry, pieces, [&](int64_t channel, Run piece) {
    for (int64_t first = 0; first < piece.length; first += kMost) {
      const int64_t n = piece.length - first < kMost ? piece.length - first : kMost, offset = piece.offset + first;
      Tensors part = t;
      if (staged) {
        if (!t.in_place()) part.out = out.take(offset, n);
        part.dresidual = dresidual.take(offset, n), part.stream = false;
      }
      body(channel, offset, n, part);
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

void forward_rows(const Tensors& t, const Channels& channels, int64_t offset, int64_t rows, int64_t width) {
  with_forward(t, [&]<class T, bool kResidual>(auto act) {
    const auto point = point_of(channels);
    each_rows(0, rows, [&](int64_t r, auto block) {
      forward<T, kResidual>(t, act, point, offset + r * width, width, block);
    });
  });
}

void forward_planes(const Tensors& t, const Channels& channels, const Geometry& geometry, Pieces pieces) {
  with_forward(t, [&]<class T, bool kResidual>(auto act) {
    const auto body = [&](int64_t channel, int64_t offset, int64_t n, const Tensors& part) {
      forward<T, kResidual>(part, act, point_of(channels, channel), offset, n, Constant<1>{});
    };
    each_part<T, Stage<T>::kMost, true>(t, geometry, pieces, body);
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
      const int64_t k = place.begin(r) + i, later = place.later(r) + i;
      prefetch(x + later);
      gradient.ask_for(later);
      const Vec centred = load<T>(x + k, lanes) - mean;
      const Vec g = gradient(k, lanes, centred, scale, bias);
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

void backward_rows(const Tensors& t, const Channels& channels, Backward mode, int64_t offset, int64_t rows,
                   int64_t width, Sums totals, float* scratch) {
  const int64_t part = scratch_size(width) / 3;
  with_gradient(t, [&]<class T, Extra kExtra>(auto act) {
    with_mode(mode, [&]<Backward kMode>() {
      const auto point = point_of(channels);
      LaneSums sums{scratch, scratch + part};
      for (int64_t first = 0; first < rows; first += kBlockRows) {
        if (kMode != Backward::exact) clear(scratch, 2 * part);
        const int64_t count = rows - first < kBlockRows ? rows - first : kBlockRows;
        each_rows(first, first + count, [&](int64_t r, auto block) {
          const Adjacent place{offset + r * width, width, elements_ahead<T>(width, block.value)};
          backward<T, kMode, kExtra>(t, act, point, place, width, block, sums);
        });
        if (kMode == Backward::exact) continue;
        for (int64_t i = 0; i < width; ++i) totals.first[i] += sums.g[i];
        for (int64_t i = 0; i < width; ++i) totals.second[i] += sums.g_centred[i];
      }
    });
  });
}

void backward_planes(const Tensors& t, const Channels& channels, Backward mode, const Geometry& geometry,
                     Pieces pieces, Sums totals) {
  with_gradient(t, [&]<class T, Extra kExtra>(auto act) {
    with_mode(mode, [&]<Backward kMode>() {
      const auto body = [&](int64_t channel, int64_t offset, int64_t n, const Tensors& part) {
        PlaneSums sums;
        const Adjacent place{offset, n, elements_ahead<T>(n, 1)};
        backward<T, kMode, kExtra>(part, act, point_of(channels, channel), place, n, Constant<1>{}, sums);
        if (kMode == Backward::exact) return;
        totals.first[channel] += sum_of(sums.g);
        totals.second[channel] += sum_of(sums.g_centred);
      };
      each_part<T, kSumBlock, kMode != Backward::reduce>(t, geometry, pieces, body);
    });
  });
}

// Correction of sampled elements: their dx from x and dy, for which Correction may have put scale g.

template <class T, Extra kExtra, class Act>
void correct(const Tensors& t, const Act& act, const Channels& channels, int64_t width, Sampled sampled) {
  const auto point = point_of(channels);
  const int64_t ahead = elements_ahead<T>(width, kRows) / width;
  LaneSums unused{};
  each_rows(0, sampled.count, [&](int64_t s, auto rows) {
    const int64_t last = sampled.count - rows.value, later = s + ahead < last ? s + ahead : last;
    const Scattered place{sampled.offsets + s, sampled.offsets + later, sampled.weights + s};
    backward<T, Backward::exact, kExtra>(t, act, point, place, width, rows, unused);
  });
}

void correct_rows(const Tensors& t, const Channels& channels, int64_t width, Sampled sampled) {
  with_gradient(t, [&]<class T, Extra kExtra>(auto act) { correct<T, kExtra>(t, act, channels, width, sampled); });
}

void correct_planes(const Tensors& t, const Channels& channels, int64_t spatial, int64_t begin, int64_t end,
                    Sampled sampled) {
  with_gradient(t, [&]<class T, Extra kExtra, class Act>(Act act) {
    using Scalar = typename T::Scalar;
    constexpr int64_t kRowsAtOnce = kBlockRows / 4;  // four buffers, and the cache holds them
    Scalar x[kRowsAtOnce * kColumns], dy[kRowsAtOnce * kColumns], extra[kRowsAtOnce * kColumns],
        dx[kRowsAtOnce * kColumns];
    Tensors rows = t;
    rows.x = x, rows.dy = dy, rows.out = dx, rows.dresidual = nullptr;
    if constexpr (kExtra == Extra::tensor) (Act::kTakesOutput ? rows.y : rows.residual) = extra;
    uint8_t signs[kRowsAtOnce * kColumns / 8 + 4];
    if constexpr (kExtra == Extra::signs) rows.signs = signs;
    each_columns(begin, end, [&](int64_t channel, int64_t width) {
      int64_t starts[kRowsAtOnce];
      for (int64_t r = 0; r < kRowsAtOnce; ++r) starts[r] = r * width;
      const int64_t plane = channel * spatial;
      for (int64_t first = 0; first < sampled.count; first += kRowsAtOnce) {
        const int64_t count = sampled.count - first < kRowsAtOnce ? sampled.count - first : kRowsAtOnce;
        const auto fetch = [&](const void* from, Scalar* to) {
          gather(at<T>(from, plane), sampled.offsets + first, count, spatial, width, to);
        };
        fetch(t.x, x);
        fetch(t.dy, dy);
        if constexpr (kExtra == Extra::tensor) fetch(Act::kTakesOutput ? t.y : t.residual, extra);
        if constexpr (kExtra == Extra::signs)
          gather_bits(t.signs, plane, sampled.offsets + first, count, spatial, width, signs);
        correct<T, kExtra>(rows, act, from(channels, channel), width, {starts, sampled.weights + first, count});
        scatter(at<T>(t.out, plane), sampled.offsets + first, count, spatial, width, dx);
      }
    });
  });
}

void correct_runs(const Tensors& t, const Channels& channels, int64_t spatial, int64_t begin, int64_t end,
                  Runs sampled) {
  with_gradient(t, [&]<class T, Extra kExtra>(auto act) {
    PlaneSums unused;
    for (int64_t channel = begin; channel < end; ++channel) {
      const auto point = point_of(channels, channel);
      for (int64_t r = 0; r < sampled.count; ++r) {
        const auto [offset, length] = sampled.runs[r];
        const Adjacent place{channel * spatial + offset, length, spatial};  // the next channel's is asked for
        backward<T, Backward::exact, kExtra>(t, act, point, place, length, Constant<1>{}, unused);
      }
    }
  });
}

}  // namespace

const Kernels kernels = {
    moments_rows,   moments_sampled_rows, moments_planes, moments_sampled_planes, moments_of_runs, forward_rows,
    forward_planes, backward_rows,        backward_planes, correct_rows,          correct_planes,  correct_runs,
    depthwise_at,   depthwise_forward,    depthwise_sums, depthwise_backward,
    pointwise_pack, pointwise_forward,    pointwise_sampled, pointwise_backward,  pointwise_correct,
    pointwise_products, pointwise_filters,
};

}  // namespace leannorm::LEANNORM_ISA
