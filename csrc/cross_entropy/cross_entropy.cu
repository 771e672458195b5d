// Cross entropy on the GPU: rows of logits (results, and the gradient where it is asked for), and tiles of the vocabulary.
// The formula and its letters: kernels/cross_entropy/contract.py.
//
// A CTA takes a row. It reads it once, 128 bits at a time whatever the vocabulary: from the last 16-byte boundary before
// the row on, and element by element where a vector belongs to the row in part only. Where the row fits shared memory it
// stays there for the gradient; else it is read again. Sums follow each thread's running maximum and are merged at the
// end, in one order.
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/launch.h"

namespace hotloop::cross_entropy {

constexpr unsigned ALL = 0xffffffffu;
constexpr int MOST_WARPS = 32, NOWHERE = 0x7fffffff;

// Packed by kernels/cross_entropy/cuda.py.
struct Numbers {
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap /* 0: none */, logit_scale;
};

__device__ float widened(float x) { return x; }
__device__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widened(__half x) { return __half2float(x); }

template <class T>
__device__ T narrowed(float x);
template <>
__device__ float narrowed(float x) {
  return x;
}
template <>
__device__ __nv_bfloat16 narrowed(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __half narrowed(float x) {
  return __float2half_rn(x);
}

template <class T>
struct alignas(16) Vector {
  static constexpr int SIZE = 16 / sizeof(T);
  T x[SIZE];
};

__device__ float logit(float z, const Numbers& o) {
  return o.softcap > 0 ? o.softcap * tanhf(z * (o.logit_scale / o.softcap)) : z * o.logit_scale;
}

// A row in memory, walked in vectors from the boundary before it.
template <class T>
struct Row {
  static constexpr int SIZE = Vector<T>::SIZE;
  T* first;      // element 0
  int before;    // elements between the boundary and it
  int64_t size;  // elements

  __device__ Row(const T* p, int64_t size) : first(const_cast<T*>(p)), size(size) {
    before = int(reinterpret_cast<uintptr_t>(p) % sizeof(Vector<T>) / sizeof(T));
  }
  __device__ int64_t vectors() const { return (before + size + SIZE - 1) / SIZE; }
  __device__ int64_t column(int64_t vector) const { return vector * SIZE - before; }  // of its first element
  __device__ bool whole(int64_t vector) const { return column(vector) >= 0 && column(vector) + SIZE <= size; }
  __device__ bool has(int64_t column) const { return column >= 0 && column < size; }

  __device__ Vector<T> load(int64_t vector) const {
    if (whole(vector)) return *reinterpret_cast<const Vector<T>*>(first + column(vector));
    Vector<T> v;
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      const int64_t i = column(vector) + k;
      v.x[k] = has(i) ? first[i] : narrowed<T>(0.0f);
    }
    return v;
  }
  // The vectors of another row, whose beginning lies as this one's.
  __device__ void store(T* there, int64_t vector, const Vector<T>& v) const {
    if (whole(vector)) {
      *reinterpret_cast<Vector<T>*>(there + column(vector)) = v;
      return;
    }
#pragma unroll
    for (int k = 0; k < SIZE; ++k)
      if (has(column(vector) + k)) there[column(vector) + k] = v.x[k];
  }
};

// What is known of a part of a row.
struct State {
  float m = -INFINITY;  // maximum
  float total = 0;      // sum of exp(x - m)
  float spread = 0;     // sum of w (m - x)
  float weights = 0;    // sum of w
  float product = 0;    // sum of exp(x - m) (x - m)
  int nan = 0;

