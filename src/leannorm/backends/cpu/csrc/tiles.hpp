// Products of matrices, a tile of the result at a time: its sums stay in registers.
//
// The right matrix lies in panels of at most kTileVecs vectors of columns; a panel has its rows one behind the other.
#pragma once

#include "blocks.hpp"
#include "simd.hpp"

namespace leannorm::LEANNORM_ISA {
namespace {

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kTileRows = 8;  // as many sums as 32 registers hold
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVecs = 3;
constexpr int kTileColumns = kTileVecs * kLanes;

struct Panels {
  int64_t columns, vectors, count;

  explicit Panels(int64_t columns)
      : columns(columns),
        vectors((columns + kLanes - 1) / kLanes),
        count((vectors + kTileVecs - 1) / kTileVecs) {}

  int64_t begin(int64_t panel) const { return vectors * panel / count * kLanes; }
  int64_t width(int64_t panel) const { return begin(panel + 1) - begin(panel); }
  // Those of the width that there are.
  int64_t size(int64_t panel) const {
    const int64_t rest = columns - begin(panel), whole = width(panel);
    return rest < whole ? rest : whole;
  }
};

// A left matrix: element (row, d) lies at begin + row * row_step + d * step.
struct Left {
  const float* begin;
  int64_t row_step, step;
};

// All arguments go in registers: a left matrix by way of the stack is written in halves and read as a whole, which waits
// until every store before it has reached the cache.
template <int kVecs, bool kAdd>
__attribute__((noinline)) void multiply(int64_t depth, const float* at, int64_t row_step, int64_t step,
                                        const float* panel, float* tile) {
  Vec sums[kTileRows][kVecs]{};
  for (int64_t d = 0; d < depth; ++d, at += step, panel += kVecs * kLanes) {
    Vec columns[kVecs];
#pragma GCC unroll kTileVecs
    for (int v = 0; v < kVecs; ++v) columns[v] = load<Float32>(panel + v * kLanes, All{});
#pragma GCC unroll kTileRows
    for (int r = 0; r < kTileRows; ++r) {
      const Vec element = broadcast(at[r * row_step]);
#pragma GCC unroll kTileVecs
      for (int v = 0; v < kVecs; ++v) sums[r][v] = multiply_add(element, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll kTileRows
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll kTileVecs
    for (int v = 0; v < kVecs; ++v) {
      float* const to = tile + (r * kVecs + v) * kLanes;
      store<Float32>(to, kAdd ? load<Float32>(to, All{}) + sums[r][v] : sums[r][v], All{});
    }
}

// A tile, kTileRows by the panel's width, or what is added to one.
template <bool kAdd>
inline __attribute__((always_inline)) void multiply(int64_t width, int64_t depth, Left left, const float* panel,
                                                    float* tile) {
  switch (width / kLanes) {
    case 1: return multiply<1, kAdd>(depth, left.begin, left.row_step, left.step, panel, tile);
    case 2: return multiply<2, kAdd>(depth, left.begin, left.row_step, left.step, panel, tile);
    case 3: return multiply<3, kAdd>(depth, left.begin, left.row_step, left.step, panel, tile);
  }
}

// What will be wanted soon, asked for in as many steps as there are tiles until then.
class AheadOfTiles {
 public:
  explicit AheadOfTiles(int64_t steps) : steps_(steps) {}

  void add(const float* p, int64_t elements) {
    constexpr int64_t kLine = 16;
    if (p && elements > 0) stretches_[count_++] = {p, p + elements, (elements / kLine + steps_) / steps_ * kLine};
  }

  void step() {
    constexpr int64_t kLine = 16;
    for (int i = 0; i < count_; ++i) {
      auto& [at, end, each] = stretches_[i];
      for (const float* const until = each < end - at ? at + each : end; at < until; at += kLine) prefetch(at);
    }
  }

 private:
  struct Stretch {
    const float *at, *end;
    int64_t each;
  };
  static constexpr int kMost = 3;

  int64_t steps_;
  Stretch stretches_[kMost];
  int count_ = 0;
};

}  // namespace
}  // namespace leannorm::LEANNORM_ISA
