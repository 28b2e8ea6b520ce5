// The loops that torch cannot run fast: dependent column steps and fused elementwise passes. Plain C interface, no
// torch headers; kernels/native.py compiles this once and calls it. Every function works on one expert in the calling
// thread, in float or double, and is defined by the torch code it stands in for (named at each).

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kMaxBlock = 128;  // columns of one block, at most

// A row tile is kVectors vectors of 64 bytes; leftovers go one row at a time, with the same arithmetic.
typedef float F16 __attribute__((vector_size(64)));
typedef double D8 __attribute__((vector_size(64)));

template <typename T> struct Wide;
template <> struct Wide<float> { typedef F16 type; };
template <> struct Wide<double> { typedef D8 type; };

template <typename V, typename T> inline V load(const T* p) { V v; std::memcpy(&v, p, sizeof(V)); return v; }
template <typename V, typename T> inline void store(T* p, V v) { std::memcpy(p, &v, sizeof(V)); }
template <typename V> inline V lower_of(V a, V b) { return a < b ? a : b; }
template <typename V> inline V upper_of(V a, V b) { return a > b ? a : b; }
template <typename V, typename T> inline V broadcast(T x) { return V{} + x; }

// Adding and taking away 1.5 * 2^mantissa rounds to the nearest integer, ties to even, for small numbers.
template <typename T> constexpr T kMagic = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);

template <typename V, typename T> inline V nearest_code(V x, T low, T high) {
  x = upper_of<V>(lower_of<V>(x, broadcast<V>(high)), broadcast<V>(low));
  return (x + kMagic<T>) - kMagic<T>;
}

// kernels.grids.nearest_halves: the nearest of 0, 1, 2, 3, 4, 6, 8, 12 and their negatives; gaps of 1, 2 and 4
template <typename V, typename T> inline V nearest_half(V x) {
  x = upper_of<V>(lower_of<V>(x, broadcast<V>(T(12))), broadcast<V>(T(-12)));
  const V size = upper_of<V>(x, -x), one = broadcast<V>(T(1));
  const V gap = size < T(4) ? one : (size < T(8) ? one * T(2) : one * T(4));
  return ((x / gap + kMagic<T>) - kMagic<T>) * gap;
}

// the code on a grid: kernels.grids.MXFP4 with `halves`, INT4 without
template <typename V, typename T> inline V on_grid(V x, bool halves) {
  return halves ? nearest_half<V, T>(x) : nearest_code<V, T>(x, T(-8), T(7));
}

// kernels.int4.round_scale: nearest bfloat16, magnitude within [2^-17, 65280].
template <typename T> inline T round_scale(T x) {
  float value = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits += 0x7fff + ((bits >> 16) & 1);
  bits &= 0xffff0000u;
  std::memcpy(&value, &bits, 4);
  float magnitude = std::fabs(value);
  if (magnitude < 0x1p-17f) magnitude = 0x1p-17f;
  if (magnitude > 65280.0f) magnitude = 65280.0f;
  return static_cast<T>(value < 0 ? -magnitude : magnitude);
}

// kernels.grids.power_scale: nearest power of two in ratio, within [2^-60, 2^60]
template <typename T> inline T power_scale(T x) {
  const T low = T(0x1p-60), high = T(0x1p60);
  return std::exp2(std::nearbyint(std::log2(x < low ? low : x > high ? high : x)));
}

template <typename T> struct Block {
  int64_t low, width, columns, rows;  // first column, columns of the block; K, N of the arrays
};

// lower[k][j] = coupling[low + j][low + k] for j < k (j <= k): what column j does to column k
template <typename T> void copy_block(const T* coupling, const Block<T>& b, T* out) {
  for (int64_t j = 0; j < b.width; ++j)
    for (int64_t k = j; k < b.width; ++k) out[k * kMaxBlock + j] = coupling[(b.low + j) * b.columns + b.low + k];
}

template <typename V, typename T, int NV>
void gptq_tile(const Block<T>& b, int64_t row, const T* lower, const T* state, T* delta, int8_t* codes, const T* scale,
               const int64_t* order, int64_t group, bool halves) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V done[kMaxBlock][NV];
  for (int64_t k = 0; k < b.width; ++k) {
    const int64_t column = order[b.low + k];
    const T* state_k = state + (b.low + k) * b.rows + row;
    V value[NV];
    for (int v = 0; v < NV; ++v) value[v] = load<V>(state_k + v * lanes);
    for (int64_t j = 0; j < k; ++j) {
      const V c = broadcast<V>(lower[k * kMaxBlock + j]);
      for (int v = 0; v < NV; ++v) value[v] -= c * done[j][v];
    }
    const T* scale_k = scale + (column / group) * b.rows + row;
    T* delta_k = delta + (b.low + k) * b.rows + row;
    int8_t* codes_k = codes + column * b.rows + row;
    for (int v = 0; v < NV; ++v) {
      const V s = load<V>(scale_k + v * lanes);
      const V code = on_grid<V, T>(value[v] / s, halves);
      done[k][v] = load<V>(delta_k + v * lanes) - code * s;
      store<V>(delta_k + v * lanes, done[k][v]);
      T spread[lanes];
      store<V>(spread, code);
      for (int i = 0; i < lanes; ++i) codes_k[v * lanes + i] = static_cast<int8_t>(spread[i]);
    }
  }
}