  // The same relative to another maximum, not below this one.
  __device__ void rise(float to) {
    const float base = to == -INFINITY ? 0.0f : to, drop = m == -INFINITY ? 0.0f : m - base;
    const float shrink = expf(drop);
    product = shrink * (product + drop * total);
    total *= shrink;
    if (weights > 0) spread += weights * (base - (m == -INFINITY ? 0.0f : m));
    m = to;
  }
  __device__ void merge(State other) {
    const float to = fmaxf(m, other.m);
    rise(to);
    other.rise(to);
    total += other.total;
    spread += other.spread;
    weights += other.weights;
    product += other.product;
    nan |= other.nan;
  }
};

// Where the maximum is first, and a NaN: the class that is predicted is whichever comes first.
struct Places {
  float m = -INFINITY;
  int first = NOWHERE, first_nan = NOWHERE;
  __device__ void see(float x, int column) {
    if (x != x)
      first_nan = min(first_nan, column);
    else if (x > m || (x == m && column < first))
      m = x, first = column;
  }
  __device__ void merge(float other_m, int other_first, int other_nan) {
    if (other_m > m || (other_m == m && other_first < first)) m = other_m, first = other_first;
    first_nan = min(first_nan, other_nan);
  }
};

template <class T>
__device__ void add(State& s, Places& places, const Row<T>& row, int64_t vector, const Vector<T>& v, const float* weight,
                    bool has_spread, bool has_stats, const Numbers& o) {
  constexpr int SIZE = Vector<T>::SIZE;
  float x[SIZE], highest = s.m;
#pragma unroll
  for (int k = 0; k < SIZE; ++k) {
    x[k] = row.has(row.column(vector) + k) ? logit(widened(v.x[k]), o) : -INFINITY;
    highest = fmaxf(highest, x[k]);  // passes over NaN
  }
  if (highest > s.m) s.rise(highest);
  const float base = s.m == -INFINITY ? 0.0f : s.m;
#pragma unroll
  for (int k = 0; k < SIZE; ++k) {
    const int64_t column = row.column(vector) + k;
    if (!row.has(column)) continue;
    const float d = x[k] - base, e = expf(d);
    s.total += e;
    s.nan |= x[k] != x[k];
    if (has_stats) {
      s.product += e * fmaxf(d, -104.0f);  // exp(d) * d is 0 where d is -inf
      places.see(x[k], int(column));
    }
    if (has_spread) {
      const float w = weight == nullptr ? 1.0f : weight[column];
      s.spread -= d * w;
      s.weights += w;
    }
  }
}

__device__ float shuffled(float x, int mask) { return __shfl_xor_sync(ALL, x, mask); }

__device__ void merge_lanes(State& s, Places& p, bool has_spread, bool has_stats) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    State other;
    other.m = shuffled(s.m, mask);
    other.total = shuffled(s.total, mask);
    other.nan = __shfl_xor_sync(ALL, s.nan, mask);
    if (has_spread) other.spread = shuffled(s.spread, mask), other.weights = shuffled(s.weights, mask);
    if (has_stats) {
      other.product = shuffled(s.product, mask);
      const float m = shuffled(p.m, mask);
      const int first = __shfl_xor_sync(ALL, p.first, mask), nan = __shfl_xor_sync(ALL, p.first_nan, mask);
      p.merge(m, first, nan);
    }
    s.merge(other);
  }
}

// The whole row's, in every thread. All lanes of a warp hold the same after the shuffles: sums of two numbers commute.
__device__ void merge_all(State& s, Places& p, bool has_spread, bool has_stats) {
  __shared__ State states[MOST_WARPS];
  __shared__ Places places[MOST_WARPS];
  merge_lanes(s, p, has_spread, has_stats);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (lane == 0) states[warp] = s, places[warp] = p;
  __syncthreads();
  s = lane < warps ? states[lane] : State();
  p = lane < warps ? places[lane] : Places();
  merge_lanes(s, p, has_spread, has_stats);
}

