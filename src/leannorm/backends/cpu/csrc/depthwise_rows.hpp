// Rows of positions in buffers, and what depthwise convolutions do to them: see depthwise.hpp. In a buffer a vector of
// channels comes after the other, of each one all positions, with zeros around them.
#pragma once

#include "blocks.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace leannorm::LEANNORM_ISA {
namespace {

inline void add_to(float* sums, Vec v) { store<Float32>(sums, load<Float32>(sums, All{}) + v, All{}); }

// A row of positions in a buffer.
struct Row {
  float* begin;
  int64_t before, count, behind;

  float* at(int64_t channel, int64_t position) const {
    return begin + channel * (before + count + behind) + (before + position) * kLanes;
  }

  void clear_around(int64_t channels) const {
    for (int64_t c = 0; c < channels; c += kLanes) {
      clear(at(c, -before), before * kLanes);
      clear(at(c, count), behind * kLanes);
    }
  }
};

// The last rows that were asked for.
class Ring {
 public:
  Ring(float* begin, int64_t span, int64_t row_size, Row like, int64_t channels)
      : begin_(begin), span_(span), row_size_(row_size), like_(like) {
    for (int64_t i = 0; i < span; ++i) row(i).clear_around(channels);
  }

  Row row(int64_t index) const {
    return {begin_ + index % span_ * row_size_, like_.before, like_.count, like_.behind};
  }

 private:
  float* begin_;
  int64_t span_, row_size_;
  Row like_;
};

Row inputs_at(const Depthwise& d, float* begin) {
  return {begin, d.columns.inputs_before, d.columns.size, d.columns.inputs_behind};
}

Row outputs_at(const Depthwise& d, float* begin) {
  return {begin, d.columns.outputs_before, d.columns.outputs, d.columns.outputs_behind};
}

// Rows that a row of positions is linked to, and through which taps.
struct LinkedRows {
  Row rows[kMostTaps];
  int64_t taps[kMostTaps];
  int64_t count;

  LinkedRows(LinkRange range, const Ring& ring) : count(range.count) {
    for (int64_t r = 0; r < count; ++r) rows[r] = ring.row(range.links[r].at), taps[r] = range.links[r].tap;
  }
};

// Tables lie in buffers likewise: a vector of channels after the other, of each one all taps.
template <class Body>
void each_of_table(const Depthwise& d, Body body) {
  for (int64_t tap = 0; tap < d.taps; ++tap)
    for (int64_t c = 0; c < d.padded; c += kLanes) body(tap * d.padded + c, c * d.taps + tap * kLanes);
}

void copy_table(const Depthwise& d, const float* table, float* buffer) {
  each_of_table(d, [&](int64_t from, int64_t to) {
    store<Float32>(buffer + to, load<Float32>(table + from, All{}), All{});
  });
}

inline int64_t place_in_table(const Depthwise& d, int64_t c, int64_t row_tap, int64_t column_tap) {
  return c * d.taps + (row_tap * d.kernel_columns + column_tap) * kLanes;
}

constexpr int64_t kTapsAtOnce = 3;  // of either dimension: their values stay in registers

template <class Body>
inline __attribute__((always_inline)) void with_taps(int64_t n, Body body) {
  if (n >= kTapsAtOnce) return body(Constant<3>{});
  n == 2 ? body(Constant<2>{}) : body(Constant<1>{});
}

// Memory that will be wanted for the next row, in streams of a cache line for each vector of this one: it arrives while
// this one is computed.
class Ahead {
 public:
  explicit Ahead(int64_t vectors) : vectors_(vectors) {}

  template <class Scalar>
  void add(const Scalar* p, int64_t elements) {
    const auto* begin = reinterpret_cast<const char*>(p);
    for (int64_t bytes = elements * sizeof *p; p && bytes > 0 && count_ < kMost; bytes -= kLine * vectors_) {
      streams_[count_++] = begin;
      begin += kLine * vectors_;
    }
  }

  void ask_for(int64_t vector) const {
    for (int i = 0; i < count_; ++i) prefetch(streams_[i] + kLine * vector);
  }

 private:
  static constexpr int kMost = 8;
  static constexpr int64_t kLine = 64;

  int64_t vectors_;
  const char* streams_[kMost];
  int count_ = 0;
};

// Some taps: where the sources of the first position begin, and where the taps' values are in tables.
template <int kRowTaps, int kColumnTaps>
struct Taps {
  const float* rows[kRowTaps];
  int64_t columns[kColumnTaps];
  int64_t values[kRowTaps][kColumnTaps];

