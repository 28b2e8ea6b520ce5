// Products of stored int4, int8 and bfloat16 weights with activations; see native_dot.h. The vectors are those of the
// instruction set that the compiler was told to use: 64 bytes with AVX-512, 32 with AVX2, 16 otherwise.

#include "native_dot.h"

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

// Told what comes next, the processor reads while it computes. With many terms the arithmetic takes longer anyway.
template <int TOKENS> inline void ahead(const void* p) {
  if (TOKENS < 4) __builtin_prefetch(static_cast<const uint8_t*>(p) + 2048);
}

// the factors of a block of 2 * kBytes int4 columns, spread over the lanes that hold each group's sum
template <int GROUP> inline VF spread(const float* factor, int64_t block) {
  const float* f = factor + block * 2 * kBytes / GROUP;
#if defined(__AVX512BW__)
  if (GROUP == 64)
    return (VF)_mm512_insertf32x8(_mm512_set1_ps(f[0]), _mm256_broadcast_ss(f + 1), 1);
  const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return (VF)_mm512_permutexvar_ps(lane, _mm512_broadcast_f32x4(_mm_loadu_ps(f)));
#elif defined(__AVX2__)
  if (GROUP == 64) return (VF)_mm256_broadcast_ss(f);
  return (VF)_mm256_blend_ps(_mm256_broadcast_ss(f), _mm256_broadcast_ss(f + 1), 0xf0);
#else
  return VF{} + f[0];
#endif
}

inline float total(VF v) {
  // halves are added, so the order does not depend on the compiler
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) v[j] += v[j + width];
  return v[0];
}

// A prepared term: int16 [blocks][kBytes * 2], int32 [blocks][kLanes] of -8 times sums, float [groups] of powers of two
inline int64_t blocks_of(int64_t columns) { return (columns + 2 * kBytes - 1) / (2 * kBytes); }
inline int64_t offset_at(int64_t columns) { return blocks_of(columns) * 4 * kBytes; }
inline int64_t factor_at(int64_t columns) { return blocks_of(columns) * 5 * kBytes; }
int64_t size(int64_t columns, int64_t group) { return (factor_at(columns) + columns / group * 4 + 127) / 64 * 64; }

