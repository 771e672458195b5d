// Attention forward on tensor cores through mma.sync: sm_80 and newer. The formula: kernels/attention/op.py.
//
// A CTA computes a tile of ROWS rows (tiles.cuh), each of its warps WARP_ROWS of them, over blocks of keys. Scores,
// probabilities and outputs stay in registers. Blocks pass through a ring of STAGES buffers in shared memory, in the
// order K of the first, its V, K of the second, ...; at each step one is read, and the next STAGES - 1 are under way.
#pragma once

#include <type_traits>

#include "attention/tiles.cuh"
#include "common/ptx.cuh"

namespace hotloop::attention {

constexpr int WARPS = 4, THREADS = 32 * WARPS, WARP_ROWS = ROWS / WARPS;
constexpr int HEIGHT = WARP_ROWS / 16;  // of a warp's part of a tile, in matrices of mma.sync
constexpr int MINE = 2 * HEIGHT;        // rows of which a thread holds columns: rows 8 r + lane / 4 of its warp's
static_assert(THREADS == ROWS, "each thread finds the diagonal of one row");
constexpr unsigned ALL = 0xffffffffu;

template <class T_, int D_, int KEYS_, int STAGES_>
struct Shape {
  using T = T_;
  static constexpr int D = D_, KEYS = KEYS_, STAGES = STAGES_;
  static constexpr int ROW_BYTES = 2 * D, CHUNKS = D / 8;  // a chunk is 16 bytes
  static constexpr int BLOCK_BYTES = KEYS * ROW_BYTES, RING_BYTES = STAGES * BLOCK_BYTES, Q_BYTES = ROWS * ROW_BYTES;
  static constexpr int LOAD_ROWS = THREADS / CHUNKS;  // that all threads load at a time
};

// Where a chunk of a row lies: turned by the row, so that eight rows at one chunk, which ldmatrix reads, and eight
// chunks of one row, which copies write, lie in different banks.
template <class S>
__device__ uint32_t place(int row, int chunk) {
  return row * S::ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}
// The address of chunk c + 2 d from that of chunk c < 2 of a row. Four addresses serve any D, the rest is an offset.
__device__ inline uint32_t after(uint32_t address, int d) { return (address ^ (d % 4 << 5)) + d / 4 * 128; }

__device__ inline float tanh(float x) {
  const float a = fabsf(x), xx = x * x;
  const float far = 1 - __fdividef(2, 1 + ptx::exp2(2 * 1.4426950408889634f * a));
  // Near 0 that difference would cancel; the next term is below 2^-24 of the sum.
  const float near = a + a * xx * (-1 / 3.0f + xx * (2 / 15.0f + xx * (-17 / 315.0f)));
  return copysignf(a < 0.2f ? near : far, x);
}

// What follows from these is computed anew in each step, for want of registers.
__device__ inline int warp_of_thread() { return ptx::opaque(threadIdx.x / 32); }
__device__ inline int lane_of_thread() { return ptx::opaque(threadIdx.x % 32); }
__device__ inline int row_of_thread() { return warp_of_thread() * WARP_ROWS + lane_of_thread() / 4; }

template <class S>
struct Forward {
  using T = typename S::T;
  const Problem& p;
  const Tile& tile;
  const uint32_t q_tile;  // in shared memory: Q, later O; then the ring

  float out[HEIGHT][S::D / 8][4] = {};  // sums of p v
  float total[MINE] = {};               // sums of p over this thread's columns
  float reference[MINE];                // a score of the row, at most `headroom` below its highest; -inf: none yet
  float score[HEIGHT][S::KEYS / 8][4];
  uint32_t probability[S::KEYS / 16][HEIGHT][4];  // left operands of mma.sync

  __device__ Forward(const Problem& p, const Tile& tile, uint32_t shared) : p(p), tile(tile), q_tile(shared) {
#pragma unroll
    for (float& x : reference) x = -INFINITY;
  }

  __device__ int head(int row) const { return tile.head * p.group + (tile.first + row) % p.group; }

