#include "attention/plan.h"

#include <algorithm>

namespace hotloop::attention {
namespace {

// Tasks of the backward pass that there should be at least, so that threads have something to share. Independent of
// their number, on which no result may depend.
constexpr int64_t TASKS = 16;
constexpr int64_t SHORTEST_CHUNK = 256;

}  // namespace

Call::Call(const Problem& p, const Numbers& n) : problem(p), gradients{}, numbers(n) {
  const auto* cu_q = reinterpret_cast<const int32_t*>(p.cu_q);
  const auto* cu_k = reinterpret_cast<const int32_t*>(p.cu_k);
  for (int64_t i = 0; i < p.segments; ++i) {
    Segment s = {i, 0, 0, p.Tq, p.Tk, key_blocks, 0, 0};
    if (packed()) s = {i, cu_q[i], cu_k[i], cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i], key_blocks, 0, 0};
    if (s.nq == 0 && s.nk == 0) continue;
    s.left = p.left - (s.nk - s.nq), s.right = p.right + (s.nk - s.nq);
    key_blocks += round_up(s.nk, BLOCK_K) / BLOCK_K;
    longest_q = larger(longest_q, s.nq), longest_k = larger(longest_k, s.nk);
    segments.push_back(s);
  }
  Dp = round_up(p.D, WIDEST);
  lse_size = p.Hq * p.Tq * (packed() ? 1 : p.segments);
  // Threads that run out of work wait for those that have some: the last tasks should be short.
  std::stable_sort(segments.begin(), segments.end(),
                   [](const Segment& a, const Segment& b) { return a.nq * a.nk > b.nq * b.nk; });

  // With a causal mask the last queries see most keys, and the first keys are seen by most queries.
  for (const Segment& s : segments)
    for (int64_t hk = 0; hk < p.Hk && s.nq > 0; ++hk) {
      const int64_t first = query_tasks.size();
      for (int64_t begin = (s.nq - 1) / BLOCK_Q * BLOCK_Q; begin >= 0; begin -= BLOCK_Q)
        for (int64_t h = hk * group(); h < (hk + 1) * group(); ++h)
          query_tasks.push_back({&s, h, {begin, smaller(s.nq, begin + BLOCK_Q)}, 0});
      groups.push_back({&s, hk, first, int64_t(query_tasks.size()) - first});
    }

  const int64_t heads = larger(1, int64_t(segments.size()) * p.Hk), longest = round_up(larger(1, longest_k), BLOCK_K);
  chunk = larger(SHORTEST_CHUNK, round_up(longest * heads / TASKS, BLOCK_K));
  chunk = heads >= TASKS ? longest : smaller(longest, chunk);
  for (const Segment& s : segments) {
    chunks = larger(chunks, chunks_of(s));
    for (int64_t hk = 0; hk < p.Hk; ++hk)
      for (int64_t i = 0; i < chunks_of(s); ++i)
        key_tasks.push_back({&s, hk, {i * chunk, smaller(s.nk, (i + 1) * chunk)}, i});
  }
}

}  // namespace hotloop::attention
