// The backward pass: a task owns some keys of one head of k, and so dk and dv of them; the queries that see them go by,
// tile by tile, for each head of q of the group in turn. dq is summed over key blocks in the task's own memory: nothing
// is added by two threads, and the order of all sums depends on the shape alone.
//
//   p = exp(s - lse),  ds = p (do v' - delta),  dv = p' do,  dk = ds' q,  dq = ds k

struct BackwardScratch {
  float *k, *k_panels, *v;                    // of the task's keys: rows, panels by key block, rows
  float *dk, *dv;                             // (keys, Dp)
  float *q, *q_panels, *grad_o, *grad_panels;  // of all queries: transposed, panels by tile
  float *dq, *delta;                          // (queries, Dp), (queries,)
  float *lse, *shift;                         // (queries,): lse of base 2, the fraction and SHIFT - the whole part
  float *s, *ds;                              // a tile (BLOCK_K, TILE_Q): scores, then p; do v', then ds
  float* ds_units;                            // ds in units of keys (BLOCK_K / STEP, TILE_Q); floats: ds itself
  int64_t size = 0;

  BackwardScratch(float* room, const Call& c) {
    const int64_t D = c.problem.D, keys = c.chunk, queries = round_up(c.longest_q, TILE_Q);
    const auto take = [&](float*& p, int64_t floats) { p = room + size, size += round_up(floats, WIDEST); };
    take(k, keys * D), take(v, keys * D), take(k_panels, keys * c.Dp);
    take(dk, keys * c.Dp), take(dv, keys * c.Dp);
    take(q, queries * D), take(grad_o, queries * D), take(q_panels, queries * c.Dp), take(grad_panels, queries * c.Dp);
    take(dq, queries * c.Dp), take(lse, queries), take(shift, queries), take(delta, queries);
    take(s, BLOCK_K * TILE_Q), take(ds, BLOCK_K * TILE_Q), take(ds_units, BLOCK_K * TILE_Q);
  }
};

// What is wanted, for itself and for others.
struct Needs {
  bool dq, dk, dv, dalibi, ds, anything;
  explicit Needs(const Gradients& g)
      : dq(g.dq), dk(g.dk), dv(g.dv), dalibi(g.dalibi_slopes), ds(dq || dk || dalibi), anything(ds || dv) {}
};

template <int V>
inline void store_tile(Fp32, float* tile, float*, int64_t k, int64_t lane, const vf (&x)[4][V]) {
  for (int r = 0; r < 4; ++r)
    for (int v = 0; v < V; ++v) F32::store(tile + (k + r) * TILE_Q + lane + v * W, x[r][v]);
}
#ifdef HOTLOOP_BF16
// In units of queries over the floats that have been read, and in units of keys where `units` are wanted.
template <int V>
inline void store_tile(Bf16, float* tile, float* units, int64_t k, int64_t lane, const vf (&x)[4][V]) {
  for (int r = 0; r < 4; ++r) {
    float* to = tile + (k + r) * TILE_Q + lane / 2;
    if constexpr (V == 2) {
      F32::store(to, (vf)_mm512_cvtne2ps_pbh((__m512)x[r][1], (__m512)x[r][0]));
    } else {
      const __m256bh half = _mm512_cvtneps_pbh((__m512)x[r][0]);
      std::memcpy(to, &half, sizeof half);
    }
  }
  if (units == nullptr) return;
  for (int r = 0; r < 4; r += 2)
    for (int v = 0; v < V; ++v) F32::store(units + (k + r) / 2 * TILE_Q + lane + v * W, pairs(x[r][v], x[r + 1][v]));
}
#endif

