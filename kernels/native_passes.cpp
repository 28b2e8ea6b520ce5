// Fused elementwise passes, and products of bfloat16 with float32 sums. See native.h.

#include "native.h"

// kernels.experts.swiglu, computed in float32: rows of 2F, gates then ups, to rows of F
namespace {
inline float widen(float value) { return value; }
inline void put(float* to, float value) { *to = value; }
inline void put(uint16_t* to, float value) { *to = narrow(value); }

template <typename T>
void swiglu(int64_t tokens, int64_t width, const T* gate_up, float limit, float alpha, T* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T* gates = gate_up + 2 * t * width;
    const T* ups = gates + width;
    for (int64_t f = 0; f < width; ++f) {
      float gate = widen(gates[f]), up = widen(ups[f]);
      gate = gate > limit ? limit : gate;
      up = up > limit ? limit : (up < -limit ? -limit : up);
      put(out + t * width + f, (up + 1.0f) * gate / (1.0f + exponential(-alpha * gate)));
    }
  }
}
}  // namespace

EXPORT void swiglu_bf16(int64_t tokens, int64_t width, const uint16_t* gate_up, float limit, float alpha, uint16_t* out) {
  swiglu<uint16_t>(tokens, width, gate_up, limit, alpha, out);
}
EXPORT void swiglu_f32(int64_t tokens, int64_t width, const float* gate_up, float limit, float alpha, float* out) {
  swiglu<float>(tokens, width, gate_up, limit, alpha, out);
}

// kernels.experts.swiglu_slope: the gradient by gates and ups, rows of 2F, of the gradient by the activations, rows of F
EXPORT void swiglu_slope_bf16(int64_t tokens, int64_t width, const uint16_t* gate_up, const uint16_t* slope, float limit,
                              float alpha, uint16_t* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    const uint16_t* gates = gate_up + 2 * t * width;
    const uint16_t* ups = gates + width;
    for (int64_t f = 0; f < width; ++f) {
      const float raw_gate = widen(gates[f]), raw_up = widen(ups[f]), down = widen(slope[t * width + f]);
      const float gate = raw_gate > limit ? limit : raw_gate;
      const float up = raw_up > limit ? limit : (raw_up < -limit ? -limit : raw_up);
      const float share = 1.0f / (1.0f + exponential(-alpha * gate)), glu = gate * share;
      const float by_gate = down * (up + 1.0f) * (share + alpha * glu * (1.0f - share)), by_up = down * glu;
      out[2 * t * width + f] = raw_gate <= limit ? narrow(by_gate) : 0;
      out[(2 * t + 1) * width + f] = raw_up <= limit && raw_up >= -limit ? narrow(by_up) : 0;
    }
  }
}

// calibration.moments: what the products of one block of tokens need, in bfloat16. scaled = (x - shift) root, and where
// there is an original input plain = x - shift, gap = (original - x) weight; sums of weight (x - shift) and gap are added
// up.
EXPORT void centre_bf16(int64_t tokens, int64_t columns, const uint16_t* x, const uint16_t* original, const float* weight,
                        const float* root, const float* shift, uint16_t* scaled, uint16_t* plain, uint16_t* gap,
                        float* sum, float* gap_sum) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float w = weight[t], r = root[t];
    const int64_t at = t * columns;
    for (int64_t k = 0; k < columns; ++k) {
      const float centred = widen(x[at + k]) - shift[k];
      sum[k] += w * centred;
      scaled[at + k] = narrow(r * centred);
    }
    if (original == nullptr) continue;
    for (int64_t k = 0; k < columns; ++k) {
      const float value = widen(x[at + k]);
      plain[at + k] = narrow(value - shift[k]);
      const uint16_t difference = narrow((widen(original[at + k]) - value) * w);
      gap[at + k] = difference;
      gap_sum[k] += widen(difference);
    }
  }
}

// kernels.int4: rows of `columns` codes, two to a byte, low half first and 8 more than they are, times the bfloat16 scale
// of their group, rounded to bfloat16 once
EXPORT void dequantize_bf16(int64_t rows, int64_t columns, int64_t group, const uint8_t* packed, const uint16_t* scale,
                            uint16_t* out) {
  for (int64_t block = 0; block < rows * columns / group; ++block) {
    const float s = widen(scale[block]);
    const uint8_t* pairs = packed + block * group / 2;
    uint32_t* to = reinterpret_cast<uint32_t*>(out + block * group);
    for (int64_t i = 0; i < group / 2; ++i) {
      const uint32_t low = narrow(static_cast<float>((pairs[i] & 15) - 8) * s);
      const uint32_t high = narrow(static_cast<float>((pairs[i] >> 4) - 8) * s);
      to[i] = low | high << 16;
    }
  }
}