  template <class Body>
  inline __attribute__((always_inline)) void each(int64_t offset, Body body) const {
#pragma GCC unroll 3
    for (int r = 0; r < kRowTaps; ++r) {
#pragma GCC unroll 3
      for (int k = 0; k < kColumnTaps; ++k) body(r, k, load<Float32>(rows[r] + columns[k] + offset, All{}));
    }
  }
};

// Calls body(taps, whether they are the first) for all taps of a run.
template <class Body>
inline __attribute__((always_inline))
void each_taps(const Depthwise& d, const LinkRun& run, const LinkedRows& linked, int64_t c, Body body) {
  for (int64_t row = 0; row < linked.count; row += kTapsAtOnce)
    for (int64_t link = 0; link < run.links.count; link += kTapsAtOnce)
      with_taps(linked.count - row, [&](auto row_taps) {
        with_taps(run.links.count - link, [&](auto column_taps) {
          Taps<row_taps.value, column_taps.value> taps;
#pragma GCC unroll 3
          for (int k = 0; k < column_taps.value; ++k) taps.columns[k] = run.links.links[link + k].at * kLanes;
#pragma GCC unroll 3
          for (int r = 0; r < row_taps.value; ++r) {
            taps.rows[r] = linked.rows[row + r].at(c, 0);
#pragma GCC unroll 3
            for (int k = 0; k < column_taps.value; ++k)
              taps.values[r][k] = place_in_table(d, c, linked.taps[row + r], run.links.links[link + k].tap);
          }
          body(taps, row == 0 && link == 0);
        });
      });
}

// The positions of a run: start plus their sources times the taps' values.
void convolve(const Depthwise& d, const LinkRun& run, const LinkedRows& linked, int64_t c, const float* filters,
              Vec start, Row out, const Ahead& ahead) {
  float* const to = out.at(c, run.first);
  const int64_t to_step = run.step * kLanes, step = run.stride * kLanes;
  if (linked.count == 0 || run.links.count == 0)
    for (int64_t i = 0; i < run.count; ++i) store<Float32>(to + i * to_step, start, All{});
  const auto add = [&]<int kRowTaps, int kColumnTaps>(Taps<kRowTaps, kColumnTaps> taps, bool first) {
    Vec values[kRowTaps][kColumnTaps];
#pragma GCC unroll 3
    for (int r = 0; r < kRowTaps; ++r)
#pragma GCC unroll 3
      for (int k = 0; k < kColumnTaps; ++k) values[r][k] = load<Float32>(filters + taps.values[r][k], All{});
    for (int64_t i = 0; i < run.count; ++i) {
      if (first) ahead.ask_for(c / kLanes * out.count + run.first + i * run.step);
      Vec sum = first ? start : load<Float32>(to + i * to_step, All{});
      taps.each(i * step, [&](int r, int k, Vec x) { sum = multiply_add(x, values[r][k], sum); });
      store<Float32>(to + i * to_step, sum, All{});
    }
  };
  each_taps(d, run, linked, c, add);
}

// Adds to each tap's sum its sources times the run's g.
void correlate(const Depthwise& d, const LinkRun& run, const LinkedRows& linked, int64_t c, Row g, float* sums,
               const Ahead& ahead) {
  const float* const from = g.at(c, run.first);
  const int64_t from_step = run.step * kLanes, step = run.stride * kLanes;
  const auto add = [&]<int kRowTaps, int kColumnTaps>(Taps<kRowTaps, kColumnTaps> taps, bool first) {
    Vec values[kRowTaps][kColumnTaps]{};
    for (int64_t i = 0; i < run.count; ++i) {
      if (first) ahead.ask_for(c / kLanes * g.count + i);
      const Vec factor = load<Float32>(from + i * from_step, All{});
      taps.each(i * step, [&](int r, int k, Vec x) { values[r][k] = multiply_add(x, factor, values[r][k]); });
    }
#pragma GCC unroll 3
    for (int r = 0; r < kRowTaps; ++r)
#pragma GCC unroll 3
      for (int k = 0; k < kColumnTaps; ++k) add_to(sums + taps.values[r][k], values[r][k]);
  };
  each_taps(d, run, linked, c, add);
}

// Of the positions of a row that are sampled: where they are, their weights, and xhat times these.
struct SampledPositions {
  const int64_t* columns;
  const float* weights;
  const float* weighted;  // a vector each
  int64_t count;
};

// Adds to each tap's sums its sources times the weights, and times weighted xhat.
void correlate_sampled(const Depthwise& d, const SampledPositions& places, const LinkedRows& linked, int64_t c,
                       float* sums, float* weighted_sums) {
  const LinkRun& run = d.columns.seen;
  const auto add = [&]<int kRowTaps, int kColumnTaps>(Taps<kRowTaps, kColumnTaps> taps, bool) {
    Vec values[kRowTaps][kColumnTaps]{}, weighted[kRowTaps][kColumnTaps]{};
    for (int64_t i = 0; i < places.count; ++i) {
      const Vec weight = broadcast(places.weights[i]), xhat = load<Float32>(places.weighted + i * kLanes, All{});
      taps.each(places.columns[i] * run.stride * kLanes, [&](int r, int k, Vec x) {
        values[r][k] = multiply_add(x, weight, values[r][k]);
        weighted[r][k] = multiply_add(x, xhat, weighted[r][k]);
      });
    }
#pragma GCC unroll 3
    for (int r = 0; r < kRowTaps; ++r)
#pragma GCC unroll 3
      for (int k = 0; k < kColumnTaps; ++k) {
        add_to(sums + taps.values[r][k], values[r][k]);
        add_to(weighted_sums + taps.values[r][k], weighted[r][k]);
      }
  };
  each_taps(d, run, linked, c, add);
}

}  // namespace
}  // namespace leannorm::LEANNORM_ISA
