// Vectors of float32 for one instruction set, and the storage types that are loaded into them.
//
// GCC's and Clang's vector extensions say it once for every instruction set. Everything here lives in the namespace
// LEANNORM_ISA: the same inline function compiled for two instruction sets must not be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace leannorm::LEANNORM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));
using Half = uint16_t __attribute__((vector_size(2 * kLanes)));

inline Vec broadcast(float value) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(value);  // 0 + value is an addition more, as it makes 0 of -0
#elif defined(__AVX__)
  return (Vec)_mm256_set1_ps(value);
#else
  return Vec{value, value, value, value};
#endif
}
inline Bits bits_of(Vec v) { return (Bits)v; }
inline Vec float_of(Bits b) { return (Vec)b; }

// a b + c, rounded once where the machine can. The compiler is not left to do so by itself (-ffp-contract=off): as the
// code around it allows, it would round the same expression now once and now twice.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
inline Vec multiply_add(Vec a, Vec b, float c) { return multiply_add(a, b, broadcast(c)); }

// Some of the lanes, as a comparison tells them, and as bits, the first lane in the lowest.
#if defined(__AVX512F__)
using Where = __mmask16;

inline Where where_at_most(Vec v, Vec bound) { return _mm512_cmp_ps_mask((__m512)v, (__m512)bound, _CMP_LE_OQ); }
inline Where where_at_least(Vec v, Vec bound) { return _mm512_cmp_ps_mask((__m512)v, (__m512)bound, _CMP_GE_OQ); }
inline Where where_above(Vec v, Vec bound) { return _mm512_cmp_ps_mask((__m512)v, (__m512)bound, _CMP_GT_OQ); }
inline Vec choose(Where w, Vec a, Vec b) { return (Vec)_mm512_mask_mov_ps((__m512)b, w, (__m512)a); }
inline uint32_t bits_where(Where w) { return w; }
inline Where where_bits(uint32_t bits) { return static_cast<Where>(bits); }
#else
using Where = Int;

inline Where where_at_most(Vec v, Vec bound) { return v <= bound; }
inline Where where_at_least(Vec v, Vec bound) { return v >= bound; }
inline Where where_above(Vec v, Vec bound) { return v > bound; }
inline Vec choose(Where w, Vec a, Vec b) { return w ? a : b; }

inline uint32_t bits_where(Where w) {
#if defined(__AVX__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)w));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= (w[l] & 1u) << l;
  return bits;
#endif
}

inline Where where_bits(uint32_t bits) {
  Int lane_bits{};
  for (int l = 0; l < kLanes; ++l) lane_bits[l] = 1 << l;  // a constant
  return ((Int{} + static_cast<int32_t>(bits)) & lane_bits) != 0;
}
#endif

inline Where everywhere() { return static_cast<Where>(~Where{}); }
inline Where except(Where w) { return static_cast<Where>(~w); }

inline float sum_of(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__)
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  return half[0] + half[1] + (half[2] + half[3]);
#else
  return v[0] + v[1] + (v[2] + v[3]);
#endif
}

// The larger one; NaN if v is NaN.
inline Vec at_least(float bound, Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)broadcast(bound), (__m512)v);
#elif defined(__AVX__)
  return (Vec)_mm256_max_ps((__m256)broadcast(bound), (__m256)v);
#else
  return bound > v ? broadcast(bound) : v;
#endif
}

// A storage type: its 16-bit patterns or floats to and from float32 lanes.

struct Float32 {
  using Scalar = float;
  using Packed = Vec;
  static Vec unpack(Packed p) { return p; }
  static Packed pack(Vec v) { return v; }
};

struct BFloat16 {
  using Scalar = uint16_t;
  using Packed = Half;
  static Vec unpack(Packed p) {
#if defined(__AVX512F__)
    return float_of((Bits)_mm512_cvtepu16_epi32((__m256i)p) << 16);  // GCC widens the halves one after the other
#else
    return float_of(__builtin_convertvector(p, Bits) << 16);
#endif
  }
  static Packed pack(Vec v) {
#if defined(__AVX512BF16__)
    return (Half)_mm512_cvtneps_pbh((__m512)v);  // takes subnormal numbers for zero
#else
    const Bits bits = bits_of(v);
    const Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    return __builtin_convertvector(v == v ? rounded : Bits{} + 0x7FC0, Half);
#endif
  }
};

