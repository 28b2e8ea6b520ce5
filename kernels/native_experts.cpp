// The expert block and linear layers on packed weights: which instruction set, which thread does what, and in what order
// sums are taken. Definitions: kernels/experts.py (experts_torch), kernels/int8.py. The arithmetic is native_dot.cpp's.
//
// Pieces of work are cut by shape alone, each output element is summed by one piece in one order, and threads take pieces
// as they come free: the result is the same for any number of threads.

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "native.h"
#include "native_dot.h"

// of the sets that this compiler knows: kernels/native.py defines HAS_... for each
extern "C" {
extern const DotKernels dot_kernels_portable;
#ifdef HAS_avx2
extern const DotKernels dot_kernels_avx2;
#endif
#ifdef HAS_avx512
extern const DotKernels dot_kernels_avx512;
#endif
#ifdef HAS_avx512vnni
extern const DotKernels dot_kernels_avx512vnni;
#endif
}

namespace {

// from the slowest to the fastest; __builtin_cpu_supports also asks whether the system saves the registers
std::vector<const DotKernels*> supported() {
  std::vector<const DotKernels*> all{&dot_kernels_portable};
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef HAS_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(&dot_kernels_avx2);
#endif
#ifdef HAS_avx512
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wide) all.push_back(&dot_kernels_avx512);
#ifdef HAS_avx512vnni
  if (wide && __builtin_cpu_supports("avx512vnni")) all.push_back(&dot_kernels_avx512vnni);
#endif
#endif
#endif
  return all;
}

const std::vector<const DotKernels*>& kernels() {
  static const std::vector<const DotKernels*> all = supported();
  return all;
}

const DotKernels& chosen(int64_t isa) {
  return *kernels()[isa < 0 ? kernels().size() - 1 : static_cast<size_t>(isa)];
}

// --- threads: torch's own OpenMP if it is loaded (two pools would wait for each other), else std::thread

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

template <typename BODY> struct Shared {
  const BODY* body;
  int64_t items;
  std::atomic<int64_t> next;
  static void work(void* self) {
    auto* shared = static_cast<Shared*>(self);
    for (int64_t i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < shared->items;) (*shared->body)(i);
  }
};