void clear(int64_t columns, int64_t, uint8_t* term) {
  // the columns of the last block that a row does not have
  std::memset(term + offset_at(columns) - 4 * kBytes, 0, 4 * kBytes);
  std::memset(term + factor_at(columns) - kBytes, 0, kBytes);
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

void prepare4(const float* x, int64_t start, int64_t columns, int64_t group, uint8_t* term, float* residual) {
  int32_t whole[64];
  const float factor = integers(x, group, whole, residual);
  int16_t* lanes = reinterpret_cast<int16_t*>(term);
  int32_t* offset = reinterpret_cast<int32_t*>(term + offset_at(columns));
  reinterpret_cast<float*>(term + factor_at(columns))[start / group] = factor;
  for (int64_t word = 0; word < group / 8; ++word) {
    const int64_t column = start + 8 * word, block = column / (2 * kBytes), inside = column % (2 * kBytes);
    int32_t sum = 0;
    for (int64_t i = 0; i < 8; ++i) {
      const int32_t value = whole[8 * word + i];
      lanes[block * 2 * kBytes + i % 4 * (kBytes / 2) + (inside + i) / 4] = static_cast<int16_t>(value);
      sum += value;
    }
    offset[column / 8] = -8 * sum;
  }
}

void prepare8(const float* x, int64_t start, int64_t columns, int64_t group, uint8_t* term, float* residual) {
  int32_t whole[64];
  reinterpret_cast<float*>(term + factor_at(columns))[start / group] = integers(x, group, whole, residual);
  int16_t* lanes = reinterpret_cast<int16_t*>(term) + start;
  for (int64_t i = 0; i < group; ++i) lanes[i] = static_cast<int16_t>(whole[i]);
}

inline float half(uint16_t h) {
  // the exponent moved to float32's place, then a product that also makes subnormals right
  const uint32_t bits = static_cast<uint32_t>(h & 0x7fff) << 13, sign = static_cast<uint32_t>(h & 0x8000) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  uint32_t out;
  std::memcpy(&out, &value, 4);
  out |= sign;
  std::memcpy(&value, &out, 4);
  return value;
}

// the scales of one row times each term's powers of two
template <int TOKENS, float (*WIDEN)(uint16_t)>
inline void factors(const uint16_t* scale, int64_t groups, int64_t columns, const uint8_t* const* terms, float* out) {
  for (int t = 0; t < TOKENS; ++t) {
    const float* by = reinterpret_cast<const float*>(terms[t] + factor_at(columns));
    float* to = out + t * (groups + 16);
    for (int64_t g = 0; g < groups; ++g) to[g] = WIDEN(scale[g]) * by[g];
    for (int64_t g = groups; g < groups + 4; ++g) to[g] = 0;
  }
}

// one row at a time, since one stream of bytes is what processors read fastest; terms share its codes
template <int GROUP, int TOKENS> struct Row4 {
  static int64_t bytes(int64_t columns) { return columns / 2; }

  static void run(const uint8_t* weight, const uint16_t* scale, int64_t columns, const uint8_t* const* terms,
                  float* scratch, float* out, int64_t stride) {
    const int64_t groups = columns / GROUP, whole = columns / 2 / kBytes, rest = columns / 2 % kBytes;
    const int64_t offsets = offset_at(columns);
    factors<TOKENS, widen>(scale, groups, columns, terms, scratch);
    VF sum[TOKENS] = {};
    auto block = [&](VU16 v, int64_t b) __attribute__((always_inline)) {
      const VI16 n0 = (VI16)(v & 15), n1 = (VI16)((v >> 4) & 15), n2 = (VI16)((v >> 8) & 15), n3 = (VI16)(v >> 12);
      for (int t = 0; t < TOKENS; ++t) {
        const uint8_t* x = terms[t] + b * 4 * kBytes;
        VI32 dot = load<VI32>(terms[t] + offsets + b * kBytes);
        dot = madd(dot, n0, load<VI16>(x));
        dot = madd(dot, n1, load<VI16>(x + kBytes));
        dot = madd(dot, n2, load<VI16>(x + 2 * kBytes));
        dot = madd(dot, n3, load<VI16>(x + 3 * kBytes));
        sum[t] += to_float(dot) * spread<GROUP>(scratch + t * (groups + 16), b);
      }
    };
    for (int64_t b = 0; b < whole; ++b) {
      ahead<TOKENS>(weight + b * kBytes);
      block(load<VU16>(weight + b * kBytes), b);
    }
    if (rest) block(load_part<VU16>(weight + whole * kBytes, rest), whole);
    for (int t = 0; t < TOKENS; ++t) out[t * stride] = total(sum[t]);
  }
};

template <int GROUP, int TOKENS> struct Row8 {
  static_assert(GROUP == 32, "int8 has a scale for 32 columns");
  static int64_t bytes(int64_t columns) { return columns; }

  static void run(const uint8_t* weight, const uint16_t* scale, int64_t columns, const uint8_t* const* terms,
                  float* scratch, float* out, int64_t stride) {
    constexpr int kStep = kBytes / 2;  // codes that one vector of 16-bit integers holds
    const int64_t groups = columns / GROUP;
    factors<TOKENS, half>(scale, groups, columns, terms, scratch);
    VF sum[TOKENS] = {};
    for (int64_t g = 0; g < groups; ++g) {
      ahead<TOKENS>(weight + g * GROUP);
      VI16 codes[GROUP / kStep];
      for (int i = 0; i < GROUP / kStep; ++i)
        codes[i] = __builtin_convertvector(load<VI8>(weight + g * GROUP + i * kStep), VI16);
      for (int t = 0; t < TOKENS; ++t) {
        VI32 dot = {};
        for (int i = 0; i < GROUP / kStep; ++i)
          dot = madd(dot, codes[i], load<VI16>(terms[t] + (g * GROUP + i * kStep) * 2));
        sum[t] += to_float(dot) * scratch[t * (groups + 16) + g];
      }
    }
    for (int t = 0; t < TOKENS; ++t) out[t * stride] = total(sum[t]);
  }
};

template <typename ROW>
void over_rows(const uint8_t* weight, const uint16_t* scale, int64_t groups, int64_t rows, int64_t columns,
               const uint8_t* const* terms, float* scratch, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    ROW::run(weight + r * ROW::bytes(columns), scale + r * groups, columns, terms, scratch, out + r, stride);
}

template <template <int, int> class ROW, int GROUP>
void over_terms(const uint8_t* weight, const uint16_t* scale, int64_t rows, int64_t columns, const uint8_t* const* terms,
                int64_t count, float* scratch, float* out, int64_t stride) {
  const int64_t groups = columns / GROUP;
  int64_t t = 0;
  for (; t + 4 <= count; t += 4)
    over_rows<ROW<GROUP, 4>>(weight, scale, groups, rows, columns, terms + t, scratch, out + t * stride, stride);
  for (; t + 2 <= count; t += 2)
    over_rows<ROW<GROUP, 2>>(weight, scale, groups, rows, columns, terms + t, scratch, out + t * stride, stride);
  for (; t < count; ++t)
    over_rows<ROW<GROUP, 1>>(weight, scale, groups, rows, columns, terms + t, scratch, out + t * stride, stride);
}

void dot4(const uint8_t* weight, const uint16_t* scale, int64_t rows, int64_t columns, int64_t group,
          const uint8_t* const* terms, int64_t count, float* scratch, float* out, int64_t stride) {
  if (group == 64)
    over_terms<Row4, 64>(weight, scale, rows, columns, terms, count, scratch, out, stride);
  else
    over_terms<Row4, 32>(weight, scale, rows, columns, terms, count, scratch, out, stride);
}

void dot8(const uint8_t* weight, const uint16_t* scale, int64_t rows, int64_t columns, int64_t,
          const uint8_t* const* terms, int64_t count, float* scratch, float* out, int64_t stride) {
  over_terms<Row8, 32>(weight, scale, rows, columns, terms, count, scratch, out, stride);
}

// --- bfloat16: each block of 2 * kLanes columns as the even ones, then the odd ones

int64_t size16(int64_t columns) { return (columns + 2 * kLanes - 1) / (2 * kLanes) * 2 * kBytes; }

void prepare16(const float* x, int64_t columns, float* term) {
  std::memset(term, 0, static_cast<size_t>(size16(columns)));
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t block = c / (2 * kLanes), inside = c % (2 * kLanes);
    term[block * 2 * kLanes + inside % 2 * kLanes + inside / 2] = x[c];
  }
}

