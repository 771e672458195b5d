// Which rows a CTA computes, and which keys those rows see. The letters: kernels/attention/options.py.
//
// The heads that share a head of K and V are rows of one tile: row r of a segment is query r / group of head r % group.
// So K and V are read once for all of them, a short segment fills its tiles better, and fewer keys lie on the edge of a
// causal mask.
#pragma once

#include <cstdint>

namespace hotloop::attention {

constexpr int ROWS = 128;  // of a tile: queries times heads of a group

struct Strides {
  int64_t batch, position, head;  // in elements
  __device__ int64_t operator()(int b, int i, int h) const { return b * batch + i * position + h * head; }
};

// Packed by kernels/attention/cuda.py.
struct Problem {
  Strides q, k, v;
  int batch;              // B, or S segments of a packed batch
  int Tq, Tk;             // of a packed batch: the totals
  int Hk, group;          // Hq = Hk * group
  int left, right;        // window; -1: unbounded
  int slots, together;    // find_tile
  float unit, factor;     // s = unit * score, in natural units and in those of exp2
  float headroom;         // how far a score may be above its row's reference
  float far;              // up to which reference products are summed from minus it on: score_block
  float squash;           // the score is tanh(squash * (q . k)); 0: q . k itself
};

struct Tile {
  int batch, head;       // head of K and V
  int first_q, first_k;  // where the segment starts
  int Tq, Tk;            // of the segment
  int first, count;      // rows [first, first + count) of the segment
  int64_t q, k, v;       // offsets of the segment's position 0 of the head (of the group's first)

  __device__ int position(int row, int group) const { return (first + row) / group; }  // within the segment
};

// What a slot of a packed batch holds. Segment s has the slots from first(s) = cu_seqlens_q[s] * group / ROWS + s up to
// first(s + 1), at least as many as it has tiles, as floor(b) - floor(a) + 1 >= ceil(b - a). So it is found by search,
// without a sum over the segments before it, and the host knows the number of slots. What lies past cu_seqlens_q[S] is
// segment S, without keys. All lanes of a warp search together, 32 segments a step.
__device__ inline void find_segment(Tile& tile, int slot, const int* cu_seqlens_q, const int* cu_seqlens_k,
                                    const Problem& p) {
  const auto first = [&](int s) { return int64_t(cu_seqlens_q[s]) * p.group / ROWS + s; };
  // The segment is at least this one. From there on all may be empty, as those that fill a fixed capacity are.
  const int least = max(0, slot - int(int64_t(p.Tq) * p.group / ROWS));
  if (cu_seqlens_q[least] == cu_seqlens_q[p.batch] && slot < first(p.batch)) {
    tile.first_q = tile.first_k = tile.Tq = tile.Tk = tile.first = 0;
    return;
  }
  int s = 0, step = 1;
  while (step * 32ll <= p.batch) step *= 32;
  for (; step > 0; step /= 32) {
    const int64_t probe = s + int64_t(threadIdx.x % 32) * step;
    const bool is_before = probe <= p.batch && first(int(probe)) <= slot;
    s += step * (__popc(__ballot_sync(~0u, is_before)) - 1);
  }
  tile.first_q = cu_seqlens_q[s];
  tile.Tq = (s < p.batch ? cu_seqlens_q[s + 1] : p.Tq) - tile.first_q;
  tile.first_k = s < p.batch ? cu_seqlens_k[s] : 0;
  tile.Tk = s < p.batch ? cu_seqlens_k[s + 1] - tile.first_k : 0;
  tile.first = int(slot - first(s)) * ROWS;
}

// The tile of this CTA; count <= 0: none. A column is a head of K and V (of one element of a dense batch), and has
// `slots` slots for tiles. Columns are worked on `together` at a time, as many as stay in the L2 cache, and of those the
// last slots come first, which have the most keys under a causal mask.
__device__ inline Tile find_tile(const int* cu_seqlens_q, const int* cu_seqlens_k, const Problem& p) {
  const bool is_packed = cu_seqlens_q != nullptr;
  const int columns = is_packed ? p.Hk : p.batch * p.Hk;
  const int section = blockIdx.x / (p.slots * p.together), rest = blockIdx.x % (p.slots * p.together);
  const int width = min(p.together, columns - section * p.together);
  const int slot = p.slots - 1 - rest / width, column = section * p.together + rest % width;
  Tile tile;
  tile.head = column % p.Hk;
  tile.batch = column / p.Hk;
  if (is_packed) {
    find_segment(tile, slot, cu_seqlens_q, cu_seqlens_k, p);
  } else {
    tile.first_q = tile.first_k = 0;
    tile.Tq = p.Tq;
    tile.Tk = p.Tk;
    tile.first = slot * ROWS;
  }
  tile.count = min(ROWS, tile.Tq * p.group - tile.first);
  tile.q = p.q(tile.batch, tile.first_q, tile.head * p.group);
  tile.k = p.k(tile.batch, tile.first_k, tile.head);
  tile.v = p.v(tile.batch, tile.first_k, tile.head);
  return tile;
}

// The key that row `row` of the tile is aligned with.
__device__ inline int diagonal_of(int row, const Tile& tile, const Problem& p) {
  return tile.position(row, p.group) + tile.Tk - tile.Tq;
}

// The keys [begin, end) that are seen from a diagonal.
struct Keys {
  int begin, end;
};
__device__ inline Keys keys_of(int diagonal, const Tile& tile, const Problem& p) {
  return {p.left < 0 ? 0 : max(0, diagonal - p.left), p.right < 0 ? tile.Tk : min(tile.Tk, diagonal + p.right + 1)};
}

// Keys that some of the rows [row, row + count) of the tile see; none where all of those are past its end.
__device__ inline Keys keys_of_rows(int row, int count, const Tile& tile, const Problem& p) {
  const int last = min(row + count, tile.count) - 1;
  if (last < row) return {0, 0};
  return {keys_of(diagonal_of(row, tile, p), tile, p).begin, keys_of(diagonal_of(last, tile, p), tile, p).end};
}

// The keys that a tile's rows see, in blocks and in the order of the loop: first the blocks that every row sees whole,
// then those at the edges.
struct Blocks {
  int full, edges;        // how many
  int first, first_full;  // [first, first + full + edges) are seen, [first_full, first_full + full) whole

  __device__ int count() const { return full + edges; }
  __device__ int operator[](int t) const {
    if (t < full) return first_full + t;
    const int block = first + t - full;
    return block < first_full ? block : block + full;
  }
};

template <int WIDTH>
__device__ Blocks blocks_of(const Tile& tile, const Problem& p) {
  const Keys top = keys_of(diagonal_of(0, tile, p), tile, p);
  const Keys bottom = keys_of(diagonal_of(tile.count - 1, tile, p), tile, p);
  const int end = max(0, bottom.end + WIDTH - 1) / WIDTH;
  const int first = min(top.begin / WIDTH, end), first_full = min((bottom.begin + WIDTH - 1) / WIDTH, end);
  const int full = max(0, max(0, top.end) / WIDTH - first_full);
  return {full, end - first - full, first, first_full};
}

}  // namespace hotloop::attention