// p and ds of a column. PLAIN: nothing is hidden, shaped or dropped. Returns the sum of ds times ALiBi's distance.
template <class Dot, int V, bool PLAIN>
float differentiate(const Scores& scores, const BackwardScratch& t, const Needs& needs, Range rows, int64_t key,
                    int64_t query, int64_t lane) {
  vf lse[V], shift[V], delta[V], alibi = {};
  for (int v = 0; v < V; ++v) {
    lse[v] = F32::load(t.lse + query + v * W);
    shift[v] = F32::load(t.shift + query + v * W);
    delta[v] = F32::load(t.delta + query + v * W);
  }
  const float scale = scores.scale * LOG2_E;
  float* units = Dot::STEP > 1 && needs.dq ? t.ds_units : nullptr;
  for (int64_t k = rows.begin; k < rows.end; k += 4) {
    vf p[4][V], ds[4][V], keep[V][4];
    if (!PLAIN && scores.dropped)
      for (int v = 0; v < V; ++v) keep_factors(scores, query + v * W, key + k, keep[v]);
    for (int r = 0; r < 4; ++r)
      for (int v = 0; v < V; ++v) {
        const int64_t at = (k + r) * TILE_Q + lane + v * W;
        vf x = F32::load(t.s + at);
        if constexpr (PLAIN) {
          p[r][v] = exp2(x * scale - lse[v], shift[v]);
          if (needs.ds) ds[r][v] = p[r][v] * (F32::load(t.ds + at) - delta[v]);
        } else {
          const Place place(scores, query + v * W, key + k + r);
          const vf capped = scores.softcap > 0 ? tanh(x * (scores.scale / scores.softcap)) : vf{};
          x = scores.softcap > 0 ? capped * scores.softcap : x * scores.scale;
          x -= scores.alibi_slope * place.magnitude();
          x = key + k + r < scores.nk ? select(place.hidden(scores), set(-INFINITY), x) : set(-INFINITY);
          p[r][v] = exp2(x * LOG2_E - lse[v], shift[v]);
          if (needs.ds) {
            vf dp = F32::load(t.ds + at);
            if (scores.dropped) dp *= keep[v][r];
            ds[r][v] = p[r][v] * (dp - delta[v]);
            if (needs.dalibi) alibi += ds[r][v] * place.magnitude();
            ds[r][v] *= 1 - capped * capped;
          }
          if (scores.dropped) p[r][v] *= keep[v][r];
        }
      }
    if (needs.dv) store_tile<V>(Dot(), t.s, nullptr, k, lane, p);
    if (needs.ds) store_tile<V>(Dot(), t.ds, units, k, lane, ds);
  }
  return needs.dalibi && !PLAIN ? sum_of(alibi) : 0;
}

template <class Dot>
struct BackwardTask {
  const Call& c;
  const Task& task;
  const Segment& s = *task.segment;
  const int64_t D = c.problem.D, U = D / Dot::STEP, Dp = c.Dp;
  static constexpr int64_t KEY_PANEL = BLOCK_K / Dot::STEP * W, QUERY_PANEL = TILE_Q / Dot::STEP * W;
  const Needs needs{c.gradients};
  BackwardScratch t;

  BackwardTask(const Call& c, const Task& task, float* room) : c(c), task(task), t(room, c) {}

