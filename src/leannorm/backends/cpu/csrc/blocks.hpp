// What the kernels share: how memory is cut, and the step from run-time to compile-time types.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace leannorm::LEANNORM_ISA {
namespace {

constexpr int64_t kBlock = 4096;     // elements that are added up in float before they go to double
constexpr int64_t kSumBlock = 256;   // the same in backward, where nothing is centred
constexpr int64_t kBlockRows = 128;  // the same for rows
constexpr int64_t kColumns = 32;     // channels of planes whose sampled elements are gathered into rows

constexpr int kRows = 4;  // taken together, so that per-channel values are read once for all

constexpr int64_t kAhead = 8192;  // bytes that are asked for before they are wanted

template <class T>
constexpr int64_t elements_ahead(int64_t n, int64_t rows) {
  constexpr int64_t kElements = kAhead / static_cast<int64_t>(sizeof(typename T::Scalar));
  return rows * n < kElements ? kElements : rows * n;
}

template <class Scalar>
void prefetch(const Scalar* p) {
  __builtin_prefetch(p, 0, 2);
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls body(row, rows as a constant) for the rows [first, last), several at a time.
template <class Body>
inline __attribute__((always_inline)) void each_rows(int64_t first, int64_t last, Body body) {
  int64_t r = first;
  for (; r + kRows <= last; r += kRows) body(r, Constant<kRows>{});
  for (; r < last; ++r) body(r, Constant<1>{});
}

// A channel's piece: planes of a channel are counted sample by sample, each in its pieces.
inline Run piece_of(const Geometry& g, int64_t channel, int64_t unit) {
  if (g.pieces == 1) return {(unit * g.channels + channel) * g.spatial, g.spatial};
  const int64_t sample = unit / g.pieces, piece = unit % g.pieces;
  const int64_t first = g.spatial * piece / g.pieces, last = g.spatial * (piece + 1) / g.pieces;
  return {(sample * g.channels + channel) * g.spatial + first, last - first};
}

// Calls body(channel, stretch of memory) in memory's order, but for planes that have several pieces.
template <class Body>
inline __attribute__((always_inline)) void each_piece(const Geometry& g, Pieces pieces, Body body) {
  for (int64_t unit = pieces.first_unit; unit < pieces.end_unit; ++unit) {
    Run stretch = piece_of(g, pieces.first_channel, unit);
    for (int64_t channel = pieces.first_channel; channel < pieces.end_channel; ++channel) {
      body(channel, stretch);
      stretch.offset += g.spatial;
    }
  }
}

// Calls body(first channel, number) for the channels [begin, end), at most kColumns at a time.
template <class Body>
void each_columns(int64_t begin, int64_t end, Body body) {
  for (int64_t channel = begin; channel < end; channel += kColumns)
    body(channel, end - channel < kColumns ? end - channel : kColumns);
}

// Elements of planes to rows of scratch memory and back; p is the first channel's plane.

template <class Scalar>
void gather(const Scalar* p, const int64_t* offsets, int64_t count, int64_t spatial, int64_t width, Scalar* rows) {
  for (int64_t c = 0; c < width; ++c, p += spatial)
    for (int64_t r = 0; r < count; ++r) rows[r * width + c] = p[offsets[r]];
}

// The same of bits, whose offsets count from the tensor's beginning.
inline void gather_bits(const uint8_t* bits, int64_t plane, const int64_t* offsets, int64_t count, int64_t spatial,
                        int64_t width, uint8_t* rows) {
  for (int64_t b = 0; b <= count * width / 8; ++b) rows[b] = 0;
  for (int64_t c = 0; c < width; ++c, plane += spatial)
    for (int64_t r = 0; r < count; ++r) {
      const int64_t from = plane + offsets[r], to = r * width + c;
      rows[to / 8] |= static_cast<uint8_t>((bits[from / 8] >> from % 8 & 1) << to % 8);
    }
}

template <class Scalar>
void scatter(Scalar* p, const int64_t* offsets, int64_t count, int64_t spatial, int64_t width, const Scalar* rows) {
  for (int64_t c = 0; c < width; ++c, p += spatial)
    for (int64_t r = 0; r < count; ++r) p[offsets[r]] = rows[r * width + c];
}

inline void clear(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

template <class T>
const typename T::Scalar* at(const void* tensor, int64_t offset = 0) {
  return tensor ? static_cast<const typename T::Scalar*>(tensor) + offset : nullptr;
}

template <class T>
typename T::Scalar* at(void* tensor, int64_t offset = 0) {
  return tensor ? static_cast<typename T::Scalar*>(tensor) + offset : nullptr;
}

template <class T>
void put(typename T::Scalar* p, Vec v, bool around_caches, All all) {
  around_caches ? stream<T>(p, v) : store<T>(p, v, all);
}

template <class T>
void put(typename T::Scalar* p, Vec v, bool, Some some) {
  store<T>(p, v, some);
}

// Calls body with the storage type. Instructions for one type alone are not worth the code of the others.
template <class Body>
void with_dtype(Dtype dtype, Body body) {
#if defined(__AVX512BF16__)
  if (dtype == Dtype::bfloat16) body(BFloat16{});
#else
  switch (dtype) {
    case Dtype::float32: return body(Float32{});
    case Dtype::bfloat16: return body(BFloat16{});
    case Dtype::float16: return body(Float16{});
  }
#endif
}

}  // namespace
}  // namespace leannorm::LEANNORM_ISA