struct Float16 {
  using Scalar = uint16_t;
  using Packed = Half;
  static Vec unpack(Packed p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps((__m256i)p);
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps((__m128i)p);
#else
    // The exponent is moved by a multiplication; subnormals are told from a float whose last bits they fill.
    const Bits bits = __builtin_convertvector(p, Bits) << 16, shifted = bits + bits;
    const Vec normal = float_of((shifted >> 4) + (0xE0u << 23)) * 0x1p-112f;
    const Vec subnormal = float_of((shifted >> 17) | (126u << 23)) - 0.5f;
    const Bits magnitude = shifted < (1u << 27) ? bits_of(subnormal) : bits_of(normal);
    return float_of((bits & 0x80000000u) | magnitude);
#endif
  }
  static Packed pack(Vec v) {
#if defined(__AVX512F__)
    return (Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    // Adding a power of two that depends on the exponent rounds the significand to the bits that are kept.
    const Bits bits = bits_of(v), shifted = bits + bits, sign = bits & 0x80000000u;
    const Vec scaled = float_of(bits & 0x7FFFFFFFu) * 0x1p112f * 0x1p-110f;
    const Bits exponent = shifted & 0xFF000000u;
    const Bits bias = exponent < 0x71000000u ? Bits{} + 0x71000000u : exponent;
    const Bits rounded = bits_of(float_of((bias >> 1) + 0x07800000u) + scaled);
    const Bits magnitude = ((rounded >> 13) & 0x7C00u) + (rounded & 0x0FFFu);
    return __builtin_convertvector((sign >> 16) | (shifted > 0xFF000000u ? Bits{} + 0x7E00u : magnitude), Half);
#endif
  }
};

// How many lanes a step takes: All but in the last step, which takes a Some.

struct All {
  static constexpr int count = kLanes;
};
struct Some {
  int count;
};

// Bits of the lanes of a vector whose first element has this offset. They are written in whole bytes, so that vectors
// begin at multiples of the smaller of their lanes and eight.

template <class Lanes>
void store_bits(uint8_t* bits, int64_t offset, uint32_t value, Lanes lanes) {
  bits += offset / 8;
  if (kLanes < 8 && offset % 8) bits[0] |= static_cast<uint8_t>(value << offset % 8);
  else
    for (int b = 0; 8 * b < lanes.count; ++b) bits[b] = static_cast<uint8_t>(value >> 8 * b);
}

// Reads up to three bytes further than the last bit.
inline uint32_t load_bits(const uint8_t* bits, int64_t offset) {
  uint32_t value;
  std::memcpy(&value, bits + offset / 8, sizeof value);
  return value >> offset % 8;
}

inline Vec keep_first(Vec v, All) { return v; }

inline Vec keep_first(Vec v, Some some) {
  Int index{};
  for (int l = 0; l < kLanes; ++l) index[l] = l;  // a constant
  return index < some.count ? v : Vec{};
}

template <class T>
Vec load(const typename T::Scalar* p, All) {
  typename T::Packed packed;
  std::memcpy(&packed, p, sizeof packed);
  return T::unpack(packed);
}

template <class T>
Vec load(const typename T::Scalar* p, Some some) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << some.count) - 1);
  if constexpr (sizeof *p == 4) return T::unpack((typename T::Packed)_mm512_maskz_loadu_ps(mask, p));
  else return T::unpack((typename T::Packed)_mm256_maskz_loadu_epi16(mask, p));
#else
  typename T::Packed packed{};
  for (int l = 0; l < kLanes; ++l)
    if (l < some.count) packed[l] = p[l];
  return T::unpack(packed);
#endif
}

template <class T>
void store(typename T::Scalar* p, Vec v, Some some) {
  const typename T::Packed packed = T::pack(v);
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << some.count) - 1);
  if constexpr (sizeof *p == 4) _mm512_mask_storeu_ps(p, mask, (__m512)packed);
  else _mm256_mask_storeu_epi16(p, mask, (__m256i)packed);
#else
  for (int l = 0; l < kLanes; ++l)
    if (l < some.count) p[l] = packed[l];
#endif
}

template <class T>
void store(typename T::Scalar* p, Vec v, All) {
  const typename T::Packed packed = T::pack(v);
  std::memcpy(p, &packed, sizeof packed);
}

// Past the caches: the line is written without being read first. The address must be aligned to the vector.
template <class T>
void stream(typename T::Scalar* p, Vec v) {
  const typename T::Packed packed = T::pack(v);
#if defined(__clang__)
  __builtin_nontemporal_store(packed, reinterpret_cast<typename T::Packed*>(p));
#elif defined(__AVX512F__)
  if constexpr (sizeof packed == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)packed);
  else _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)packed);
#elif defined(__AVX__)
  if constexpr (sizeof packed == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)packed);
  else _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)packed);
#else
  std::memcpy(p, &packed, sizeof packed);
#endif
}

// Calls body(i, lanes) for the vectors of [0, n).
template <class Body>
inline __attribute__((always_inline)) void each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, All{});
  if (i < n) body(i, Some{static_cast<int>(n - i)});
}

// Calls body(i, lanes, slot) likewise. What is added up in a sum a slot does not wait for the addition before.
constexpr int kSlots = 4;

template <class Body>
inline __attribute__((always_inline)) void each_vector_in_slots(int64_t n, Body body) {
  constexpr int64_t kTurn = kSlots * kLanes;
  int64_t i = 0;
  for (; i + kTurn <= n; i += kTurn) {
#pragma GCC unroll kSlots
    for (int slot = 0; slot < kSlots; ++slot) body(i + slot * kLanes, All{}, slot);
  }
  each_vector(n - i, [&](int64_t k, auto lanes) { body(i + k, lanes, 0); });
}

// A sum in as many parts as there are slots.
struct SlotSums {
  Vec parts[kSlots]{};
  Vec total() const { return (parts[0] + parts[1]) + (parts[2] + parts[3]); }
};

}  // namespace leannorm::LEANNORM_ISA
