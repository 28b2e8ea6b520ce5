// Products of stored int4, int8 and bfloat16 weights with activations; see native_dot.h. Those of 2 and 3 bits are in
// native_planes.h, the vectors in native_vectors.h.

#include "native_dot.h"

#include "native_planes.h"
#include "native_vectors.h"

namespace {

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

template <template <int, int> class ROW>
void dot(const uint8_t* weight, const uint16_t* scale, int64_t rows, int64_t columns, int64_t group,
         const uint8_t* const* terms, int64_t count, float* scratch, float* out, int64_t stride) {
  if (group == 64)
    over_terms<ROW, 64>(weight, scale, rows, columns, terms, count, scratch, out, stride);
  else
    over_terms<ROW, 32>(weight, scale, rows, columns, terms, count, scratch, out, stride);
}

template <int GROUP, int TOKENS> using Row2 = RowPlanes<2, GROUP, TOKENS>;
template <int GROUP, int TOKENS> using Row3 = RowPlanes<3, GROUP, TOKENS>;

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
extern "C" const DotKernels TABLE(ISA) = {
    TEXT(ISA),
    kBytes,
    {planes_size, prepare_planes<2>, planes_clear, dot<Row2>},
    {planes_size, prepare_planes<3>, planes_clear, dot<Row3>},
    {size, prepare4, clear, dot<Row4>},
    {size, prepare8, clear, dot8},
    size16,
    prepare16,
    dot16,
    activate,
};
