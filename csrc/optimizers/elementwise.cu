// AdamW, Lion and SGD on the GPU: one launch updates a list of tensors, one sums the squares of their gradients.
//
// The arithmetic is that of kernels/optimizers/reference.py, to the bit: compile with -fmad=false, without fast math.
// Tables and chunks: kernels/optimizers/tables.py. A warp takes a block of up to 256 elements, which share the scale of
// 8-bit moments. Lane l holds elements 4 l .. 4 l + 3 of each half of the block, so that 32 lanes of 128 bits are
// contiguous in fp32.
#include <cstdint>

#include "common/launch.h"

namespace hotloop::optimizers {

constexpr int CHUNK = 65'536, BLOCKS_OF_A_CHUNK = 256, BLOCK = 256, COLUMNS = 10;
constexpr int UPDATE_THREADS = 256, SUM_THREADS = 256, WARPS = UPDATE_THREADS / 32, EACH = BLOCK / 32;
constexpr unsigned ALL = 0xffffffffu;

// Packed by kernels/optimizers/cuda.py.
struct Options {
  int32_t rule, param, grad, moment;
  int32_t n_moments, stochastic, maximize, nesterov;
  float constants[4];  // as those of Update in elementwise.h
  uint64_t seed;
};

enum : int { ADAMW, LION, SGD };     // Rule of elementwise.h
enum : int { FP32, BF16, UINT8 };  // Type

// A warp's block: `begin` is its first element, `n` how many it has, `wide` whether it is whole and aligned.
struct Place {
  int64_t begin;
  int n, lane;
  bool wide;
  __device__ int at(int j) const { return j / 4 * 128 + lane * 4 + j % 4; }
};

// Through __ldcs and __stcs, which name global memory and say that nobody reads it again soon: a plain access to an
// address out of a table would be a generic one.
template <class T>
__device__ T load(int64_t address, int64_t i) {
  return __ldcs(reinterpret_cast<const T*>(address) + i);
}

template <class T>
__device__ void store(int64_t address, int64_t i, T x) {
  __stcs(reinterpret_cast<T*>(address) + i, x);
}

__device__ float widened(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }

__device__ uint16_t nearest(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

__device__ uint16_t stochastic(float x, uint32_t noise) {
  const uint32_t bits = __float_as_uint(x);
  const bool finite = (bits & 0x7f800000) != 0x7f800000;  // noise would make a NaN of inf
  return (bits + (finite ? noise : 0)) >> 16;
}

// Elements as fp32; those past the block's end are 0.
__device__ void read(float (&x)[EACH], int64_t address, int type, const Place& at) {
  if (at.wide) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t i = at.begin + half * 128 + at.lane * 4;
      float* out = x + 4 * half;
      if (type == FP32) {
        const float4 v = load<float4>(address + 4 * i, 0);
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
      } else {
        const ushort4 v = load<ushort4>(address + 2 * i, 0);
        out[0] = widened(v.x), out[1] = widened(v.y), out[2] = widened(v.z), out[3] = widened(v.w);
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const int64_t i = at.begin + at.at(j);
    const bool there = at.at(j) < at.n;
    if (type == FP32)
      x[j] = there ? load<float>(address, i) : 0.0f;
    else
      x[j] = there ? widened(load<uint16_t>(address, i)) : 0.0f;
  }
}

__device__ void write32(const float (&x)[EACH], int64_t address, const Place& at) {
#pragma unroll
  for (int half = 0; half < 2 && at.wide; ++half)
    store(address + 4 * (at.begin + half * 128 + at.lane * 4), 0,
          make_float4(x[4 * half], x[4 * half + 1], x[4 * half + 2], x[4 * half + 3]));
#pragma unroll
  for (int j = 0; j < EACH; ++j)
    if (!at.wide && at.at(j) < at.n) store(address, at.begin + at.at(j), x[j]);
}

__device__ void write16(const uint16_t (&x)[EACH], int64_t address, const Place& at) {
#pragma unroll
  for (int half = 0; half < 2 && at.wide; ++half)
    store(address + 2 * (at.begin + half * 128 + at.lane * 4), 0,
          make_ushort4(x[4 * half], x[4 * half + 1], x[4 * half + 2], x[4 * half + 3]));
#pragma unroll
  for (int j = 0; j < EACH; ++j)
    if (!at.wide && at.at(j) < at.n) store(address, at.begin + at.at(j), x[j]);
}

// Random bits: kernels/optimizers/philox.py.

struct Words {
  uint32_t w[4];
};

__device__ Words philox(uint64_t index, uint64_t seed, uint32_t step) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = step, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

__device__ uint32_t half_of(uint32_t word, int64_t index) { return index & 1 ? word >> 16 : word & 0xffffu; }

// 16 bits for each element. `start`: the logical index of the block's first.
__device__ void draw(uint32_t (&bits)[EACH], int64_t start, const Options& o, uint32_t step, const Place& at) {
  if (start % 8 == 0) {  // a call is the eight elements of two neighbouring lanes: each lane makes one of the 32
    const Words mine = philox(start / 8 + at.lane, o.seed, step);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int from = half * 16 + at.lane / 2;
      uint32_t w[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) w[k] = __shfl_sync(ALL, mine.w[k], from);
      const uint32_t first = at.lane & 1 ? w[2] : w[0], second = at.lane & 1 ? w[3] : w[1];
      bits[4 * half] = first & 0xffffu, bits[4 * half + 1] = first >> 16;
      bits[4 * half + 2] = second & 0xffffu, bits[4 * half + 3] = second >> 16;
    }
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t first = start + half * 128 + at.lane * 4;
    const Words a = philox(first / 8, o.seed, step), b = philox(first / 8 + 1, o.seed, step);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t i = first + k;
      const bool next = i / 8 != first / 8;
      const int pair = int(i % 8) / 2;
      uint32_t word = next ? b.w[0] : a.w[0];
#pragma unroll
      for (int p = 1; p < 4; ++p) word = pair == p ? (next ? b.w[p] : a.w[p]) : word;
      bits[4 * half + k] = half_of(word, i);
    }
  }
}

