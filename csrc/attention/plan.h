// Which tasks a call consists of, and where their memory is: all that does not depend on the instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/attention.h"

namespace hotloop::attention {

constexpr int64_t BLOCK_K = 64;   // keys whose scores are in cache at once
constexpr int64_t BLOCK_Q = 128;  // queries of a task of the forward pass
constexpr int64_t TILE_Q = 64;    // queries of a tile of the backward pass
constexpr int64_t GROUP = 8;      // keys come in groups of this many; the last one is filled up with zeros
constexpr int64_t WIDEST = 16;    // floats in the widest vector, and in a line of the cache

static_assert(BLOCK_K % GROUP == 0 && BLOCK_Q % (2 * WIDEST) == 0 && TILE_Q % (2 * WIDEST) == 0);

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  int64_t size() const { return empty() ? 0 : end - begin; }
};

// One segment, or one row of a dense batch: nq queries and nk keys that see nothing else.
struct Segment {
  int64_t ordinal;
  int64_t first_q, first_k;  // positions in the packed batch; 0 where it is dense
  int64_t nq, nk;
  int64_t key_block;    // the number of its first key block, of those of all segments
  int64_t left, right;  // query i sees key j if i - left <= j <= i + right: the window, moved by nk - nq

  Range keys(Range queries) const {  // that any of the queries sees
    return {larger(0, queries.begin - left), smaller(nk, queries.end + right)};
  }
  Range queries(Range keys) const {  // that see any of the keys
    return {larger(0, keys.begin - right), smaller(nq, keys.end + left)};
  }
  bool all_visible(Range queries, Range keys) const {
    return keys.end <= nk && keys.begin >= queries.end - 1 - left && keys.end - 1 <= queries.begin + right;
  }
};

// A part of the work, done by one thread: some queries of one head of q, or some keys of one head of k.
struct Task {
  const Segment* segment;
  int64_t head;
  Range range;
  int64_t chunk;  // ordinal of the range of keys among those of its segment
};

// The tasks of one head of k of one segment, which share its keys.
struct Group {
  const Segment* segment;
  int64_t head;
  int64_t first_task, tasks;
};

// Keys and values of one head of one segment, by blocks: rows of k (BLOCK_K, D) and panels of v (Dp / W, BLOCK_K, W).
struct PackedKeys {
  float *k, *v;
};

// A call's tasks, the long ones first, and its memory.
struct Call {
  Problem problem;
  Gradients gradients;
  Numbers numbers;
  std::vector<Segment> segments;         // the empty ones left out
  std::vector<Task> query_tasks;         // of BLOCK_Q queries, by groups
  std::vector<Group> groups;
  std::vector<Task> key_tasks;           // of `chunk` keys
  int64_t key_blocks = 0, longest_q = 0, longest_k = 0;
  int64_t chunk = 0, chunks = 1;         // keys of a task, and the most tasks that a segment has for one head
  int64_t Dp = 0;                        // D, filled up to whole vectors
  int64_t lse_size = 0;                  // elements

  // Workspace. Forward: keys of all groups, null where each thread has its group's. Backward: dq of each chunk (chunks,
  // lse_size, Dp), null where there is one; dalibi_slopes of each task (key_tasks, Hq / Hk).
  PackedKeys keys = {};
  float *partial_dq = nullptr, *partial_dalibi = nullptr;
  float* scratch = nullptr;  // of the first thread
  int64_t scratch_size = 0;  // floats of each

  Call(const Problem&, const Numbers&);
  Call(const Call&) = delete;  // tasks point into it

  int64_t group() const { return problem.Hq / problem.Hk; }
  bool packed() const { return problem.cu_q != 0; }
  int64_t position_q(const Segment& s) const { return packed() ? s.first_q : s.ordinal * problem.Tq; }
  int64_t position_k(const Segment& s) const { return packed() ? s.first_k : s.ordinal * problem.Tk; }
  int64_t lse_at(const Segment& s, int64_t head) const {  // the element of query 0
    return packed() ? head * problem.Tq + s.first_q : (s.ordinal * problem.Hq + head) * problem.Tq;
  }
  int64_t chunks_of(const Segment& s) const { return larger(1, (s.nk + chunk - 1) / chunk); }
  Strided contiguous_o() const {
    const Problem& p = problem;
    return {p.o, packed() ? 0 : p.Tq * p.Hq * p.D, p.Hq * p.D, p.D};
  }
};

}  // namespace hotloop::attention
