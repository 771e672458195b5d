// Attention forward in bf16: one CTA per 64 queries of one head, 4 warps of 16 rows, keys and values in tiles of 32.
//
// K and V have one buffer each. While a warp works on the scores of K's tile, V's is under way, and the other way round:
// of the two copies last committed, `copy_wait<1>` waits for the older.
//
// The faults that the tests plant: NO_SYNC (scores are read while the next K arrives), NO_WAIT (V is read in flight),
// NO_MASK (keys past the end count).
#include "ptx.cuh"

constexpr int D = 64, BM = 64, BN = 32, WARPS = 4;

// rows x 64 values from global memory (row stride D) into swizzled shared memory; zeros from row `limit` on.
template <int rows>
__device__ void load_tile(bf16* to, const bf16* from, int first, int limit) {
#pragma unroll
  for (int piece = 0; piece < rows * 8 / (WARPS * 32); piece++) {
    int i = piece * WARPS * 32 + threadIdx.x, row = i / 8, chunk = i % 8;
    copy_async(to + swizzled(row, chunk), from + int64_t(first + row) * D + chunk * 8, first + row < limit);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
attention(const bf16* q,  // (heads, T, D)
          const bf16* k, const bf16* v, bf16* o,
          float* lse,  // (heads, T), natural log
          int T, int causal, float scale) {
  extern __shared__ __align__(128) bf16 tiles[];
  bf16 *tile_q = tiles, *tile_k = tile_q + BM * D, *tile_v = tile_k + BN * D;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = blockIdx.x * BM;
  const int64_t head = int64_t(blockIdx.y) * T * D;
  const int end = causal ? min(first_row + BM, T) : T, blocks = (end + BN - 1) / BN;
  const float scale_log2 = scale * 1.44269504088896340736f;

  load_tile<BM>(tile_q, q + head, first_row, T);
  load_tile<BN>(tile_k, k + head, 0, T);
  copy_commit();
  load_tile<BN>(tile_v, v + head, 0, T);
  copy_commit();

  uint32_t query[D / 16][4];
  float out[D / 8][4] = {};
  float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};  // of this thread's rows: lane / 4 and 8 below it

  for (int n = 0; n < blocks; n++) {
    copy_wait<1>();
    __syncthreads();
    if (n == 0)
      for (int i = 0; i < D / 16; i++)
        load_matrices(query[i], tile_q + swizzled(warp * 16 + lane % 16, i * 2 + lane / 16));

    float score[BN / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; i++)
#pragma unroll
      for (int j = 0; j < BN / 16; j++) {
        uint32_t key[4];
        load_matrices(key, tile_k + swizzled(j * 16 + lane % 8 + lane / 16 * 8, i * 2 + lane / 8 % 2));
        mma(score[2 * j], query[i], key[0], key[1]);
        mma(score[2 * j + 1], query[i], key[2], key[3]);
      }
#ifndef NO_SYNC
    __syncthreads();
#endif
    if (n + 1 < blocks) load_tile<BN>(tile_k, k + head, (n + 1) * BN, T);
    copy_commit();

#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = first_row + warp * 16 + lane / 4 + half * 8;
      float peak = highest[half];
#pragma unroll
      for (int j = 0; j < BN / 8; j++)
#pragma unroll
        for (int e = half * 2; e < half * 2 + 2; e++) {
          const int column = n * BN + j * 8 + lane % 4 * 2 + e % 2;
#ifdef NO_MASK
          const bool seen = !causal || column <= row;
#else
          const bool seen = column < T && (!causal || column <= row);
#endif
          score[j][e] = seen ? score[j][e] * scale_log2 : -INFINITY;
          peak = fmaxf(peak, score[j][e]);
        }
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
      const float shrink = exp2f(highest[half] - peak);
      highest[half] = peak;
      total[half] *= shrink;
#pragma unroll
      for (int j = 0; j < D / 8; j++) out[j][half * 2] *= shrink, out[j][half * 2 + 1] *= shrink;
#pragma unroll
      for (int j = 0; j < BN / 8; j++)
#pragma unroll
        for (int e = half * 2; e < half * 2 + 2; e++) total[half] += score[j][e] = exp2f(score[j][e] - peak);
    }

#ifndef NO_WAIT
    copy_wait<1>();
#endif
    __syncthreads();
#pragma unroll
    for (int i = 0; i < BN / 16; i++) {
      const uint32_t weight[4] = {pack(score[2 * i][0], score[2 * i][1]), pack(score[2 * i][2], score[2 * i][3]),
                                  pack(score[2 * i + 1][0], score[2 * i + 1][1]), pack(score[2 * i + 1][2], score[2 * i + 1][3])};
#pragma unroll
      for (int j = 0; j < D / 16; j++) {
        uint32_t value[4];
        load_matrices_transposed(value, tile_v + swizzled(i * 16 + lane % 16, j * 2 + lane / 16));
        mma(out[2 * j], weight, value[0], value[1]);
        mma(out[2 * j + 1], weight, value[2], value[3]);
      }
    }
    __syncthreads();
    if (n + 1 < blocks) load_tile<BN>(tile_v, v + head, (n + 1) * BN, T);
    copy_commit();
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    total[half] += __shfl_xor_sync(~0u, total[half], 1);
    total[half] += __shfl_xor_sync(~0u, total[half], 2);
    const int row = first_row + warp * 16 + lane / 4 + half * 8;
    if (row >= T) continue;
    const float inverse = 1.f / total[half];
    bf16* place = o + head + int64_t(row) * D + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; j++)
      *reinterpret_cast<uint32_t*>(place + j * 8) = pack(out[j][half * 2] * inverse, out[j][half * 2 + 1] * inverse);
    if (lane % 4 == 0) lse[int64_t(blockIdx.y) * T + row] = (highest[half] + log2f(total[half])) * 0.69314718055994530942f;
  }
}