__device__ uint32_t of_stream(uint32_t bits, int stream) {
  return bits * (stream == 0 ? 1u : stream == 1 ? 44205u : 64805u) & 0xffffu;
}

// 8-bit moments: kernels/optimizers/quantised.py.

__device__ int shift_of(bool is_unsigned) { return is_unsigned ? 20 : 19; }
__device__ float zero_of(bool is_unsigned) { return is_unsigned ? 0x1p-31f : 0x1p-7f; }
__device__ uint32_t zero_bits(bool is_unsigned) { return (is_unsigned ? 96u : 120u) << 23; }

__device__ float dequantised(uint32_t code, float scale, bool is_unsigned) {
  const uint32_t magnitude = is_unsigned ? code : code & 127;
  float value = __uint_as_float((magnitude << shift_of(is_unsigned)) + zero_bits(is_unsigned)) - zero_of(is_unsigned);
  if (!is_unsigned && code >= 128) value = -value;
  return value * scale;
}

__device__ void read_codes(float (&x)[EACH], int64_t address, float scale, bool is_unsigned, const Place& at) {
  uint32_t codes[EACH];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uchar4 v = at.wide ? load<uchar4>(address + at.begin + half * 128 + at.lane * 4, 0) : uchar4{};
    codes[4 * half] = v.x, codes[4 * half + 1] = v.y, codes[4 * half + 2] = v.z, codes[4 * half + 3] = v.w;
  }
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    if (!at.wide && at.at(j) < at.n) codes[j] = load<uint8_t>(address, at.begin + at.at(j));
    x[j] = dequantised(codes[j], scale, is_unsigned);
  }
}

__device__ float block_scale(const float (&x)[EACH], bool is_unsigned, const Place& at) {
  uint32_t largest = 0;  // numbers without a sign are ordered as their bits are
#pragma unroll
  for (int j = 0; j < EACH; ++j)
    if (at.at(j) < at.n) largest = max(largest, __float_as_uint(x[j]) & 0x7fffffffu);
  const float scale = __uint_as_float(__reduce_max_sync(ALL, largest)) * (is_unsigned ? 0.53333336f : 0.51821864f);
  return scale < 0x1p-126f ? 0x1p-126f : scale;
}

