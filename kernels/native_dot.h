// Products of stored weights with activations, one table of functions for each instruction set. native_dot.cpp is
// compiled once for every set (kernels/native.py says with which flags); native_experts.cpp chooses among them at run time.
//
// Activations are held as 16-bit integers with a power of two for each group of columns. A bfloat16 or float16 value keeps
// all its bits unless it is far below its group's largest: the error is at most 2^-16 of that. Float32 values take two such
// terms, 2^-31. Integer products are exact, so a group's sum is, and scales enter in float32.
#pragma once
#include <cstdint>

// Rows of integer codes with a scale for every group.
struct Rows {
  // bytes of one prepared term of `columns` activations
  int64_t (*size)(int64_t columns, int64_t group);
  // one group of activations at column `start` into a prepared term; residual: what is left of x, or null
  void (*prepare)(const float* x, int64_t start, int64_t columns, int64_t group, uint8_t* term, float* residual);
  void (*clear)(int64_t columns, int64_t group, uint8_t* term);  // what `prepare` never writes: the padding
  // out[t * stride + r]
  void (*dot)(const uint8_t* weight, const uint16_t* scale, int64_t rows, int64_t columns, int64_t group,
              const uint8_t* const* terms, int64_t count, float* scratch, float* out, int64_t stride);
};

struct DotKernels {
  const char* name;
  int64_t block;  // bytes of a vector
  Rows int2, int3, int4;  // bfloat16 scales, group 32 or 64; 2 and 3 bits in planes
  Rows int8;              // float16 scales, group 32
  // bfloat16 rows times float32 activations, exact products with float32 sums
  int64_t (*size16)(int64_t columns);
  void (*prepare16)(const float* x, int64_t columns, float* term);
  void (*dot16)(const uint16_t* weight, int64_t rows, int64_t columns, const uint8_t* const* terms, int64_t count,
                float* out, int64_t stride);
  // clamped SwiGLU of `width` interleaved pre-activations and their biases
  void (*activate)(const float* gate_up, const float* bias, int64_t width, float limit, float alpha, float* out);
};

constexpr int64_t kTokens = 4;  // at most so many terms share a pass over the weights

// floats of scratch that `dot` wants
inline int64_t scratch_floats(int64_t columns) { return kTokens * (columns / 32 + 16); }
