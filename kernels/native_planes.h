// Rows of 2 and 3-bit codes in planes (kernels/planes.py says which bit lies where) times activations.
//
// A 16-bit lane of a plane holds the bits of 16 columns, so a vector of every plane, kBytes each, holds 8 * kBytes columns.
// Masks and shifts make four vectors of it whose nibbles are codes; a 32-bit lane of sums then holds 32 columns, a group or
// half of one.
#pragma once
#include "native_vectors.h"

namespace {

// A prepared term: int16 [blocks][16][kBytes / 2], int32 [blocks][kLanes] of -2^(bits-1) times the sums of 32 columns,
// float [groups] of powers of two
inline int64_t planes_blocks(int64_t columns) { return (columns + 8 * kBytes - 1) / (8 * kBytes); }
inline int64_t planes_offset(int64_t columns) { return planes_blocks(columns) * 16 * kBytes; }
inline int64_t planes_factor(int64_t columns) { return planes_blocks(columns) * 17 * kBytes; }
int64_t planes_size(int64_t columns, int64_t group) {
  return (planes_factor(columns) + columns / group * 4 + 127) / 64 * 64;
}

void planes_clear(int64_t columns, int64_t, uint8_t* term) {
  std::memset(term + planes_offset(columns) - 16 * kBytes, 0, 16 * kBytes);
  std::memset(term + planes_factor(columns) - kBytes, 0, kBytes);
}

template <int BITS>
void prepare_planes(const float* x, int64_t start, int64_t columns, int64_t group, uint8_t* term, float* residual) {
  int32_t whole[64];
  reinterpret_cast<float*>(term + planes_factor(columns))[start / group] = integers(x, group, whole, residual);
  int32_t* offset = reinterpret_cast<int32_t*>(term + planes_offset(columns));
  for (int64_t i = 0; i < group; i += 32) {
    const int64_t column = start + i, block = column / (8 * kBytes), lane = column % (8 * kBytes) / 16;
    int16_t* lanes = reinterpret_cast<int16_t*>(term) + block * 8 * kBytes + lane;
    int32_t sum = 0;
    for (int64_t k = 0; k < 32; ++k) {
      // of each vector of codes the four nibbles follow each other: code k % 4, nibble k / 4
      lanes[(k % 4 * 4 + k % 16 / 4) * (kBytes / 2) + k / 16] = static_cast<int16_t>(whole[i + k]);
      sum += whole[i + k];
    }
    offset[column / 32] = -(1 << (BITS - 1)) * sum;
  }
}

template <int BITS, int GROUP, int TOKENS> struct RowPlanes {
  static int64_t bytes(int64_t columns) { return columns / 8 * BITS; }

  static void run(const uint8_t* weight, const uint16_t* scale, int64_t columns, const uint8_t* const* terms,
                  float* scratch, float* out, int64_t stride) {
    const int64_t plane = columns / 8, whole = plane / kBytes, rest = plane % kBytes, sums = columns / 32;
    const int64_t offsets = planes_offset(columns), wide = sums + 16;
    for (int t = 0; t < TOKENS; ++t) {
      const float* by = reinterpret_cast<const float*>(terms[t] + planes_factor(columns));
      float* to = scratch + t * wide;
      for (int64_t g = 0; g < columns / GROUP; ++g)
        for (int i = 0; i < GROUP / 32; ++i) to[g * (GROUP / 32) + i] = widen(scale[g]) * by[g];
      for (int64_t i = sums; i < wide; ++i) to[i] = 0;
    }
    VF sum[TOKENS] = {};
    auto block = [&](VU16 low, VU16 middle, VU16 high, int64_t b) __attribute__((always_inline)) {
      VI32 dot[TOKENS];
      for (int t = 0; t < TOKENS; ++t) dot[t] = load<VI32>(terms[t] + offsets + b * kBytes);
      auto four = [&](VU16 v, int at) __attribute__((always_inline)) {
        const VI16 n0 = (VI16)(v & 15), n1 = (VI16)((v >> 4) & 15), n2 = (VI16)((v >> 8) & 15), n3 = (VI16)(v >> 12);
        for (int t = 0; t < TOKENS; ++t) {
          const uint8_t* x = terms[t] + (b * 16 + at) * kBytes;
          dot[t] = madd(dot[t], n0, load<VI16>(x));
          dot[t] = madd(dot[t], n1, load<VI16>(x + kBytes));
          dot[t] = madd(dot[t], n2, load<VI16>(x + 2 * kBytes));
          dot[t] = madd(dot[t], n3, load<VI16>(x + 3 * kBytes));
        }
      };
      four((low & 0x3333) | ((high << 2) & 0x4444), 0);
      four(((low >> 2) & 0x3333) | ((high << 1) & 0x4444), 4);
      four((middle & 0x3333) | (high & 0x4444), 8);
      four(((middle >> 2) & 0x3333) | ((high >> 1) & 0x4444), 12);
      for (int t = 0; t < TOKENS; ++t) sum[t] += to_float(dot[t]) * load<VF>(scratch + t * wide + b * kLanes);
    };
    const uint8_t *second = weight + plane, *third = second + plane;
    for (int64_t b = 0; b < whole; ++b) {
      const int64_t at = b * kBytes;
      ahead<TOKENS>(weight + at);
      ahead<TOKENS>(second + at);
      if (BITS == 3) ahead<TOKENS>(third + at);
      block(load<VU16>(weight + at), load<VU16>(second + at), BITS == 3 ? load<VU16>(third + at) : VU16{}, b);
    }
    if (rest) {
      const int64_t at = whole * kBytes;
      block(load_words<VU16>(weight + at, rest), load_words<VU16>(second + at, rest),
            BITS == 3 ? load_words<VU16>(third + at, rest) : VU16{}, whole);
    }
    for (int t = 0; t < TOKENS; ++t) out[t * stride] = total(sum[t]);
  }
};

}  // namespace
