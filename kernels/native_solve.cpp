// Dependent column steps and scale searches: loops that torch cannot run fast. See native.h.

#include "native.h"

namespace {

constexpr int kMaxBlock = 128;  // columns of one block, at most

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
               const int64_t* order, int64_t group, const Grid& grid) {
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
      const V code = on_grid<V, T>(value[v] / s, grid);
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
                int8_t* codes, const T* scale, const int64_t* order, int64_t group, int64_t least, int64_t most, int64_t halves) {
  typedef typename Wide<T>::type V;
  constexpr int lanes = sizeof(V) / sizeof(T), NV = 4;
  const Block<T> b{low, width, columns, rows};
  const Grid grid{least, most, halves != 0};
  static thread_local T lower[kMaxBlock * kMaxBlock];
  copy_block(coupling, b, lower);
  int64_t row = 0;
  for (; row + NV * lanes <= rows; row += NV * lanes)
    gptq_tile<V, T, NV>(b, row, lower, state, delta, codes, scale, order, group, grid);
  for (; row + lanes <= rows; row += lanes)
    gptq_tile<V, T, 1>(b, row, lower, state, delta, codes, scale, order, group, grid);
  for (; row < rows; ++row) gptq_tile<T, T, 1>(b, row, lower, state, delta, codes, scale, order, group, grid);
}

template <typename V, typename T, int NV>
void refine_tile(const Block<T>& b, int64_t row, const T* hessian, const T* lower, T* state, T* delta, T* codes,
                 T* scale, const Grid& grid) {
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
      const T wanted = grid.halves ? power_scale<T>(refit) : round_scale<T>(refit);
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
      const V fresh = on_grid<V, T>(old + push[v] / (diagonal * now[v]), grid);
      change[k][v] = (fresh - old) * now[v];
      store<V>(codes_k + v * lanes, fresh);
      store<V>(delta_k + v * lanes, fresh * now[v] - old * before[v]);
    }
  }
}

// quantize.gptq.refine, one group of columns; `scale` is that group's row of scales
template <typename T>
void refine_block(int64_t low, int64_t width, int64_t columns, int64_t rows, const T* hessian, T* state, T* delta,
                  T* codes, T* scale, int64_t least, int64_t most, int64_t halves) {
  typedef typename Wide<T>::type V;
  constexpr int lanes = sizeof(V) / sizeof(T), NV = 2;
  const Block<T> b{low, width, columns, rows};
  const Grid grid{least, most, halves != 0};
  static thread_local T lower[kMaxBlock * kMaxBlock];
  copy_block(hessian, b, lower);
  int64_t row = 0;
  for (; row + NV * lanes <= rows; row += NV * lanes)
    refine_tile<V, T, NV>(b, row, hessian, lower, state, delta, codes, scale, grid);
  for (; row + lanes <= rows; row += lanes)
    refine_tile<V, T, 1>(b, row, hessian, lower, state, delta, codes, scale, grid);
  for (; row < rows; ++row) refine_tile<T, T, 1>(b, row, hessian, lower, state, delta, codes, scale, grid);
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
                  int64_t ratios, const T* extra, int64_t extras, int64_t least, int64_t most, T* scale) {
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
      const T full = (high >= -low ? high : low) / T(least);
      T best_gain = 0, best = full;
      for (int64_t c = 0; c < ratios + extras; ++c) {
        const T candidate = c < ratios ? full * ratio[c] : extra[(n * groups + g) * extras + c - ratios];
        const T inverse = candidate == 0 ? T(0) : T(1) / candidate;
        V cross = {}, power = {};
        for (int64_t k = 0; k < group; k += lanes) {
          const V weights = load<V>(w + k), weighted = load<V>(h + k);
          const V code = nearest_code<V, T>(weights * inverse, T(least), T(most)) * weighted;
          const V plain = nearest_code<V, T>(weights * inverse, T(least), T(most));
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

}  // namespace

#define BOTH(name, parameters, arguments)                       \
  EXPORT void name##_f32 parameters(float) { name<float> arguments; } \
  EXPORT void name##_f64 parameters(double) { name<double> arguments; }

#define GPTQ(T)                                                                                                 \
  (int64_t low, int64_t width, int64_t columns, int64_t rows, const T* coupling, const T* state, T* delta, int8_t* codes, \
   const T* scale, const int64_t* order, int64_t group, int64_t least, int64_t most, int64_t halves)
BOTH(gptq_block, GPTQ, (low, width, columns, rows, coupling, state, delta, codes, scale, order, group, least, most, halves))

#define REFINE(T) \
  (int64_t low, int64_t width, int64_t columns, int64_t rows, const T* hessian, T* state, T* delta, T* codes, T* scale, \
   int64_t least, int64_t most, int64_t halves)
BOTH(refine_block, REFINE, (low, width, columns, rows, hessian, state, delta, codes, scale, least, most, halves))

#define SEARCH(T)                                                                                                    \
  (int64_t rows, int64_t columns, int64_t group, const T* weight, const T* importance, const T* ratio, int64_t ratios, \
   const T* extra, int64_t extras, int64_t least, int64_t most, T* scale)
BOTH(search_scale, SEARCH, (rows, columns, group, weight, importance, ratio, ratios, extra, extras, least, most, scale))

// quantize.awq: column c of the weight times fold[c], rounded to nearest under the signed full-range group scale, and
// divided by fold[c] again
EXPORT void round_signed(int64_t rows, int64_t columns, int64_t group, int64_t least, int64_t most, const float* weight,
                         const float* fold, uint16_t* out) {
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
      const float scale = round_scale<float>((high >= -low ? high : low) / static_cast<float>(least));
      for (int64_t k = 0; k < group; ++k) {
        const float code = nearest_code<float, float>(folded[k] / scale, static_cast<float>(least), static_cast<float>(most));
        out[n * columns + start + k] = narrow(code * scale / fold[start + k]);
      }
    }
  }
}