  // score = q k^T - reference. The products are summed from minus the reference on, which costs nothing. Where that is
  // large they are summed from 0, as the sum would be rounded to its last place (and equal scores must stay equal).
  __device__ void score_block(uint32_t k_block) {
    float later[MINE];
    bool is_later = p.squash > 0;
#pragma unroll
    for (int r = 0; r < MINE; r++) {
      const float base = reference[r] == -INFINITY ? 0 : reference[r];
      const bool is_far = p.squash > 0 || fabsf(base) > p.far;
      is_later |= is_far;
      later[r] = is_far ? base : 0;
#pragma unroll
      for (int j = 0; j < S::KEYS / 8; j++)
        score[r / 2][j][r % 2 * 2] = score[r / 2][j][r % 2 * 2 + 1] = is_far ? 0 : -base;
    }
    const int warp = warp_of_thread(), lane = lane_of_thread();
    const uint32_t q_row = q_tile + place<S>(warp * WARP_ROWS + lane % 16, lane / 16);
    const uint32_t k_row = k_block + place<S>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int d = 0; d < S::D / 16; d++) {
      uint32_t query[HEIGHT][4];
#pragma unroll
      for (int m = 0; m < HEIGHT; m++) ptx::load_matrices(query[m], after(q_row, d) + m * 16 * S::ROW_BYTES);
#pragma unroll
      for (int j = 0; j < S::KEYS / 16; j++) {
        uint32_t key[4];
        ptx::load_matrices(key, after(k_row, d) + j * 16 * S::ROW_BYTES);
#pragma unroll
        for (int m = 0; m < HEIGHT; m++) {
          ptx::multiply_add<T>(score[m][2 * j], query[m], key[0], key[1]);
          ptx::multiply_add<T>(score[m][2 * j + 1], query[m], key[2], key[3]);
        }
      }
    }
    if (__any_sync(ALL, is_later)) {
      if (p.squash > 0) each_score([&](float& x, int) { x = tanh(x * p.squash); });
      each_score([&](float& x, int r) { x -= later[r]; });
    }
  }

  template <class F>
  __device__ void each_score(F f) {
#pragma unroll
    for (int m = 0; m < HEIGHT; m++)
#pragma unroll
      for (int j = 0; j < S::KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) f(score[m][j][e], 2 * m + e / 2);
  }