template <class T>
__device__ void rows(const T* logits, int64_t logits_stride, const int64_t* targets, const float* weight,
                     const float* token_weight, const float* weight_sum, float* loss, float* nll, float* lse,
                     float* entropy, int64_t* predicted, T* out, int64_t out_stride, const float* dloss,
                     int64_t dloss_stride, int64_t v, const Numbers& o, int is_kept) {
  extern __shared__ char room[];
  const int64_t i = blockIdx.x, target = targets[i];
  const Row<T> row(logits + i * logits_stride, v);
  T* gradient = out == nullptr ? nullptr : out + i * out_stride;
  if (target == o.ignore_index) {  // whatever is in it, NaN too
    if (threadIdx.x == 0 && loss != nullptr) {
      loss[i] = nll[i] = lse[i] = 0;
      if (predicted != nullptr) entropy[i] = 0, predicted[i] = -1;
    }
    if (gradient != nullptr) {
      const Row<T> there(gradient, v);
      Vector<T> zero;
      for (T& x : zero.x) x = narrowed<T>(0.0f);
      for (int64_t k = threadIdx.x; k < there.vectors(); k += blockDim.x) there.store(gradient, k, zero);
    }
    return;
  }
  const bool has_spread = o.label_smoothing > 0, has_stats = predicted != nullptr;
  const bool is_class = target >= 0 && target < v;
  // Before the logits may be overwritten. A target that is no class makes the row NaN.
  const float x_target = is_class ? logit(widened(row.first[target]), o) : NAN;

  auto* kept = reinterpret_cast<Vector<T>*>(room);
  State s;
  Places places;
  for (int64_t k = threadIdx.x; k < row.vectors(); k += blockDim.x) {
    const Vector<T> part = row.load(k);
    if (is_kept) kept[k] = part;
    add(s, places, row, k, part, weight, has_spread, has_stats, o);
  }
  merge_all(s, places, has_spread, has_stats);

  // A row with an infinite maximum has no sum, and the infinity as the logarithm of it.
  const bool infinite = isinf(s.m);
  if (infinite || s.nan) s.total = NAN;
  const float log_total = logf(s.total);
  const float row_lse = infinite ? (s.nan ? NAN : s.m) : s.m + log_total;
  const float row_nll = (s.m - x_target) + log_total;  // not lse - x[target], which would cancel where |x| is large
  const float w = weight == nullptr ? 1.0f : is_class ? weight[target] : 0.0f;
  const float share = token_weight == nullptr ? 1.0f : token_weight[i];
  const float all_weights = weight == nullptr ? float(v) : *weight_sum;
  if (threadIdx.x == 0 && loss != nullptr) {
    float value = row_nll * (1 - o.label_smoothing) * w;
    if (has_spread) value += (s.spread + all_weights * log_total) * (o.label_smoothing / v);
    if (o.z_loss != 0) value += o.z_loss * row_lse * row_lse;
    loss[i] = value * share;
    nll[i] = row_nll;
    lse[i] = row_lse;
    if (has_stats) {
      entropy[i] = log_total - s.product / s.total;
      predicted[i] = min(places.first, places.first_nan);
    }
  }
  if (gradient == nullptr) return;

  const float drow = dloss[i * dloss_stride] * share;
  const float b = drow * (1 - o.label_smoothing) * w, c = drow * (o.label_smoothing / v);
  float a = has_spread ? c * all_weights : 0.0f;
  if (o.z_loss != 0) a += drow * (2 * o.z_loss) * row_lse;
  const float inverse = 1 / s.total;
  const bool alike = Row<T>(gradient, v).before == row.before;  // vectors of the gradient lie as those of the logits
  for (int64_t k = threadIdx.x; k < row.vectors(); k += blockDim.x) {
    Vector<T> part = is_kept ? kept[k] : row.load(k);
#pragma unroll
    for (int j = 0; j < Vector<T>::SIZE; ++j) {
      const int64_t column = row.column(k) + j;
      const float x = logit(widened(part.x[j]), o), p = expf(x - s.m) * inverse;
      float dx = a * p + b * (column == target ? p - 1 : p);
      if (has_spread && row.has(column)) dx -= c * (weight == nullptr ? 1.0f : weight[column]);
      if (o.softcap > 0) dx *= 1 - (x / o.softcap) * (x / o.softcap);
      part.x[j] = narrowed<T>(dx * o.logit_scale);
    }
    if (alike) {
      row.store(gradient, k, part);
    } else {
      for (int j = 0; j < Vector<T>::SIZE; ++j)
        if (row.has(row.column(k) + j)) gradient[row.column(k) + j] = part.x[j];
    }
  }
}

