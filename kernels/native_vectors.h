// Vectors of the instruction set that the compiler was told to use, 64 bytes with AVX-512, 32 with AVX2, 16 otherwise, and
// what all products of native_dot.cpp and native_planes.h do with them.
#pragma once
#include "native.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512BW__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;

typedef uint16_t VU16 __attribute__((vector_size(kBytes)));
typedef int16_t VI16 __attribute__((vector_size(kBytes)));
typedef int8_t VI8 __attribute__((vector_size(kBytes / 2)));
typedef int32_t VI32 __attribute__((vector_size(kBytes)));
typedef uint32_t VU32 __attribute__((vector_size(kBytes)));
typedef float VF __attribute__((vector_size(kBytes)));

// sum[j] + the products of neighbouring pairs; only totals over a group are used, so pairs may fall on other lanes
inline VI32 madd(VI32 sum, VI16 a, VI16 b) {
#if defined(__AVX512VNNI__)
  return (VI32)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (VI32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (VI32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sum + (VI32)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__ARM_NEON)
  const int32x4_t low = vmlal_s16((int32x4_t)sum, vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
  return (VI32)vmlal_s16(low, vget_high_s16((int16x8_t)a), vget_high_s16((int16x8_t)b));
#else
  for (int j = 0; j < kLanes; ++j) sum[j] += int32_t(a[2 * j]) * b[2 * j] + int32_t(a[2 * j + 1]) * b[2 * j + 1];
  return sum;
#endif
}

inline VF to_float(VI32 v) { return __builtin_convertvector(v, VF); }

// the first `bytes` bytes at p, then zeros
template <typename V> inline V load_part(const void* p, int64_t bytes) {
#if defined(__AVX512BW__)
  return (V)_mm512_maskz_loadu_epi8((__mmask64)((1ull << bytes) - 1), p);
#else
  V v = {};
  std::memcpy(&v, p, static_cast<size_t>(bytes));
  return v;
#endif
}

// the same where `bytes` is a multiple of 4
template <typename V> inline V load_words(const void* p, int64_t bytes) {
#if defined(__AVX2__) && !defined(__AVX512BW__)
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(bytes / 4)), lane);
  return (V)_mm256_maskload_epi32(static_cast<const int*>(p), mask);
#else
  return load_part<V>(p, bytes);
#endif
}

// Told what comes next, the processor reads while it computes. With many terms the arithmetic takes longer anyway.
template <int TOKENS> inline void ahead(const void* p) {
  if (TOKENS < 4) __builtin_prefetch(static_cast<const uint8_t*>(p) + 2048);
}

inline float total(VF v) {
  // halves are added, so the order does not depend on the compiler
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) v[j] += v[j + width];
  return v[0];
}

// x / factor rounded to integers of at most 15 bits; returns the factor, a power of two (NaN if x has no finite largest)
inline float integers(const float* x, int64_t group, int32_t* whole, float* residual) {
  uint32_t top = 0;
  for (int64_t i = 0; i < group; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  uint32_t exponent = top >> 23;
  const bool finite = exponent < 255;
  exponent = exponent < 30 ? 30 : (exponent > 254 ? 254 : exponent);
  const uint32_t down = (exponent - 14) << 23, up = (254 + 14 - exponent) << 23;
  float factor, inverse;
  std::memcpy(&factor, &down, 4);
  std::memcpy(&inverse, &up, 4);
  for (int64_t i = 0; i < group; ++i) {
    float v = (x[i] * inverse + 12582912.0f) - 12582912.0f;
    v = v > 32767.0f ? 32767.0f : v;
    v = finite ? v : 0.0f;
    whole[i] = static_cast<int32_t>(v);
    if (residual != nullptr) residual[i] = x[i] - v * factor;
  }
  return finite ? factor : __builtin_nanf("");
}

}  // namespace