__device__ uint8_t code_of(float x, float reciprocal, bool is_unsigned, bool is_stochastic, uint32_t noise) {
  const uint32_t bits = __float_as_uint(x);
  const float w = __uint_as_float(bits & 0x7fffffffu) * reciprocal + zero_of(is_unsigned);
  const int shift = shift_of(is_unsigned);
  const uint32_t added = is_stochastic ? noise << (shift - 16) : 1u << (shift - 1);
  const uint32_t code = min(((__float_as_uint(w) & 0x7fffffffu) - zero_bits(is_unsigned) + added) >> shift,
                            is_unsigned ? 255u : 127u);
  if (is_unsigned) return code == 0 && int(bits) > 0 ? 1 : code;
  return code + (bits >> 31 ? 128 : 0);
}

__device__ void write_codes(const float (&x)[EACH], int64_t address, int64_t scale_address, bool is_unsigned,
                            bool is_stochastic, const uint32_t (&noise)[EACH], const Place& at) {
  const float scale = block_scale(x, is_unsigned, at), reciprocal = 1.0f / scale;
  uint8_t codes[EACH];
#pragma unroll
  for (int j = 0; j < EACH; ++j) codes[j] = code_of(x[j], reciprocal, is_unsigned, is_stochastic, noise[j]);
#pragma unroll
  for (int half = 0; half < 2 && at.wide; ++half)
    store(address + at.begin + half * 128 + at.lane * 4, 0,
          make_uchar4(codes[4 * half], codes[4 * half + 1], codes[4 * half + 2], codes[4 * half + 3]));
#pragma unroll
  for (int j = 0; j < EACH; ++j)
    if (!at.wide && at.at(j) < at.n) store(address, at.begin + at.at(j), codes[j]);
  if (at.lane == 0) store(scale_address, 0, scale);
}

// Rules

__device__ void adamw(float& p, float g, float& m, float& v, const float* scalars, const float* c) {
  p = p * scalars[0];
  m = m * c[0] + g * c[1];
  v = v * c[2] + g * c[3] * g;
  p = p - scalars[1] * m / (sqrtf(v) + scalars[2]);
}

__device__ void lion(float& p, float g, float& m, const float* scalars, const float* c) {
  p = p * scalars[0];
  const float direction = m * c[0] + g * c[1];
  p = p - (direction > 0 ? scalars[1] : direction < 0 ? -scalars[1] : 0.0f);
  m = m * c[2] + g * c[3];
}

__device__ void sgd(float& p, float g, float& b, bool has_momentum, bool nesterov, const float* scalars, const float* c) {
  g = g + p * c[1];
  if (has_momentum) {
    b = b * c[0] + g;
    g = nesterov ? g + b * c[0] : b;
  }
  p = p - scalars[0] * g;
}

// Update

// Moment k of the rule; CODES: 8-bit.
template <int RULE, bool CODES, int K>
__device__ void read_moment(float (&x)[EACH], const int64_t (&tensor)[COLUMNS], int64_t block, const Options& o,
                            const Place& at) {
  if constexpr (CODES)
    read_codes(x, tensor[3 + K], __ldcs(reinterpret_cast<const float*>(tensor[5 + K]) + block), RULE == ADAMW && K == 1,
               at);
  else
    read(x, tensor[3 + K], o.moment, at);
}

template <bool STOCHASTIC>
__device__ void write_rounded(const float (&x)[EACH], int64_t address, int type, const uint32_t (&noise)[EACH],
                              const Place& at) {
  if (type == FP32) return write32(x, address, at);
  uint16_t narrow[EACH];
#pragma unroll
  for (int j = 0; j < EACH; ++j) narrow[j] = STOCHASTIC ? stochastic(x[j], noise[j]) : nearest(x[j]);
  write16(narrow, address, at);
}