template <typename BODY> void parallel(int64_t items, int64_t threads, const BODY& body) {
  threads = threads < items ? threads : items;
  if (threads <= 1) {
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
  Shared<BODY> shared{&body, items, {0}};
  static const Parallel openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (openmp != nullptr) {
    openmp(Shared<BODY>::work, &shared, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(Shared<BODY>::work, &shared);
  Shared<BODY>::work(&shared);
  for (std::thread& other : others) other.join();
}

// --- elements: 0 float32, 1 bfloat16, 2 float16

inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  uint32_t bits = static_cast<uint32_t>(h & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  bits |= sign | ((h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u);
  std::memcpy(&value, &bits, 4);
  return value;
}

// nearest, ties to even, subnormals and infinity as they should be
inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x47800000u) return sign | 0x7c00;
  if (bits < 0x38800000u) {  // a subnormal: adding 0.5 rounds to multiples of 2^-24
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&bits, &value, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  bits += 0xc8000fffu + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>(bits >> 13);
}

inline uint16_t to_bfloat(float value) { return value != value ? 0x7fc0 : narrow(value); }

void read(const void* from, int64_t type, int64_t start, int64_t count, float* to) {
  if (type == 0) {
    std::memcpy(to, static_cast<const float*>(from) + start, static_cast<size_t>(count) * 4);
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(from) + start;
  if (type == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = widen(p[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = from_half(p[i]);
}

void write(void* to, int64_t type, int64_t start, int64_t count, const float* from) {
  if (type == 0) {
    std::memcpy(static_cast<float*>(to) + start, from, static_cast<size_t>(count) * 4);
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(to) + start;
  if (type == 1)
    for (int64_t i = 0; i < count; ++i) p[i] = to_bfloat(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) p[i] = to_half(from[i]);
}

typedef std::unique_ptr<float[]> Floats;
inline Floats floats(int64_t count) { return Floats(new float[static_cast<size_t>(count)]); }

// --- rows of activations as `terms` terms each: one where x has 16 bits, two for float32

struct Terms {
  const Rows& k;
  int64_t columns, group, terms, bytes;
  std::unique_ptr<uint8_t[]> memory;

  Terms(const Rows& kernel, int64_t rows, int64_t columns_, int64_t group_, int64_t terms_)
      : k(kernel), columns(columns_), group(group_), terms(terms_), bytes(k.size(columns_, group_)),
        memory(new uint8_t[static_cast<size_t>(rows * terms_ * bytes + 64)]) {
    for (int64_t i = 0; i < rows * terms; ++i) k.clear(columns, group, at(i));
  }
  uint8_t* at(int64_t i) const {
    const uintptr_t start = (reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64;
    return reinterpret_cast<uint8_t*>(start) + i * bytes;
  }
  void put(int64_t row, int64_t start, const float* x) const {
    float residual[64], rest[64];
    k.prepare(x, start, columns, group, at(row * terms), terms > 1 ? residual : nullptr);
    if (terms > 1) k.prepare(residual, start, columns, group, at(row * terms + 1), rest);
  }
};

constexpr int64_t kSome = 32;      // rows of activations that share a pass over a piece of the weights
constexpr int64_t kChunk = 1024;   // tokens at a time: bounds the memory for activations
constexpr int64_t kOutRows = 32;   // rows of w2 in a piece of work
constexpr int64_t kLinearRows = 64;

}  // namespace

struct Experts {
  const void* x;          // [T, D]
  const int64_t* index;   // [T, K]
  const float* prob;      // [T, K]
  const uint8_t* const* base;  // storages
  const int64_t* place;   // [6, E, 2]: number of the storage and byte offset of w13 packed, scale, bias, w2 packed, ...
  void* out;              // [T, D]
  int64_t T, K, D, F, E, group, bits13, bits2, x_type, bias_type, terms, threads, isa;
  float limit, alpha;
};

namespace {

inline const Rows& rows_of(const DotKernels& k, int64_t bits) { return bits == 2 ? k.int2 : bits == 3 ? k.int3 : k.int4; }

enum Part { kW13, kScale13, kBias13, kW2, kScale2, kBias2 };

inline const uint8_t* stored(const Experts& a, Part part, int64_t expert) {
  const int64_t* place = a.place + (part * a.E + expert) * 2;
  return a.base[place[0]] + place[1];
}

// the pairs (token, choice) of every expert, in the order of the tokens
struct Routing {
  std::vector<int64_t> start, pair, hit;

  Routing(const Experts& a, int64_t first, int64_t tokens) : start(static_cast<size_t>(a.E) + 1, 0) {
    const int64_t* index = a.index + first * a.K;
    for (int64_t p = 0; p < tokens * a.K; ++p) ++start[static_cast<size_t>(index[p]) + 1];
    for (int64_t e = 0; e < a.E; ++e) {
      if (start[e + 1]) hit.push_back(e);
      start[e + 1] += start[e];
    }
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    pair.resize(static_cast<size_t>(tokens * a.K));
    for (int64_t p = 0; p < tokens * a.K; ++p) pair[next[index[p]]++] = p;
  }
};

// pre-activations, SwiGLU, and the activations of one group of columns of w2, of one expert
void gate_up_piece(const Experts& a, const DotKernels& k, const Routing& r, const Terms& x, const Terms& act,
                   int64_t expert, int64_t piece) {
  const int64_t g = a.group, rows = 2 * g, terms = a.terms;
  const uint8_t* weight = stored(a, kW13, expert) + piece * rows * (a.D / 8 * a.bits13);
  const uint16_t* scale = reinterpret_cast<const uint16_t*>(stored(a, kScale13, expert)) + piece * rows * (a.D / g);
  float bias[128], activated[64];
  read(stored(a, kBias13, expert), a.bias_type, piece * rows, rows, bias);
  const Floats h = floats(kSome * rows), scratch = floats(scratch_floats(a.D));
  for (int64_t at = r.start[expert]; at < r.start[expert + 1]; at += kSome / terms) {
    const uint8_t* of[kSome];
    const int64_t left = r.start[expert + 1] - at, some = left < kSome / terms ? left : kSome / terms;
    for (int64_t i = 0; i < some * terms; ++i) of[i] = x.at(r.pair[at + i / terms] / a.K * terms + i % terms);
    x.k.dot(weight, scale, rows, a.D, g, of, some * terms, scratch.get(), h.get(), rows);
    for (int64_t i = 0; i < some; ++i) {
      float* sum = h.get() + i * terms * rows;
      if (terms > 1)
        for (int64_t n = 0; n < rows; ++n) sum[n] += sum[rows + n];
      k.activate(sum, bias, g, a.limit, a.alpha, activated);
      act.put(at + i, piece * g, activated);
    }
  }
}

// some columns of the output, over all experts
void down_piece(const Experts& a, const Routing& r, const Terms& act, int64_t first, int64_t tokens, int64_t piece) {
  const int64_t start = piece * kOutRows, rows = a.D - start < kOutRows ? a.D - start : kOutRows, terms = a.terms;
  const Floats sum = floats(tokens * rows), y = floats(kSome * rows), scratch = floats(scratch_floats(a.F));
  std::memset(sum.get(), 0, static_cast<size_t>(tokens * rows) * 4);
  float bias[kOutRows];
  for (const int64_t expert : r.hit) {
    const uint8_t* weight = stored(a, kW2, expert) + start * (a.F / 8 * a.bits2);
    const uint16_t* scale = reinterpret_cast<const uint16_t*>(stored(a, kScale2, expert)) + start * (a.F / a.group);
    read(stored(a, kBias2, expert), a.bias_type, start, rows, bias);
    for (int64_t at = r.start[expert]; at < r.start[expert + 1]; at += kSome / terms) {
      const uint8_t* of[kSome];
      const int64_t left = r.start[expert + 1] - at, some = left < kSome / terms ? left : kSome / terms;
      for (int64_t i = 0; i < some * terms; ++i) of[i] = act.at(at * terms + i);
      act.k.dot(weight, scale, rows, a.F, a.group, of, some * terms, scratch.get(), y.get(), rows);
      for (int64_t i = 0; i < some; ++i) {
        const int64_t pair = r.pair[at + i];
        const float* from = y.get() + i * terms * rows;
        float* to = sum.get() + pair / a.K * rows;
        const float share = a.prob[first * a.K + pair];
        for (int64_t n = 0; n < rows; ++n) to[n] += share * ((terms > 1 ? from[n] + from[rows + n] : from[n]) + bias[n]);
      }
    }
  }
  for (int64_t t = 0; t < tokens; ++t) write(a.out, a.x_type, (first + t) * a.D + start, rows, sum.get() + t * rows);
}

}  // namespace

// number of the fastest set here; their names, from the slowest to the fastest
EXPORT int64_t dot_kernel_count() { return static_cast<int64_t>(kernels().size()); }
EXPORT const char* dot_kernel_name(int64_t isa) { return chosen(isa).name; }

// kernels.experts.experts_torch for codes of 2, 3 and 4 bits in groups of 32 and 64; 0, or 1 for an expert's number that is out of range
EXPORT int64_t experts_packed(const Experts* arguments) {
  const Experts& a = *arguments;
  for (int64_t p = 0; p < a.T * a.K; ++p)
    if (a.index[p] < 0 || a.index[p] >= a.E) return 1;
  const DotKernels& k = chosen(a.isa);
  for (int64_t first = 0; first < a.T; first += kChunk) {
    const int64_t tokens = a.T - first < kChunk ? a.T - first : kChunk;
    const Routing routing(a, first, tokens);
    const Terms x(rows_of(k, a.bits13), tokens, a.D, a.group, a.terms);
    const Terms act(rows_of(k, a.bits2), tokens * a.K, a.F, a.group, a.terms);
    parallel(tokens, tokens < 8 ? 1 : a.threads, [&](int64_t t) {
      float group[64];
      for (int64_t start = 0; start < a.D; start += a.group) {
        read(a.x, a.x_type, (first + t) * a.D + start, a.group, group);
        x.put(t, start, group);
      }
    });
    const int64_t pieces = a.F / a.group;
    parallel(static_cast<int64_t>(routing.hit.size()) * pieces, a.threads, [&](int64_t i) {
      gate_up_piece(a, k, routing, x, act, routing.hit[static_cast<size_t>(i / pieces)], i % pieces);
    });
    parallel((a.D + kOutRows - 1) / kOutRows, a.threads,
             [&](int64_t piece) { down_piece(a, routing, act, first, tokens, piece); });
  }
  return 0;
}

// x [n, C] times rows [R, C] of int8 (scale: float16 [R, C / 32]) or bfloat16 (scale: null), plus a bias or none
struct Linear {
  const void* x;
  const uint8_t* weight;
  const uint16_t* scale;
  const void* bias;
  void* out;  // [n, R]
  int64_t n, C, R, x_type, bias_type, terms, threads, isa;
};

namespace {

template <typename DOT> void linear(const Linear& a, int64_t scratch_size, const DOT& dot) {
  const int64_t chunk = kSome / a.terms;
  parallel((a.R + kLinearRows - 1) / kLinearRows, a.threads, [&](int64_t piece) {
    const int64_t start = piece * kLinearRows, rows = a.R - start < kLinearRows ? a.R - start : kLinearRows;
    const Floats y = floats(kSome * kLinearRows), scratch = floats(scratch_size);
    float bias[kLinearRows] = {};
    if (a.bias != nullptr) read(a.bias, a.bias_type, start, rows, bias);
    for (int64_t at = 0; at < a.n; at += chunk) {
      const int64_t some = a.n - at < chunk ? a.n - at : chunk;
      dot(start, rows, at * a.terms, some * a.terms, scratch.get(), y.get());
      for (int64_t i = 0; i < some; ++i) {
        float* from = y.get() + i * a.terms * rows;
        for (int64_t r = 0; r < rows; ++r) from[r] = (a.terms > 1 ? from[r] + from[rows + r] : from[r]) + bias[r];
        write(a.out, a.x_type, (at + i) * a.R + start, rows, from);
      }
    }
  });
}

}  // namespace

EXPORT void linear_int8(const Linear* arguments) {
  const Linear& a = *arguments;
  const DotKernels& k = chosen(a.isa);
  const Terms x(k.int8, a.n, a.C, 32, a.terms);
  parallel(a.n, a.n < 8 ? 1 : a.threads, [&](int64_t t) {
    float group[32];
    for (int64_t start = 0; start < a.C; start += 32) {
      read(a.x, a.x_type, t * a.C + start, 32, group);
      x.put(t, start, group);
    }
  });
  std::vector<const uint8_t*> terms;
  for (int64_t i = 0; i < a.n * a.terms; ++i) terms.push_back(x.at(i));
  linear(a, scratch_floats(a.C), [&](int64_t start, int64_t rows, int64_t at, int64_t count, float* scratch, float* y) {
    k.int8.dot(a.weight + start * a.C, a.scale + start * (a.C / 32), rows, a.C, 32, terms.data() + at, count, scratch, y, rows);
  });
}

EXPORT void linear_bf16(const Linear* arguments) {
  const Linear& a = *arguments;
  const DotKernels& k = chosen(a.isa);
  const int64_t bytes = k.size16(a.C);
  const std::unique_ptr<uint8_t[]> memory(new uint8_t[static_cast<size_t>(a.n * bytes + 64)]);
  uint8_t* first = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
  std::vector<const uint8_t*> terms;
  for (int64_t t = 0; t < a.n; ++t) terms.push_back(first + t * bytes);
  parallel(a.n, a.n < 8 ? 1 : a.threads, [&](int64_t t) {
    const Floats row = floats(a.C);
    read(a.x, a.x_type, t * a.C, a.C, row.get());
    k.prepare16(row.get(), a.C, reinterpret_cast<float*>(first + t * bytes));
  });
  const uint16_t* weight = reinterpret_cast<const uint16_t*>(a.weight);
  linear(a, 1, [&](int64_t start, int64_t rows, int64_t at, int64_t count, float*, float* y) {
    k.dot16(weight + start * a.C, rows, a.C, terms.data() + at, count, y, rows);
  });
}