// Grid (blocks of a row, N): a thread takes one vector.
template <class T>
__device__ void columns(T* logits, int64_t logits_stride, int64_t width, int64_t first, const int64_t* targets,
                        const float* a, const float* b, const float* c, const float* dentropy, const float* weight,
                        const float* lse, const float* entropy, const Numbers& o) {
  const int64_t i = blockIdx.y;
  const Row<T> row(logits + i * logits_stride, width);
  const int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= row.vectors()) return;
  const int64_t target = targets[i];
  const bool ignored = target == o.ignore_index;
  Vector<T> part = row.load(k);
  const float row_lse = lse[i], b_i = b[i];
  const float a_i = row_lse == INFINITY ? NAN : a[i];  // all of the row's gradient is NaN, not only that logit's
  const float c_i = c == nullptr ? 0.0f : c[i], de = dentropy == nullptr ? 0.0f : dentropy[i];
#pragma unroll
  for (int j = 0; j < Vector<T>::SIZE; ++j) {
    const int64_t column = row.column(k) + j;
    const float x = logit(widened(part.x[j]), o), p = expf(x - row_lse);
    float dx = a_i * p + b_i * (column + first == target ? p - 1 : p);
    if (c != nullptr && row.has(column)) dx -= c_i * (weight == nullptr ? 1.0f : weight[first + column]);
    // p log p is 0 where log p is -inf
    if (dentropy != nullptr) dx -= de * p * (fmaxf(x - row_lse, -1e30f) + entropy[i]);
    if (o.softcap > 0) dx *= 1 - (x / o.softcap) * (x / o.softcap);
    part.x[j] = narrowed<T>(ignored ? 0.0f : dx * o.logit_scale);
  }
  row.store(row.first, k, part);
}

// What Python launches, by name: kernels/cross_entropy/cuda.py.
#define HOTLOOP_KERNELS(SUFFIX, T)                                                                                     \
  extern "C" __global__ void cross_entropy_rows_##SUFFIX(                                                              \
      const T* logits, int64_t logits_stride, const int64_t* targets, const float* weight, const float* token_weight, \
      const float* weight_sum, float* loss, float* nll, float* lse, float* entropy, int64_t* predicted, T* out,       \
      int64_t out_stride, const float* dloss, int64_t dloss_stride, int64_t v, const Numbers o, int is_kept) {        \
    rows(logits, logits_stride, targets, weight, token_weight, weight_sum, loss, nll, lse, entropy, predicted, out,   \
         out_stride, dloss, dloss_stride, v, o, is_kept);                                                             \
  }                                                                                                                    \
  extern "C" __global__ void cross_entropy_columns_##SUFFIX(                                                           \
      T* logits, int64_t logits_stride, int64_t width, int64_t first, const int64_t* targets, const float* a,         \
      const float* b, const float* c, const float* dentropy, const float* weight, const float* lse,                   \
      const float* entropy, const Numbers o) {                                                                        \
    columns(logits, logits_stride, width, first, targets, a, b, c, dentropy, weight, lse, entropy, o);                \
  }

HOTLOOP_KERNELS(fp32, float)
HOTLOOP_KERNELS(bf16, __nv_bfloat16)
HOTLOOP_KERNELS(fp16, __half)

}  // namespace hotloop::cross_entropy

std::vector<hotloop::CudaKernel> hotloop::cross_entropy_kernels() {
  using namespace cross_entropy;
#define HOTLOOP_NAMED(NAME) CudaKernel{#NAME, reinterpret_cast<const void*>(NAME)}
  return {HOTLOOP_NAMED(cross_entropy_rows_fp32),    HOTLOOP_NAMED(cross_entropy_rows_bf16),
          HOTLOOP_NAMED(cross_entropy_rows_fp16),    HOTLOOP_NAMED(cross_entropy_columns_fp32),
          HOTLOOP_NAMED(cross_entropy_columns_bf16), HOTLOOP_NAMED(cross_entropy_columns_fp16)};
}
