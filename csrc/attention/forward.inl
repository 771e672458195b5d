// The forward pass: a block of queries of one head goes through the keys that it sees, block by block, with the running
// maximum and sum of each query. Dao, "FlashAttention-2: Faster attention with better parallelism and work
// partitioning" (2023).

constexpr float LARGE = 0x1p20f;  // scores of this size and above are not rounded as finely

// Memory of one thread.
struct ForwardScratch {
  float* q;             // panels of D / STEP units
  float *o, *n, *l;     // (BLOCK_Q, Dp), (BLOCK_Q,), (BLOCK_Q,): o and l are sums of 2^(score - n)
  float* tile;          // (BLOCK_K, LANES): scores; then probabilities, in units of keys (BLOCK_K / STEP, LANES)
  float factor[LANES];  // of o, where the maximum has grown
  int64_t size = 0;

  ForwardScratch(float* room, const Call& c) {
    const auto take = [&](float*& p, int64_t floats) { p = room + size, size += floats; };
    take(q, BLOCK_Q * c.problem.D), take(o, BLOCK_Q * c.Dp), take(n, BLOCK_Q), take(l, BLOCK_Q);
    take(tile, BLOCK_K * LANES);
  }
};

template <class S>
auto rows_of(const Strided& x, const Segment& s, int64_t first, int64_t head, Range rows) {
  using T = typename S::type;
  const int64_t offset = s.ordinal * x.batch + (first + rows.begin) * x.row + head * x.head;
  const T* at = reinterpret_cast<const T*>(x.address) + offset;
  return [at, row = x.row, n = rows.size()](int64_t i) { return i < n ? at + i * row : nullptr; };
}

template <class Dot, class S>
void pack_keys(const Call& c, const Segment& s, int64_t hk, int64_t block, const PackedKeys& to) {
  const Problem& p = c.problem;
  const Range keys = {block * BLOCK_K, smaller(s.nk, (block + 1) * BLOCK_K)};
  const int64_t rows = round_up(keys.size(), GROUP), at = keys.begin / Dot::STEP;
  pack_rows<Dot, S>(to.k + at * p.D, rows, p.D, rows_of<S>(p.k, s, s.first_k, hk, keys));
  pack_panels<Dot, S>(to.v + at * c.Dp, BLOCK_K / Dot::STEP * W, rows, p.D, rows_of<S>(p.v, s, s.first_k, hk, keys));
}

// Probabilities, unnormalised, of four keys and V vectors of queries, as A of the product with v.
template <int V>
inline void store_p(Fp32, float* p, int64_t k, const vf (&x)[4][V]) {
  for (int r = 0; r < 4; ++r)
    for (int v = 0; v < V; ++v) F32::store(p + (k + r) * LANES + v * W, x[r][v]);
}
#ifdef HOTLOOP_BF16
template <int V>
inline void store_p(Bf16, float* p, int64_t k, const vf (&x)[4][V]) {
  for (int r = 0; r < 4; r += 2)
    for (int v = 0; v < V; ++v) F32::store(p + (k + r) / 2 * LANES + v * W, pairs(x[r][v], x[r + 1][v]));
}
#endif

template <class Dot, int V>
void attend(const Call& c, const Scores& scores, ForwardScratch& t, const PackedKeys& packed, int64_t key, Range rows,
            int64_t query, int64_t column, bool edge, bool fresh) {
  const int64_t U = c.problem.D / Dot::STEP;
  vf top[V] = {};
  for (vf& x : top) x = set(-INFINITY);
  for (int64_t k = rows.begin; k < rows.end; k += ROWS) {
    vf s[ROWS][V] = {};
    multiply<Dot, V>(s, packed.k + (key + k) * U, U, 1, t.q + column * U, U * W, U);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        F32::store(t.tile + (k + r) * LANES + v * W, s[r][v]);
        top[v] = maximum(top[v], s[r][v]);
      }
  }
  if (edge || scores.shaped) {
    shape<V>(t.tile, scores, rows, query, key);
    for (int v = 0; v < V; ++v) {
      top[v] = set(-INFINITY);
      for (int64_t k = rows.begin; k < rows.end; ++k) top[v] = maximum(top[v], F32::load(t.tile + k * LANES + v * W));
    }
  }
  // Probabilities are relative to 2^n, n the whole number next to the greatest score: changing n rounds nothing.
  float scale = scores.factor() * LOG2_E;
  vf n[V], shift[V], least[V], l[V], sum[4][V] = {};
  float largest = 0;
  for (int v = 0; v < V; ++v) {
    const vf before = F32::load(t.n + column + v * W), x = top[v] * scale;
    const vf now = maximum(before, select(magnitude_of(x) < LARGE, (x + ROUND) - ROUND, x));
    F32::store(t.n + column + v * W, now);
    n[v] = select(now == -INFINITY, vf{}, now);  // of queries that have seen nothing yet
    largest = std::max(largest, max_of(magnitude_of(n[v])));
    const vf factor = exp2(before - n[v]);
    F32::store(t.factor + v * W, factor);
    l[v] = F32::load(t.l + column + v * W) * factor;
  }
  if (largest >= LARGE) {  // SHIFT - n would not be exact
    for (int64_t k = rows.begin; k < rows.end; ++k)
      for (int v = 0; v < V; ++v) {
        float* at = t.tile + k * LANES + v * W;
        F32::store(at, F32::load(at) * scale - n[v]);
      }
    for (vf& x : n) x = vf{};
    scale = 1;
  }
  for (int v = 0; v < V; ++v) {
    shift[v] = SHIFT - n[v];
    least[v] = (n[v] - 127.0f) / scale;
  }
  for (int64_t k = rows.begin; k < rows.end; k += 4) {
    vf p[4][V];
    for (int r = 0; r < 4; ++r)
      for (int v = 0; v < V; ++v) {
        const vf s = maximum(F32::load(t.tile + (k + r) * LANES + v * W), least[v]), shifted = s * scale + shift[v];
        p[r][v] = exp2_of(s * scale - (shifted - shift[v]), shifted);
        sum[r][v] += p[r][v];
      }
    if (scores.dropped)
      for (int v = 0; v < V; ++v) {
        vf factor[4];
        keep_factors(scores, query + v * W, key + k, factor);
        for (int r = 0; r < 4; ++r) p[r][v] *= factor[r];
      }
    store_p<V>(Dot(), t.tile, k, p);
  }
  for (int v = 0; v < V; ++v)
    F32::store(t.l + column + v * W, l[v] + ((sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v])));
  const int64_t first = rows.begin / Dot::STEP;
  accumulate<Dot>({t.o + column * c.Dp, c.Dp, t.factor, fresh}, V * W, vectors(c.problem.D),
                  {t.tile + first * LANES, 1, LANES},
                  {packed.v + key / Dot::STEP * c.Dp + first * W, BLOCK_K / Dot::STEP * W}, rows.size() / Dot::STEP);
}