  __device__ void mask(int first_key, const int (&diagonals)[ROWS]) {
    const int row = row_of_thread(), column = lane_of_thread() % 4 * 2;
#pragma unroll
    for (int r = 0; r < MINE; r++) {
      const Keys keys = keys_of(diagonals[row + 8 * r], tile, p);
      const int begin = keys.begin - first_key - column;
      const unsigned width = max(0, keys.end - keys.begin);
#pragma unroll
      for (int j = 0; j < S::KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (unsigned(j * 8 + e - begin) >= width) score[r / 2][j][r % 2 * 2 + e] = -INFINITY;
    }
  }

  // Scores become probabilities relative to the reference, which is raised first where one is too far above it.
  __device__ void weigh() {
    float peak[MINE], limit[MINE];
    bool is_high = false;
#pragma unroll
    for (float& x : peak) x = -INFINITY;
    each_score([&](float& x, int r) { peak[r] = fmaxf(peak[r], x); });
#pragma unroll
    for (int r = 0; r < MINE; r++) {
      limit[r] = reference[r] == -INFINITY ? -INFINITY : p.headroom;
      is_high |= peak[r] > limit[r];
    }
    if (__any_sync(ALL, is_high)) raise(peak, limit);
    each_score([&](float& x, int r) { total[r] += x = ptx::exp2(x * p.factor); });
    // Two accumulators of 8 columns lie as one left operand of 16.
#pragma unroll
    for (int i = 0; i < S::KEYS / 16; i++)
#pragma unroll
      for (int m = 0; m < HEIGHT; m++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float(&x)[4] = score[m][2 * i + e / 2];
          probability[i][m][e] = ptx::pack<T>(x[e % 2 * 2], x[e % 2 * 2 + 1]);
        }
  }

  __device__ void raise(float (&peak)[MINE], const float (&limit)[MINE]) {
    float shrink[MINE];
#pragma unroll
    for (int r = 0; r < MINE; r++) {
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(ALL, peak[r], 1));
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(ALL, peak[r], 2));
      const bool is_first = reference[r] == -INFINITY;
      if (!(peak[r] > limit[r])) peak[r] = 0;
      else reference[r] = is_first ? peak[r] : reference[r] + peak[r];
      shrink[r] = is_first ? 0 : ptx::exp2(-peak[r] * p.factor);
      total[r] *= shrink[r];
    }
    each_score([&](float& x, int r) { x -= peak[r]; });
#pragma unroll
    for (int m = 0; m < HEIGHT; m++)
#pragma unroll
      for (int j = 0; j < S::D / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) out[m][j][e] *= shrink[2 * m + e / 2];
  }

  // out += p v
  __device__ void add_block(uint32_t v_block) {
    const int lane = lane_of_thread();
    const uint32_t v_row = v_block + place<S>(lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < S::KEYS / 16; i++) {
#pragma unroll
      for (int j = 0; j < S::D / 16; j++) {
        uint32_t value[4];
        ptx::load_matrices_transposed(value, after(v_row, j) + i * 16 * S::ROW_BYTES);
#pragma unroll
        for (int m = 0; m < HEIGHT; m++) {
          ptx::multiply_add<T>(out[m][2 * j], probability[i][m], value[0], value[1]);
          ptx::multiply_add<T>(out[m][2 * j + 1], probability[i][m], value[2], value[3]);
        }
      }
    }
  }

  // o and lse of this warp's rows. o goes through the warp's part of Q's tile, to be written by whole rows.
  __device__ void finish(T* o, float* lse) {
    const int warp = warp_of_thread(), lane = lane_of_thread(), top = row_of_thread();
    const int Hq = p.Hk * p.group;
    const int64_t first = int64_t(tile.batch) * p.Tq + tile.first_q;  // position of the segment in o
    float inverse[MINE];
#pragma unroll
    for (int r = 0; r < MINE; r++) {
      total[r] += __shfl_xor_sync(ALL, total[r], 1);
      total[r] += __shfl_xor_sync(ALL, total[r], 2);
      const bool sees_none = total[r] == 0;
      inverse[r] = sees_none ? 0 : 1 / total[r];
      const int row = top + 8 * r;
      if (lane % 4 == 0 && row < tile.count)
        lse[(int64_t(tile.batch) * Hq + head(row)) * p.Tq + tile.first_q + tile.position(row, p.group)] =
            sees_none ? -INFINITY : fmaf(p.unit, reference[r], logf(total[r]));
    }
#pragma unroll
    for (int m = 0; m < HEIGHT; m++)
#pragma unroll
      for (int j = 0; j < S::D / 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float scale = inverse[2 * m + half];
          ptx::store_shared(q_tile + place<S>(top + 8 * (2 * m + half), j) + lane % 4 * 4,
                            ptx::pack<T>(out[m][j][2 * half] * scale, out[m][j][2 * half + 1] * scale));
        }
    __syncwarp();
    const int chunk = lane % S::CHUNKS;
#pragma unroll
    for (int r = lane / S::CHUNKS; r < WARP_ROWS; r += 32 / S::CHUNKS) {
      const int row = warp * WARP_ROWS + r;
      if (row >= tile.count) break;
      const int64_t position = first + tile.position(row, p.group);
      *reinterpret_cast<uint4*>(o + (position * Hq + head(row)) * S::D + chunk * 8) =
          ptx::load_shared_vector(q_tile + place<S>(row, chunk));
    }
  }
};

// Rows [first, first + KEYS) of x into a buffer; those from `size` on become zeros.
template <class S>
__device__ void load_block(uint32_t to, const typename S::T* x, int64_t stride, int first, int size) {
  const int row = threadIdx.x / S::CHUNKS, chunk = threadIdx.x % S::CHUNKS;
  x += (first + row) * stride + chunk * 8;
  to += place<S>(row, chunk);
#pragma unroll
  for (int j = 0; j < S::KEYS; j += S::LOAD_ROWS) {
    ptx::copy_async(to + j * S::ROW_BYTES, x, first + row + j < size);
    x += S::LOAD_ROWS * stride;
  }
}

