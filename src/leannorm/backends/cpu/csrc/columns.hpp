// The parts of a concatenation: rows of their own in x and dx, columns of wider rows in y and dy.
#pragma once

#include "passes.hpp"

namespace leannorm::LEANNORM_ISA {
namespace {

template <class Body>
void with_part(const Tensors& t, Body body) {
  with_dtype(t.dtype, [&]<class T>(T) {
    with_activation(t.activation, [&](auto act) { body.template operator()<T>(act); });
  });
}

void forward_columns(const Tensors& t, const Channels& channels, const Columns& columns, int64_t first, int64_t rows) {
  with_part(t, [&]<class T>(auto act) {
    const auto point = point_of(from(channels, columns.first));
    each_rows(first, first + rows, [&](int64_t r, auto block) {
      forward<T, false>(t, act, point, AdjacentColumns{columns, r, rows}, columns.size, block);
    });
  });
}

void backward_columns(const Tensors& t, const Channels& channels, const Columns& columns, int64_t first, int64_t rows,
                      Sums totals, float* scratch) {
  const int64_t n = columns.size, part = scratch_size(n) / 3;
  with_part(t, [&]<class T>(auto act) {
    const auto point = point_of(from(channels, columns.first));
    LaneSums sums{scratch, scratch + part};
    clear(scratch, 2 * part);
    each_rows(first, first + rows, [&](int64_t r, auto block) {
      const AdjacentColumns place{columns, r, rows};
      if (t.out) backward<T, Backward::fused, Extra::none>(t, act, point, place, n, block, sums);
      else backward<T, Backward::reduce, Extra::none>(t, act, point, place, n, block, sums);
    });
    for (int64_t i = 0; i < n; ++i) totals.first[columns.first + i] += sums.g[i];
    for (int64_t i = 0; i < n; ++i) totals.second[columns.first + i] += sums.g_centred[i];
  });
}

void correct_columns(const Tensors& t, const Channels& channels, const Columns& columns, Positions sampled) {
  const Columns of_dy = t.in_place() ? Columns{0, columns.size, columns.size} : columns;
  with_part(t, [&]<class T>(auto act) {
    const auto point = point_of(from(channels, columns.first));
    const int64_t ahead = elements_ahead<T>(columns.size, kRows) / columns.size;
    LaneSums unused{};
    each_rows(0, sampled.count, [&](int64_t s, auto rows) {
      const int64_t last = sampled.count - rows.value, later = s + ahead < last ? s + ahead : last;
      const ScatteredColumns place{of_dy, sampled.rows + s, sampled.rows + later, sampled.weights + s};
      backward<T, Backward::exact, Extra::none>(t, act, point, place, columns.size, rows, unused);
    });
  });
}

}  // namespace
}  // namespace leannorm::LEANNORM_ISA