// quantize.polish: the sum over each group of its codes times a gradient, packed as above, into float32 [rows, groups]
EXPORT void scale_gradient_bf16(int64_t rows, int64_t columns, int64_t group, const uint8_t* packed, const uint16_t* gradient,
                                float* out) {
  for (int64_t block = 0; block < rows * columns / group; ++block) {
    const uint8_t* pairs = packed + block * group / 2;
    const uint16_t* slope = gradient + block * group;
    float sum[16] = {};
    for (int64_t start = 0; start < group / 2; start += 16)
      for (int64_t i = 0; i < 16; ++i) {
        const uint8_t pair = pairs[start + i];
        sum[i] += static_cast<float>((pair & 15) - 8) * widen(slope[2 * (start + i)]) +
                  static_cast<float>((pair >> 4) - 8) * widen(slope[2 * (start + i) + 1]);
      }
    float all = 0;
    for (int64_t i = 0; i < 16; ++i) all += sum[i];
    out[block] = all;
  }
}

// Products of bfloat16 with float32 sums, which torch does not have on a CPU: C += A^T B over tokens. The operands are
// packed into panels of 16 columns, [panel][pair of tokens][16], two tokens to a 32-bit word, as VDPBF16PS wants them.

EXPORT void pack_pairs(int64_t tokens, int64_t columns, const uint16_t* x, int64_t first, int64_t step, uint32_t* out) {
  const int64_t pairs = (tokens + 1) / 2;
  for (int64_t panel = first; panel * 16 < columns; panel += step) {
    const int64_t start = panel * 16, count = columns - start < 16 ? columns - start : 16;
    for (int64_t p = 0; p < pairs; ++p) {
      const uint16_t* even = x + 2 * p * columns + start;
      const bool whole = 2 * p + 1 < tokens;
      uint32_t* to = out + (panel * pairs + p) * 16;
      for (int64_t i = 0; i < 16; ++i) {
        const uint32_t low = i < count ? even[i] : 0, high = i < count && whole ? even[columns + i] : 0;
        to[i] = low | high << 16;
      }
    }
  }
}

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int64_t kPairs = 128;  // pairs of tokens at a time: three panels of B then stay in the first-level cache

// rows [row, row + 8) of C from half a panel of A, columns of PANELS panels of B
template <int PANELS>
void product_tile(const uint32_t* a, const uint32_t* b, int64_t pairs, int64_t stride, float* c, int64_t columns,
                  int64_t rows, int64_t width) {
  __m512 sum[8][PANELS];
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < PANELS; ++j) sum[i][j] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh right[PANELS];
    for (int j = 0; j < PANELS; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + j * stride + p * 16);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[p * 16 + i]));
      for (int j = 0; j < PANELS; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < PANELS; ++j) {
      const int64_t left = width - 16 * j;
      const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      float* at = c + i * columns + 16 * j;
      _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sum[i][j]));
    }
}

}  // namespace

EXPORT int has_products() { return 1; }

// blocks of 8 rows first, first + step, ...; `symmetric`: tiles wholly below the diagonal are left out
EXPORT void add_product(int64_t pairs, int64_t columns, const uint32_t* a, const uint32_t* b, int64_t first, int64_t step,
                        int64_t symmetric, float* c) {
  const int64_t stride = pairs * 16;
  for (int64_t start = 0; start < pairs; start += kPairs) {
    const int64_t some = pairs - start < kPairs ? pairs - start : kPairs;
    for (int64_t column = 0; column < columns; column += 48) {
      const uint32_t* right = b + column / 16 * stride + start * 16;
      const int64_t width = columns - column < 48 ? columns - column : 48;
      for (int64_t block = first; block * 8 < columns; block += step) {
        const int64_t row = block * 8, rows = columns - row < 8 ? columns - row : 8;
        if (symmetric && column + width <= row) break;
        const uint32_t* left = a + row / 16 * stride + start * 16 + row % 16;
        float* out = c + row * columns + column;
        if (width > 32)
          product_tile<3>(left, right, some, stride, out, columns, rows, width);
        else if (width > 16)
          product_tile<2>(left, right, some, stride, out, columns, rows, width);
        else
          product_tile<1>(left, right, some, stride, out, columns, rows, width);
      }
    }
  }
}
#else
EXPORT int has_products() { return 0; }
EXPORT void add_product(int64_t, int64_t, const uint32_t*, const uint32_t*, int64_t, int64_t, int64_t, float*) {}
#endif