// quantize.gptq.gptq, one block of columns
template <typename T>
void gptq_block(int64_t low, int64_t width, int64_t columns, int64_t rows, const T* coupling, const T* state, T* delta,
                int8_t* codes, const T* scale, const int64_t* order, int64_t group, int64_t halves) {
  typedef typename Wide<T>::type V;
  constexpr int lanes = sizeof(V) / sizeof(T), NV = 4;
  const Block<T> b{low, width, columns, rows};
  static thread_local T lower[kMaxBlock * kMaxBlock];
  copy_block(coupling, b, lower);
  int64_t row = 0;
  for (; row + NV * lanes <= rows; row += NV * lanes)
    gptq_tile<V, T, NV>(b, row, lower, state, delta, codes, scale, order, group, halves != 0);
  for (; row + lanes <= rows; row += lanes)
    gptq_tile<V, T, 1>(b, row, lower, state, delta, codes, scale, order, group, halves != 0);
  for (; row < rows; ++row) gptq_tile<T, T, 1>(b, row, lower, state, delta, codes, scale, order, group, halves != 0);
}

template <typename V, typename T, int NV>
void refine_tile(const Block<T>& b, int64_t row, const T* hessian, const T* lower, T* state, T* delta, T* codes,
                 T* scale, bool halves) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V code[kMaxBlock][NV], change[kMaxBlock][NV], before[NV], now[NV], gain[NV] = {}, power[NV] = {};
  for (int v = 0; v < NV; ++v) before[v] = load<V>(scale + row + v * lanes);
  for (int64_t k = 0; k < b.width; ++k)
    for (int v = 0; v < NV; ++v) code[k][v] = load<V>(codes + (b.low + k) * b.rows + row + v * lanes);
  // the group's scale: s += u R / (u H u), kept where it lowers the objective after rounding
  for (int64_t i = 0; i < b.width; ++i) {
    const T* line = hessian + (b.low + i) * b.columns + b.low;
    V push[NV] = {};
    for (int64_t j = 0; j < b.width; ++j) {
      const V h = broadcast<V>(line[j]);
      for (int v = 0; v < NV; ++v) push[v] += h * code[j][v];
    }
    for (int v = 0; v < NV; ++v) {
      gain[v] += code[i][v] * load<V>(state + (b.low + i) * b.rows + row + v * lanes);
      power[v] += code[i][v] * push[v];
      change[i][v] = push[v];
    }
  }
  for (int v = 0; v < NV; ++v) {
    T g[lanes], p[lanes], s[lanes];
    store<V>(g, gain[v]);
    store<V>(p, power[v]);
    store<V>(s, before[v]);
    for (int i = 0; i < lanes; ++i) {
      const T refit = s[i] + (p[i] > 0 ? g[i] / p[i] : T(0));
      const T wanted = halves ? power_scale<T>(refit) : round_scale<T>(refit);
      const T step = wanted - s[i];
      if (step * (step * p[i] - 2 * g[i]) < 0) s[i] = wanted;
    }
    now[v] = load<V>(s);
    store<V>(scale + row + v * lanes, now[v]);
  }
  V value[kMaxBlock][NV];
  for (int64_t k = 0; k < b.width; ++k)
    for (int v = 0; v < NV; ++v)
      value[k][v] = load<V>(state + (b.low + k) * b.rows + row + v * lanes) - change[k][v] * (now[v] - before[v]);
  // the codes, one column after the other
  for (int64_t k = 0; k < b.width; ++k) {
    V push[NV];
    for (int v = 0; v < NV; ++v) push[v] = value[k][v];
    for (int64_t j = 0; j < k; ++j) {
      const V h = broadcast<V>(lower[k * kMaxBlock + j]);
      for (int v = 0; v < NV; ++v) push[v] -= h * change[j][v];
    }
    const T diagonal = lower[k * kMaxBlock + k];
    T* codes_k = codes + (b.low + k) * b.rows + row;
    T* delta_k = delta + (b.low + k) * b.rows + row;
    for (int v = 0; v < NV; ++v) {
      const V old = code[k][v];
      const V fresh = on_grid<V, T>(old + push[v] / (diagonal * now[v]), halves);
      change[k][v] = (fresh - old) * now[v];
      store<V>(codes_k + v * lanes, fresh);
      store<V>(delta_k + v * lanes, fresh * now[v] - old * before[v]);
    }
  }
}