template <int ROWS, int TOKENS>
inline void tile16(const uint16_t* weight, int64_t columns, const uint8_t* const* terms, float* out, int64_t stride) {
  const int64_t whole = columns / (2 * kLanes), rest = columns % (2 * kLanes);
  VF sum[ROWS][TOKENS] = {};
  auto block = [&](const VU32* pairs, int64_t b) __attribute__((always_inline)) {
    for (int r = 0; r < ROWS; ++r) {
      const VF even = (VF)(pairs[r] << 16), odd = (VF)(pairs[r] & 0xffff0000u);
      for (int t = 0; t < TOKENS; ++t) {
        sum[r][t] += even * load<VF>(terms[t] + b * 2 * kBytes);
        sum[r][t] += odd * load<VF>(terms[t] + b * 2 * kBytes + kBytes);
      }
    }
  };
  VU32 pairs[ROWS];
  for (int64_t b = 0; b < whole; ++b) {
    for (int r = 0; r < ROWS; ++r) {
      pairs[r] = load<VU32>(weight + r * columns + b * 2 * kLanes);
      ahead<TOKENS>(weight + r * columns + b * 2 * kLanes);
    }
    block(pairs, b);
  }
  if (rest) {
    for (int r = 0; r < ROWS; ++r) pairs[r] = load_part<VU32>(weight + r * columns + whole * 2 * kLanes, 2 * rest);
    block(pairs, whole);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) out[t * stride + r] = total(sum[r][t]);
}

template <int ROWS, int TOKENS>
void rows16(const uint16_t* weight, int64_t rows, int64_t columns, const uint8_t* const* terms, float* out,
            int64_t stride) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) tile16<ROWS, TOKENS>(weight + r * columns, columns, terms, out + r, stride);
  for (; r < rows; ++r) tile16<1, TOKENS>(weight + r * columns, columns, terms, out + r, stride);
}

void dot16(const uint16_t* weight, int64_t rows, int64_t columns, const uint8_t* const* terms, int64_t count, float* out,
           int64_t stride) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) rows16<2, 4>(weight, rows, columns, terms + t, out + t * stride, stride);
  for (; t + 2 <= count; t += 2) rows16<1, 2>(weight, rows, columns, terms + t, out + t * stride, stride);
  for (; t < count; ++t) rows16<1, 1>(weight, rows, columns, terms + t, out + t * stride, stride);
}

void activate(const float* gate_up, const float* bias, int64_t width, float limit, float alpha, float* out) {
  for (int64_t f = 0; f < width; ++f) {
    float gate = gate_up[2 * f] + bias[2 * f], up = gate_up[2 * f + 1] + bias[2 * f + 1];
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : (up < -limit ? -limit : up);
    out[f] = (up + 1.0f) * gate / (1.0f + exponential(-alpha * gate));
  }
}

}  // namespace

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define JOINED(a, b) a##b
#define TABLE(name) JOINED(dot_kernels_, name)

// ISA: given on the command line
extern "C" const DotKernels TABLE(ISA) = {TEXT(ISA), kBytes, size,      prepare4,  prepare8, clear,
                                          dot4,      dot8,   size16,    prepare16, dot16,    activate};
