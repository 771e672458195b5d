// Row softmax in float32: one CTA per row, a running maximum and sum per thread, joined by shuffles and shared memory.
#include <math_constants.h>

struct Pair {  // highest value seen, and the sum of exp(value - highest)
  float peak, total;
};

__device__ Pair join(Pair a, Pair b) {
  float peak = fmaxf(a.peak, b.peak);
  if (peak == -CUDART_INF_F) return {peak, 0.f};
  return {peak, a.total * __expf(a.peak - peak) + b.total * __expf(b.peak - peak)};
}

__device__ Pair join_warp(Pair mine) {
  for (int distance = 16; distance; distance /= 2)
    mine = join(mine, {__shfl_xor_sync(~0u, mine.peak, distance), __shfl_xor_sync(~0u, mine.total, distance)});
  return mine;
}

extern "C" __global__ void softmax(const float* x, float* y, int columns, int stride_x) {
  __shared__ Pair warps[32];
  const float* row = x + (long long)blockIdx.x * stride_x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Pair mine = {-CUDART_INF_F, 0.f};
  for (int i = threadIdx.x; i < columns; i += blockDim.x) mine = join(mine, {row[i], 1.f});
  mine = join_warp(mine);
  if (lane == 0) warps[warp] = mine;
  __syncthreads();
  mine = lane < blockDim.x / 32 ? warps[lane] : Pair{-CUDART_INF_F, 0.f};
  mine = join_warp(mine);
  for (int i = threadIdx.x; i < columns; i += blockDim.x)
    y[(long long)blockIdx.x * columns + i] = __expf(row[i] - mine.peak) / mine.total;
}