template <class S>
__device__ void load_queries(uint32_t to, const typename S::T* q, const Tile& tile, const Problem& p) {
  const int chunk = threadIdx.x % S::CHUNKS;
  q += tile.q + chunk * 8;
#pragma unroll
  for (int row = threadIdx.x / S::CHUNKS; row < ROWS; row += S::LOAD_ROWS) {
    const int i = tile.position(row, p.group), head = (tile.first + row) % p.group;
    ptx::copy_async(to + place<S>(row, chunk), q + p.q(0, i, head), row < tile.count);
  }
}

template <class S>
__device__ void forward(const typename S::T* q,    // (B, Tq, Hq, D) or (total_q, Hq, D)
                        const typename S::T* k,    // (B, Tk, Hk, D) or (total_k, Hk, D)
                        const typename S::T* v,    // as k
                        const int* cu_seqlens_q,   // (S + 1,) or null
                        const int* cu_seqlens_k,   // (S + 1,) or null
                        typename S::T* o,          // (B, Tq, Hq, D) or (total_q, Hq, D), contiguous
                        float* lse,                // (B, Hq, Tq) or (Hq, total_q)
                        const Problem& p) {
  extern __shared__ __align__(128) unsigned char room[];
  // In shared memory, as there are no registers to spare.
  __shared__ Tile tile;
  __shared__ Blocks blocks;
  __shared__ Keys seen[WARPS];
  __shared__ int diagonals[ROWS];
  if (threadIdx.x < 32) {
    const Tile found = find_tile(cu_seqlens_q, cu_seqlens_k, p);
    if (threadIdx.x == 0) tile = found, blocks = blocks_of<S::KEYS>(found, p);
    if (threadIdx.x < WARPS) seen[threadIdx.x] = keys_of_rows(threadIdx.x * WARP_ROWS, WARP_ROWS, found, p);
  }
  __syncthreads();
  if (tile.count <= 0) return;
  diagonals[threadIdx.x] = diagonal_of(threadIdx.x, tile, p);  // read after further barriers
  const uint32_t q_tile = ptx::shared_address(room), ring = q_tile + S::Q_BYTES;
  // The copies of step 2 t + ahead; step 2 t reads K of block t, step 2 t + 1 its V.
  const auto fetch = [&](int t, int ahead, uint32_t to) {
    t += ahead / 2;
    if (t < blocks.count()) {
      const int first = blocks[t] * S::KEYS;
      if (ahead % 2 == 0) load_block<S>(to, k + tile.k, p.k.position, first, tile.Tk);
      else load_block<S>(to, v + tile.v, p.v.position, first, tile.Tk);
    }
    ptx::copy_commit();
  };

  if (blocks.count() > 0) load_queries<S>(q_tile, q, tile, p);
#pragma unroll
  for (int ahead = 0; ahead < S::STAGES - 1; ahead++) fetch(0, ahead, ring + ahead * S::BLOCK_BYTES);

  Forward<S> rows(p, tile, q_tile);
  uint32_t reading = ring;
  const auto arrive = [&](int t, int step) {
    ptx::copy_wait<S::STAGES - 2>();
    __syncthreads();  // for the copies of all threads, and until no warp reads the buffer before this one any more
    fetch(t, step + S::STAGES - 1, (reading == ring ? ring + S::RING_BYTES : reading) - S::BLOCK_BYTES);
  };
  const auto advance = [&] {
    reading += S::BLOCK_BYTES;
    if (reading == ring + S::RING_BYTES) reading = ring;
  };
  const auto work = [&](int t, auto is_edge) {
    const int first_key = blocks[t] * S::KEYS;
    const Keys mine = seen[warp_of_thread()];
    const bool has_work = first_key < mine.end && first_key + S::KEYS > mine.begin;
    arrive(t, 0);
    if (has_work) {
      rows.score_block(reading);
      if constexpr (decltype(is_edge)::value) rows.mask(first_key, diagonals);
      rows.weigh();
    }
    advance();
    arrive(t, 1);
    if (has_work) rows.add_block(reading);
    advance();
  };
  int t = 0;
  for (; t < blocks.full; t++) work(t, std::false_type());
  for (; t < blocks.count(); t++) work(t, std::true_type());
  rows.finish(o, lse);
}

}  // namespace hotloop::attention