  template <int V>
  float column(const Scores& scores, Range rows, int64_t first /* of the task's keys */, int64_t query, int64_t lane,
               bool plain) {
    const auto product = [&](float* tile, const float* a, const float* b) {
      for (int64_t k = rows.begin; k < rows.end; k += ROWS) {
        vf x[ROWS][V] = {};
        multiply<Dot, V>(x, a + (first + k) * U, U, 1, b + query * U, U * W, U);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) F32::store(tile + (k + r) * TILE_Q + lane + v * W, x[r][v]);
      }
    };
    product(t.s, t.k, t.q);
    if (needs.ds) product(t.ds, t.v, t.grad_o);
    const int64_t key = task.range.begin + first;
    const float alibi = plain ? differentiate<Dot, V, true>(scores, t, needs, rows, key, query, lane)
                              : differentiate<Dot, V, false>(scores, t, needs, rows, key, query, lane);
    if (needs.dq) {
      const float* units = Dot::STEP > 1 ? t.ds_units : t.ds;
      const int64_t begin = rows.begin / Dot::STEP;
      accumulate<Dot>({t.dq + query * Dp, Dp, nullptr, false}, V * W, vectors(D),
                      {units + begin * TILE_Q + lane, 1, TILE_Q},
                      {t.k_panels + first * Dp / Dot::STEP + begin * W, KEY_PANEL}, rows.size() / Dot::STEP);
    }
    return alibi;
  }

  // One key block and one tile of queries.
  float tile(const Scores& scores, Range keys, Range queries) {
    const int64_t first = keys.begin - task.range.begin;
    Range rows[TILE_Q / LANES];
    int64_t lanes = 0;
    float alibi = 0;
    for (int64_t lane = 0; lane < queries.size(); lane += LANES) {
      const Range part = {queries.begin + lane, smaller(queries.begin + lane + LANES, queries.end)};
      const Range seen = s.keys(part);
      Range& r = rows[lane / LANES];
      r = {larger(0, seen.begin - keys.begin) / GROUP * GROUP,
           round_up(smaller(keys.size(), seen.end - keys.begin), GROUP)};
      lanes = lane + (part.size() > W ? LANES : W);
      if (r.empty()) continue;
      const bool plain = !scores.shaped && !scores.dropped &&
                         s.all_visible(part, {keys.begin + r.begin, keys.begin + r.end});
      alibi += part.size() > W ? column<VECTORS>(scores, r, first, part.begin, lane, plain)
                               : column<1>(scores, r, first, part.begin, lane, plain);
    }
    // Each group of keys has been computed for some columns; groups that share them go together.
    const auto seen_by = [&](int64_t k) {
      Range seen = {lanes, 0};
      for (int64_t lane = 0; lane < lanes; lane += LANES)
        if (rows[lane / LANES].begin <= k && k < rows[lane / LANES].end)
          seen = {smaller(seen.begin, lane), smaller(lanes, lane + LANES)};
      return seen;
    };
    for (int64_t k = 0, end; k < keys.size(); k = end) {
      const Range seen = seen_by(k);
      for (end = k + GROUP; end < keys.size(); end += GROUP)
        if (const Range next = seen_by(end); next.begin != seen.begin || next.end != seen.end) break;
      if (seen.empty()) continue;
      const int64_t offset = seen.begin / Dot::STEP, units = seen.size() / Dot::STEP;
      const int64_t at = queries.begin * Dp / Dot::STEP + offset * W;
      const auto add = [&](float* c, const float* a, const float* b) {
        accumulate<Dot>({c + (first + k) * Dp, Dp, nullptr, false}, end - k, vectors(D),
                        {a + k * TILE_Q + offset, TILE_Q, 1}, {b + at, QUERY_PANEL}, units);
      };
      if (needs.dv) add(t.dv, t.s, t.grad_panels);
      if (needs.dk) add(t.dk, t.ds, t.q_panels);
    }
    return alibi;
  }

  // lse and delta = rowsum(do * o) - dlse of the tile that begins at i. A query that sees nothing has p 0 and delta 0,
  // whatever is upstream of it.
  template <class S>
  void prepare(int64_t h, int64_t i) {
    const Problem& p = c.problem;
    const Range rows = {i, smaller(i + TILE_Q, s.nq)};
    const auto grad_o = rows_of<S>(c.gradients.upstream, s, s.first_q, h, rows);
    const auto o = rows_of<S>(c.contiguous_o(), s, s.first_q, h, rows);
    const int64_t at = c.lse_at(s, h) + i;
    const float *lse = reinterpret_cast<const float*>(p.lse) + at,
                *dlse = c.gradients.dlse ? reinterpret_cast<const float*>(c.gradients.dlse) + at : nullptr;
    for (int64_t j = 0; j < TILE_Q; ++j) {
      const bool seeing = j < rows.size() && lse[j] != -INFINITY;
      // What is subtracted from the scores is small, so that the difference is rounded finely.
      const double of_base_2 = seeing ? lse[j] * LOG2_E_EXACT : INFINITY;
      const double whole = std::abs(of_base_2) < LARGE ? std::nearbyint(of_base_2) : 0;
      t.lse[i + j] = float(of_base_2 - whole);
      t.shift[i + j] = SHIFT - float(whole);
      t.delta[i + j] = 0;
      if (!seeing) continue;
      vf sum = {};
      for (int64_t d = 0; d < D; d += W) {
        const int64_t n = smaller(W, D - d);
        sum += Fp32::units<S>(grad_o(j) + d, n) * Fp32::units<S>(o(j) + d, n);
      }
      t.delta[i + j] = sum_of(sum) - (dlse == nullptr ? 0 : dlse[j]);
    }
  }

  // The tiles of `queries`.
  template <class S>
  void pack_queries(int64_t h, Range queries) {
    for (int64_t i = queries.begin; i < queries.end; i += TILE_Q) {
      const Range tile = {i, smaller(i + TILE_Q, s.nq)};
      const auto q = rows_of<S>(c.problem.q, s, s.first_q, h, tile);
      const auto upstream = rows_of<S>(c.gradients.upstream, s, s.first_q, h, tile);
      const auto grad_o = [&](int64_t j) { return t.lse[i + j] == INFINITY ? nullptr : upstream(j); };
      const int64_t rows = round_up(tile.size(), W);
      prepare<S>(h, i);
      pack_transposed<Dot, S>(t.q + i * U, rows, D, q);
      if (needs.dk) pack_panels<Dot, S>(t.q_panels + i * Dp / Dot::STEP, QUERY_PANEL, rows, D, q);
      if (needs.ds) pack_transposed<Dot, S>(t.grad_o + i * U, rows, D, grad_o);
      if (needs.dv) pack_panels<Dot, S>(t.grad_panels + i * Dp / Dot::STEP, QUERY_PANEL, rows, D, grad_o);
    }
  }

  // The gradient of a sink: -sum of p_sink * delta over all queries.
  template <class S>
  float sink_gradient(int64_t h) {
    const float* lse = reinterpret_cast<const float*>(c.problem.lse) + c.lse_at(s, h);
    const float sink = reinterpret_cast<const float*>(c.problem.sinks)[h];
    double sum = 0;
    for (int64_t i = 0; i < s.nq; i += TILE_Q) {
      prepare<S>(h, i);
      for (int64_t j = i; j < smaller(i + TILE_Q, s.nq); ++j)
        if (lse[j] != -INFINITY) sum += std::exp(sink - lse[j]) * t.delta[j];
    }
    return float(-sum);
  }

  template <class S>
  void pack_keys() {
    const Problem& p = c.problem;
    for (int64_t j = task.range.begin; j < task.range.end; j += BLOCK_K) {
      const Range keys = {j, smaller(j + BLOCK_K, task.range.end)};
      const int64_t rows = round_up(keys.size(), GROUP), at = j - task.range.begin;
      const auto k = rows_of<S>(p.k, s, s.first_k, task.head, keys), v = rows_of<S>(p.v, s, s.first_k, task.head, keys);
      pack_rows<Dot, S>(t.k + at * U, rows, D, k);
      if (needs.ds) pack_rows<Dot, S>(t.v + at * U, rows, D, v);
      if (needs.dq) pack_panels<Dot, S>(t.k_panels + at * Dp / Dot::STEP, KEY_PANEL, rows, D, k);
    }
  }

  // Rows of a contiguous result (positions, heads, D).
  template <class S>
  void write(int64_t address, int64_t position, int64_t heads, int64_t head, int64_t rows, const float* x,
             float factor) {
    auto* out = reinterpret_cast<typename S::type*>(address) + (position * heads + head) * D;
    for (int64_t i = 0; i < rows; ++i, out += heads * D, x += Dp) store_row<S>(out, x, D, factor);
  }

  template <class S>
  void run(float* dalibi /* (group,) */) {
    const Problem& p = c.problem;
    const Gradients& g = c.gradients;
    const int64_t hk = task.head, group = c.group(), rows = round_up(task.range.size(), GROUP);
    const Range seen = needs.anything && !task.range.empty() ? s.queries(task.range) : Range{0, 0};
    std::memset(t.dk, 0, rows * Dp * sizeof(float));
    std::memset(t.dv, 0, rows * Dp * sizeof(float));
    if (!seen.empty()) pack_keys<S>();
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
      if (g.dsinks && task.chunk == 0)
        reinterpret_cast<float*>(g.dsinks)[s.ordinal * p.Hq + h] = sink_gradient<S>(h);
      if (needs.dq) std::memset(t.dq, 0, round_up(s.nq, TILE_Q) * Dp * sizeof(float));
      const Scores scores(c, s, h);
      double sum = 0;
      if (!seen.empty()) {
        pack_queries<S>(h, {seen.begin / TILE_Q * TILE_Q, seen.end});
        for (int64_t j = task.range.begin; j < task.range.end; j += BLOCK_K) {
          const Range keys = {j, smaller(j + BLOCK_K, task.range.end)}, by = s.queries(keys);
          for (int64_t i = by.begin / TILE_Q * TILE_Q; i < by.end; i += TILE_Q)
            sum += tile(scores, keys, {i, smaller(i + TILE_Q, s.nq)});
        }
      }
      dalibi[h - hk * group] = float(-sum);
      if (!needs.dq) continue;
      if (c.partial_dq == nullptr)
        write<S>(g.dq, c.position_q(s), p.Hq, h, s.nq, t.dq, c.numbers.scale);
      else
        std::memcpy(c.partial_dq + (task.chunk * c.lse_size + c.lse_at(s, h)) * Dp, t.dq, s.nq * Dp * sizeof(float));
    }
    const int64_t position = c.position_k(s) + task.range.begin;
    if (needs.dk) write<S>(g.dk, position, p.Hk, hk, task.range.size(), t.dk, c.numbers.scale);
    if (needs.dv) write<S>(g.dv, position, p.Hk, hk, task.range.size(), t.dv, 1);
  }
};

// dq of some queries of one head from the parts that the tasks of its segment have.
template <class S>
void sum_task(const Call& c, const Task& task) {
  const Segment& s = *task.segment;
  const int64_t D = c.problem.D, chunks = c.chunks_of(s);
  auto* out = reinterpret_cast<typename S::type*>(c.gradients.dq);
  for (int64_t i = task.range.begin; i < task.range.end; ++i) {
    float* x = c.partial_dq + (c.lse_at(s, task.head) + i) * c.Dp;
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t d = 0; d < D; d += W)
        F32::store(x + d, F32::load(x + d) + F32::load(x + chunk * c.lse_size * c.Dp + d));
    store_row<S>(out + ((c.position_q(s) + i) * c.problem.Hq + task.head) * D, x, D, c.numbers.scale);
  }
}