template <class S>
void store_row(typename S::type* out, const float* x, int64_t D, float factor) {
  for (int64_t d = 0; d < D; d += W) {
    const vf y = F32::load(x + d) * factor;
    d + W <= D ? S::store(out + d, y) : store_part<S>(out + d, D - d, y);
  }
}

// o and lse of the block from what has been summed.
template <class S>
void finish(const Call& c, const Task& task, const ForwardScratch& t, bool seen) {
  const Problem& p = c.problem;
  const Segment& s = *task.segment;
  float* lse = reinterpret_cast<float*>(p.lse) + c.lse_at(s, task.head);
  auto* o = reinterpret_cast<typename S::type*>(p.o) + (c.position_q(s) * p.Hq + task.head) * p.D;
  for (int64_t i = 0; i < task.range.size(); ++i) {
    auto* out = o + (task.range.begin + i) * p.Hq * p.D;
    float& l = lse[task.range.begin + i];
    if (!seen || t.l[i] == 0) {
      l = -INFINITY;
      std::memset(out, 0, p.D * sizeof *out);
      continue;
    }
    const double sum = t.l[i];
    double total = t.n[i] / LOG2_E_EXACT + std::log(sum), share = 1;  // of the keys, the rest is the sink's
    if (p.sinks) {
      const double more = reinterpret_cast<const float*>(p.sinks)[task.head] - total;
      share = 1 / (1 + std::exp(more));
      total += more > 0 ? more + std::log1p(std::exp(-more)) : std::log1p(std::exp(more));
    }
    l = t.n[i] == INFINITY ? INFINITY : float(total);
    store_row<S>(out, t.o + i * c.Dp, p.D, float(share / sum));
  }
}

template <class Dot, class S>
void forward_task(const Call& c, const Task& task, const PackedKeys& packed, float* room) {
  const Segment& s = *task.segment;
  const int64_t n = task.range.size();
  const Scores scores(c, s, task.head);
  ForwardScratch t(room, c);
  const Range keys = s.keys(task.range);
  if (!keys.empty()) {
    pack_transposed<Dot, S>(t.q, round_up(n, W), c.problem.D,
                            rows_of<S>(c.problem.q, s, s.first_q, task.head, task.range));
    for (int64_t i = 0; i < BLOCK_Q; ++i) t.n[i] = -INFINITY, t.l[i] = 0;
  }
  bool fresh[BLOCK_Q / LANES];
  for (bool& f : fresh) f = true;
  for (int64_t key = keys.begin / BLOCK_K * BLOCK_K; key < keys.end; key += BLOCK_K)
    for (int64_t column = 0; column < n; column += LANES) {
      const Range queries = {task.range.begin + column, smaller(task.range.begin + column + LANES, task.range.end)};
      const Range seen = s.keys(queries);
      const Range rows = {larger(0, seen.begin - key) / GROUP * GROUP,
                          round_up(smaller(BLOCK_K, seen.end - key), GROUP)};
      if (rows.empty()) continue;
      const bool edge = !s.all_visible(queries, {key + rows.begin, key + rows.end});
      bool& first = fresh[column / LANES];
      if (queries.size() > W)
        attend<Dot, VECTORS>(c, scores, t, packed, key, rows, queries.begin, column, edge, first);
      else
        attend<Dot, 1>(c, scores, t, packed, key, rows, queries.begin, column, edge, first);
      first = false;
    }
  finish<S>(c, task, t, !keys.empty());
}
