// The sum of squares of x, twice: by float atomics in whatever order, and in one fixed order by the CTA that ends last.
// Beside it a histogram of the exponents, by integer atomics in shared and in global memory.
#include <stdint.h>

constexpr int THREADS = 128, BINS = 256;

__device__ float sum_block(float value) {
  __shared__ float warps[THREADS / 32];
  for (int distance = 16; distance; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x < THREADS / 32 ? warps[threadIdx.x] : 0.f;
  if (threadIdx.x < 32)
    for (int distance = THREADS / 64; distance; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
  __syncthreads();
  return value;  // in thread 0
}

__global__ void sum_of_squares(const float* x, int n, float* unordered, float* ordered, float* partial,
                               unsigned* arrived,  // 0 before and after
                               int* exponents) {   // (BINS,)
  __shared__ int bins[BINS];
  __shared__ bool last;
  for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
  __syncthreads();
  float mine = 0;
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS) {
    mine += x[i] * x[i];
    atomicAdd(&bins[__float_as_uint(x[i]) >> 23 & 255], 1);
  }
  float total = sum_block(mine);
  for (int i = threadIdx.x; i < BINS; i += THREADS)
    if (bins[i]) atomicAdd(exponents + i, bins[i]);

  if (threadIdx.x == 0) {
    atomicAdd(unordered, total);
    partial[blockIdx.x] = total;
#ifndef NO_FENCE
    __threadfence();
#endif
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  float all = 0;
  for (int i = threadIdx.x; i < gridDim.x; i += THREADS) all += __ldcg(partial + i);
  all = sum_block(all);
  if (threadIdx.x == 0) *ordered = all, *arrived = 0;
}