template <int RULE, bool CODES, bool STOCHASTIC, int K>
__device__ void write_moment(const float (&x)[EACH], const int64_t (&tensor)[COLUMNS], int64_t block,
                             const uint32_t (&bits)[EACH], const Options& o, const Place& at) {
  uint32_t noise[EACH];
#pragma unroll
  for (int j = 0; j < EACH; ++j) noise[j] = of_stream(bits[j], K + 1);
  if constexpr (CODES)
    write_codes(x, tensor[3 + K], tensor[5 + K] + 4 * block, RULE == ADAMW && K == 1, STOCHASTIC, noise, at);
  else
    write_rounded<STOCHASTIC>(x, tensor[3 + K], o.moment, noise, at);
}

template <int RULE, bool CODES, bool STOCHASTIC>
__device__ __forceinline__ void update(const int64_t* table, const int64_t* chunks, const float* scalar_pointer,
                                       const float* factor_pointer, const float* skip, const float* step_pointer,
                                       const Options& o) {
  if (*skip != 0) return;
  constexpr int PARTS = BLOCKS_OF_A_CHUNK / WARPS, SCALARS = RULE == ADAMW ? 3 : RULE == LION ? 2 : 1;
  const int64_t* chunk = chunks + 2 * (blockIdx.x / PARTS);
  int64_t tensor[COLUMNS];  // read once: stores might otherwise seem to change it
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) tensor[i] = __ldg(table + COLUMNS * chunk[0] + i);
  const int64_t block = chunk[1] + blockIdx.x % PARTS * WARPS + threadIdx.x / 32;
  const int64_t numel = tensor[7], row = tensor[8], per_row = (row + BLOCK - 1) / BLOCK;
  if (block >= numel / row * per_row) return;

  const int64_t column = block % per_row * BLOCK;
  Place at;
  at.begin = block / per_row * row + column;
  at.n = int(min(int64_t(BLOCK), row - column));
  at.lane = threadIdx.x % 32;
  const int64_t addresses = tensor[0] | tensor[1] | tensor[2] | tensor[3] | tensor[4];
  at.wide = at.n == BLOCK && addresses % 16 == 0 && at.begin % 4 == 0;
  const int64_t start = tensor[9] + at.begin;
  const uint32_t step = uint32_t(*step_pointer);
  const float factor = o.maximize ? -*factor_pointer : *factor_pointer;
  float scalars[3] = {};
#pragma unroll
  for (int i = 0; i < SCALARS; ++i) scalars[i] = scalar_pointer[i];

  const bool has_master = tensor[1] != 0;
  float p[EACH], g[EACH], m[EACH] = {}, v[EACH] = {};
  read(g, tensor[2], o.grad, at);
  read(p, has_master ? tensor[1] : tensor[0], has_master ? FP32 : o.param, at);
  if (o.n_moments > 0) read_moment<RULE, CODES, 0>(m, tensor, block, o, at);
  if constexpr (RULE == ADAMW) read_moment<RULE, CODES, 1>(v, tensor, block, o, at);

#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const float gradient = g[j] * factor;
    if constexpr (RULE == ADAMW)
      adamw(p[j], gradient, m[j], v[j], scalars, o.constants);
    else if constexpr (RULE == LION)
      lion(p[j], gradient, m[j], scalars, o.constants);
    else
      sgd(p[j], gradient, m[j], o.n_moments > 0, o.nesterov, scalars, o.constants);
  }

  uint32_t bits[EACH] = {};
  if (STOCHASTIC) draw(bits, start, o, step, at);
  if (o.n_moments > 0) write_moment<RULE, CODES, STOCHASTIC, 0>(m, tensor, block, bits, o, at);
  if constexpr (RULE == ADAMW) write_moment<RULE, CODES, STOCHASTIC, 1>(v, tensor, block, bits, o, at);
  if (has_master) {
    write32(p, tensor[1], at);
    write_rounded<false>(p, tensor[0], o.param, bits, at);
  } else {
    write_rounded<STOCHASTIC>(p, tensor[0], o.param, bits, at);
  }
}

// Sum of squares, in the order of `sum_of_squares` in reference.py.

