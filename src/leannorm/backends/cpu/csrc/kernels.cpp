// Compiled once for each instruction set. Nothing of the C++ library that could be shared between them is used here.
#include "kernels.hpp"

#include "columns.hpp"
#include "depthwise_kernels.hpp"
#include "moments.hpp"
#include "passes.hpp"
#include "pointwise_kernels.hpp"
#include "stage.hpp"

namespace leannorm::LEANNORM_ISA {
namespace {

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

void forward_rows(const Tensors& t, const Channels& channels, int64_t offset, int64_t rows, int64_t width) {
  with_forward(t, [&]<class T, bool kResidual>(auto act) {
    const auto point = point_of(channels);
    each_rows(0, rows, [&](int64_t r, auto block) {
      const Adjacent place{offset + r * width, width, elements_ahead<T>(width, block.value)};
      forward<T, kResidual>(t, act, point, place, width, block);
    });
  });
}

void forward_planes(const Tensors& t, const Channels& channels, const Geometry& geometry, Pieces pieces) {
  with_forward(t, [&]<class T, bool kResidual>(auto act) {
    const auto body = [&](int64_t channel, int64_t offset, int64_t n, const Tensors& part) {
      const Adjacent place{offset, n, elements_ahead<T>(n, 1)};
      forward<T, kResidual>(part, act, point_of(channels, channel), place, n, Constant<1>{});
    };
    each_part<T, Stage<T>::kMost, true>(t, geometry, pieces, body);
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
    forward_columns, backward_columns, correct_columns,
    depthwise_at,   depthwise_forward,    depthwise_sums, depthwise_backward,
    pointwise_pack, pointwise_forward,    pointwise_sampled, pointwise_backward,  pointwise_correct,
    pointwise_products, pointwise_filters,
};

}  // namespace leannorm::LEANNORM_ISA
