// c = a b in bf16 with float32 sums: tiles of 64 x 64 x 64, 4 warps of 32 x 32, two stages of cp.async.
#include "ptx.cuh"

constexpr int TILE = 64, STAGES = 2, THREADS = 128;

// A 64 x 64 corner of a row-major matrix into swizzled shared memory; zeros outside. columns % 8 == 0.
__device__ void load_corner(bf16* to, const bf16* from, int row, int column, int rows, int columns) {
#pragma unroll
  for (int piece = 0; piece < TILE * 8 / THREADS; piece++) {
    int i = piece * THREADS + threadIdx.x, r = i / 8, chunk = i % 8;
    bool valid = row + r < rows && column + chunk * 8 < columns;
    copy_async(to + swizzled(r, chunk), from + int64_t(row + r) * columns + column + chunk * 8, valid);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
matmul(const bf16* a,  // (M, K)
       const bf16* b,  // (K, N)
       bf16* c,        // (M, N)
       int M, int N, int K) {
  extern __shared__ __align__(128) bf16 tiles[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = blockIdx.y * TILE, column = blockIdx.x * TILE;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  const int steps = (K + TILE - 1) / TILE;
  float sum[2][4][4] = {};

  auto fetch = [&](int step) {
    bf16* stage = tiles + step % STAGES * 2 * TILE * TILE;
    load_corner(stage, a, row, step * TILE, M, K);
    load_corner(stage + TILE * TILE, b, step * TILE, column, K, N);
  };
  fetch(0);
  copy_commit();
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) fetch(step + 1);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    const bf16 *tile_a = tiles + step % STAGES * 2 * TILE * TILE, *tile_b = tile_a + TILE * TILE;
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
      uint32_t left[2][4], right[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) load_matrices(left[i], tile_a + swizzled(warp_row + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < 2; j++)
        load_matrices_transposed(right[j], tile_b + swizzled(k * 16 + lane % 16, warp_column / 8 + j * 2 + lane / 16));
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) mma(sum[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int r = row + warp_row + i * 16 + lane / 4 + half * 8, n = column + warp_column + j * 8 + lane % 4 * 2;
        if (r < M && n < N) *reinterpret_cast<uint32_t*>(c + int64_t(r) * N + n) = pack(sum[i][j][half * 2], sum[i][j][half * 2 + 1]);
      }
}