// A chunk is 16 runs of 64 lines of 64 elements. Sixteen threads take a run, four elements of each line a thread.
__device__ double chunk_sum(int64_t address, int type, int64_t begin, int64_t count) {
  const int run = threadIdx.x / 16, column = threadIdx.x % 16 * 4;
  const bool wide = count >= CHUNK && address % 16 == 0;
  double sums[4] = {};
#pragma unroll 8
  for (int line = 0; line < 64; ++line) {
    const int64_t i = run * 4096 + line * 64 + column;
    float x[4];
    if (wide && type == FP32) {
      const float4 v = load<float4>(address + 4 * (begin + i), 0);
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else if (wide) {
      const ushort4 v = load<ushort4>(address + 2 * (begin + i), 0);
      x[0] = widened(v.x), x[1] = widened(v.y), x[2] = widened(v.z), x[3] = widened(v.w);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (i + k >= count)
          x[k] = 0.0f;
        else if (type == FP32)
          x[k] = load<float>(address, begin + i + k);
        else
          x[k] = widened(load<uint16_t>(address, begin + i + k));
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] += double(x[k]) * double(x[k]);
  }
#pragma unroll
  for (int apart = 8; apart > 0; apart /= 2)
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] += __shfl_down_sync(ALL, sums[k], apart, 16);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);  // in the first of the sixteen threads
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    optimizer_sum_of_squares(const int64_t* table, const int64_t* chunks, double* sums, int* arrived, int count) {
  __shared__ double runs[16];
  __shared__ bool is_last;
  const int64_t* row = table + 3 * chunks[2 * blockIdx.x];
  const int64_t begin = chunks[2 * blockIdx.x + 1];
  const double run = chunk_sum(row[0], int(row[2]), begin, row[1] - begin);
  if (threadIdx.x % 16 == 0) runs[threadIdx.x / 16] = run;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) runs[i] += runs[i + width];
    sums[blockIdx.x] = runs[0];
    __threadfence();
    is_last = atomicAdd(arrived, 1) == count - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  int width = 1, alive = count;
  while (width < count) width *= 2;
  for (width /= 2; width > 0; width /= 2) {
    for (int i = threadIdx.x; i < width && i < alive; i += SUM_THREADS)
      sums[i] = __ldcg(sums + i) + (i + width < alive ? __ldcg(sums + i + width) : 0.0);
    __syncthreads();
    alive = min(alive, width);
  }
  if (threadIdx.x == 0) *arrived = 0;
}

// What Python launches, by name: kernels/optimizers/cuda.py.
#define HOTLOOP_UPDATE(NAME, RULE, CODES, STOCHASTIC)                                                                \
  extern "C" __global__ void __launch_bounds__(UPDATE_THREADS)                                                       \
      NAME(const int64_t* table, const int64_t* chunks, const float* scalars, const float* factor, const float* skip, \
           const float* step, const Options options) {                                                               \
    update<RULE, CODES, STOCHASTIC>(table, chunks, scalars, factor, skip, step, options);                            \
  }
#define HOTLOOP_RULE(NAME, RULE)                     \
  HOTLOOP_UPDATE(NAME, RULE, false, false)           \
  HOTLOOP_UPDATE(NAME##_stochastic, RULE, false, true) \
  HOTLOOP_UPDATE(NAME##_codes, RULE, true, false)    \
  HOTLOOP_UPDATE(NAME##_codes_stochastic, RULE, true, true)

HOTLOOP_RULE(optimizer_adamw, ADAMW)
HOTLOOP_RULE(optimizer_lion, LION)
HOTLOOP_RULE(optimizer_sgd, SGD)

}  // namespace hotloop::optimizers

std::vector<hotloop::CudaKernel> hotloop::optimizer_kernels() {
  using namespace optimizers;
#define HOTLOOP_NAMED(NAME) CudaKernel{#NAME, reinterpret_cast<const void*>(NAME)}
#define HOTLOOP_NAMED_RULE(NAME) \
  HOTLOOP_NAMED(NAME), HOTLOOP_NAMED(NAME##_stochastic), HOTLOOP_NAMED(NAME##_codes), HOTLOOP_NAMED(NAME##_codes_stochastic)
  return {HOTLOOP_NAMED_RULE(optimizer_adamw), HOTLOOP_NAMED_RULE(optimizer_lion), HOTLOOP_NAMED_RULE(optimizer_sgd),
          HOTLOOP_NAMED(optimizer_sum_of_squares)};
}