// quantize.gptq.refine, one group of columns; `scale` is that group's row of scales
template <typename T>
void refine_block(int64_t low, int64_t width, int64_t columns, int64_t rows, const T* hessian, T* state, T* delta,
                  T* codes, T* scale, int64_t halves) {
  typedef typename Wide<T>::type V;
  constexpr int lanes = sizeof(V) / sizeof(T), NV = 2;
  const Block<T> b{low, width, columns, rows};
  static thread_local T lower[kMaxBlock * kMaxBlock];
  copy_block(hessian, b, lower);
  int64_t row = 0;
  for (; row + NV * lanes <= rows; row += NV * lanes)
    refine_tile<V, T, NV>(b, row, hessian, lower, state, delta, codes, scale, halves != 0);
  for (; row + lanes <= rows; row += lanes)
    refine_tile<V, T, 1>(b, row, hessian, lower, state, delta, codes, scale, halves != 0);
  for (; row < rows; ++row) refine_tile<T, T, 1>(b, row, hessian, lower, state, delta, codes, scale, halves != 0);
}

template <typename V, typename T> inline T total(V x) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  T parts[lanes], sum = 0;
  store<V>(parts, x);
  for (int i = 0; i < lanes; ++i) sum += parts[i];
  return sum;
}

// quantize.scales.searched_scale before rounding; weights [rows, columns], scales [rows, columns / group]
template <typename T>
void search_scale(int64_t rows, int64_t columns, int64_t group, const T* weight, const T* importance, const T* ratio,
                  int64_t ratios, const T* extra, int64_t extras, T* scale) {
  typedef typename Wide<T>::type V;
  constexpr int lanes = sizeof(V) / sizeof(T);
  const int64_t groups = columns / group;
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      const T* w = weight + n * columns + g * group;
      const T* h = importance + g * group;
      T high = w[0], low = w[0];
      for (int64_t k = 1; k < group; ++k) {
        high = high < w[k] ? w[k] : high;
        low = low > w[k] ? w[k] : low;
      }
      const T full = (high >= -low ? high : low) / T(-8);
      T best_gain = 0, best = full;
      for (int64_t c = 0; c < ratios + extras; ++c) {
        const T candidate = c < ratios ? full * ratio[c] : extra[(n * groups + g) * extras + c - ratios];
        const T inverse = candidate == 0 ? T(0) : T(1) / candidate;
        V cross = {}, power = {};
        for (int64_t k = 0; k < group; k += lanes) {
          const V weights = load<V>(w + k), weighted = load<V>(h + k);
          const V code = nearest_code<V, T>(weights * inverse, T(-8), T(7)) * weighted;
          const V plain = nearest_code<V, T>(weights * inverse, T(-8), T(7));
          cross += code * weights;
          power += code * plain;
        }
        const T x = total<V, T>(cross), p = total<V, T>(power);
        if (p > 0 && x * x / p > best_gain) {
          best_gain = x * x / p;
          best = x / p;
        }
      }
      scale[n * groups + g] = best;
    }
  }
}

inline float widen(uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x to 2e-7 relative, for |x| < 87: 2^n * p(r) with x = n ln 2 + r (Cephes' polynomial)
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : (x > 87.0f ? 87.0f : x);
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define BOTH(name, parameters, arguments)                       \
  EXPORT void name##_f32 parameters(float) { name<float> arguments; } \
  EXPORT void name##_f64 parameters(double) { name<double> arguments; }

#define GPTQ(T)                                                                                                 \
  (int64_t low, int64_t width, int64_t columns, int64_t rows, const T* coupling, const T* state, T* delta, int8_t* codes, \
   const T* scale, const int64_t* order, int64_t group, int64_t halves)
BOTH(gptq_block, GPTQ, (low, width, columns, rows, coupling, state, delta, codes, scale, order, group, halves))

#define REFINE(T) \
  (int64_t low, int64_t width, int64_t columns, int64_t rows, const T* hessian, T* state, T* delta, T* codes, T* scale, \
   int64_t halves)
BOTH(refine_block, REFINE, (low, width, columns, rows, hessian, state, delta, codes, scale, halves))

#define SEARCH(T)                                                                                                    \
  (int64_t rows, int64_t columns, int64_t group, const T* weight, const T* importance, const T* ratio, int64_t ratios, \
   const T* extra, int64_t extras, T* scale)
BOTH(search_scale, SEARCH, (rows, columns, group, weight, importance, ratio, ratios, extra, extras, scale))

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

// quantize.awq: column c of the weight times fold[c], rounded to nearest under the signed full-range group scale, and
// divided by fold[c] again
EXPORT void round_signed(int64_t rows, int64_t columns, int64_t group, const float* weight, const float* fold,
                         uint16_t* out) {
  float folded[1024];
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t start = 0; start < columns; start += group) {
      const float* w = weight + n * columns + start;
      float high = w[0] * fold[start], low = high;
      for (int64_t k = 0; k < group; ++k) {
        const float value = w[k] * fold[start + k];
        folded[k] = value;
        high = high < value ? value : high;
        low = low > value ? value : low;
      }
      const float scale = round_scale<float>((high >= -low ? high : low) / -8.0f);
      for (int64_t k = 0; k < group; ++k) {
        const float code = nearest_code<float, float>(folded[k] / scale, -8.0f, 7.0f);
        out[n * columns + start + k] = narrow(code * scale / fold[start + k]);
      }
    }
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
