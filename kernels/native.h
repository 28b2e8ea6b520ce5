// Shared by native_solve.cpp and native_passes.cpp, which kernels/native.py compiles into one library at first use. Plain
// C interface, no torch headers. Every function works in the calling thread, and is defined by the torch code it stands in
// for (named at each).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

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

// A grid of kernels.grids: E2M1 in halves, or all whole numbers from low to high.
struct Grid {
  int64_t low, high;
  bool halves;
};

template <typename V, typename T> inline V on_grid(V x, const Grid& grid) {
  return grid.halves ? nearest_half<V, T>(x) : nearest_code<V, T>(x, T(grid.low), T(grid.high));
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
