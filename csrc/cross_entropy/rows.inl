// Kernels of one row of logits; included once for each instruction set, see cross_entropy_cpu.cpp.
#include "common/simd.h"

// Where x of the contract comes from: raw logits, scaled on the fly; or a row of scaled and capped ones.
template <class S>
struct Source {
  const typename S::type* z;
  float scale;
  vf whole(int64_t i) const { return S::load(z + i) * scale; }
  // Lanes past the end are -inf: nothing for a maximum, and 0 behind exp.
  vf part(int64_t i, int64_t n) const {
    vf x = load_part<S>(z + i, n, -INFINITY);
    return x * scale;
  }
  float at(int64_t i) const { return load_part<S>(z + i, 1, 0.0f)[0] * scale; }
};

// f(i, n, x) for all vectors of [0, v): n = W, but for the last
template <class S, class F>
inline void each(const Source<S>& source, int64_t v, F f) {
  int64_t i = 0;
  for (; i + W <= v; i += W) f(i, int64_t(W), source.whole(i));
  if (i < v) f(i, v - i, source.part(i, v - i));
}

template <class S>
float row_max(const Source<S>& source, int64_t v) {
  vf m[4];
  for (vf& one : m) one = set(-INFINITY);
  int64_t i = 0;
  for (; i + 4 * W <= v; i += 4 * W)
    for (int u = 0; u < 4; ++u) m[u] = maximum(m[u], source.whole(i + u * W));
  for (; i + W <= v; i += W) m[0] = maximum(m[0], source.whole(i));
  if (i < v) m[0] = maximum(m[0], source.part(i, v - i));
  return max_of(maximum(maximum(m[0], m[1]), maximum(m[2], m[3])));
}

// A row of logits that is fetched into the second-level cache while another one's exponentials are computed: the maximum
// of a row needs all of it, and would wait for memory with nothing else to do.
struct Ahead {
  const char* row;  // null: none
  int64_t size;     // bytes of an element
  void fetch(int64_t i, int64_t n) const {
    if (row == nullptr) return;
    for (int64_t byte = i * size; byte < (i + n) * size; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
};

struct Sums {
  float exp;      // sum of e = exp(x - m)
  float spread;   // sum of w (m - x)
  float product;  // sum of e (x - m)
};

// Partial sums of BLOCK elements go into double: what rounding adds up to does not grow with the vocabulary.
constexpr int64_t BLOCK = 256 * W;

// `kept`: where exp(x - m) is kept for the gradient, null: nowhere. It may be the row itself.
template <bool SPREAD, bool ENTROPY, class S>
Sums row_sums(const Source<S>& source, int64_t v, float m, const float* weight, float* kept, Ahead ahead) {
  double total = 0, spread = 0, product = 0;
  for (int64_t begin = 0; begin < v; begin += BLOCK) {
    const int64_t end = begin + BLOCK < v ? begin + BLOCK : v;
    vf e[4] = {}, s = {}, h = {};
    const auto one = [&](int u, int64_t i, int64_t n, vf x) {
      const vf d = x - m, exp_d = exp(d);
      e[u] += exp_d;
      if (kept != nullptr) n == W ? F32::store(kept + i, exp_d) : store_part<F32>(kept + i, n, exp_d);
      if constexpr (ENTROPY) h += exp_d * select(d < -104.0f, set(-104.0f), d);  // 0 * -inf
      if constexpr (SPREAD) {
        vf below = weight == nullptr ? -d : -d * (n == W ? F32::load(weight + i) : load_part<F32>(weight + i, n, 0));
        if (n < W) {  // lanes past the end are infinite here
          float lanes[W] = {};
          std::memcpy(lanes, &below, n * sizeof(float));
          below = F32::load(lanes);
        }
        s += below;
      }
    };
    int64_t i = begin;
    for (; i + 4 * W <= end; i += 4 * W) {
      ahead.fetch(i, 4 * W);
      for (int u = 0; u < 4; ++u) one(u, i + u * W, W, source.whole(i + u * W));
    }
    for (; i + W <= end; i += W) one(0, i, W, source.whole(i));
    if (i < end) one(0, i, end - i, source.part(i, end - i));
    total += sum_of((e[0] + e[1]) + (e[2] + e[3]));
    if constexpr (SPREAD) spread += sum_of(s);
    if constexpr (ENTROPY) product += sum_of(h);
  }
  return {float(total), float(spread), float(product)};
}

// exp(x - m) of a row: kept from the sums, or computed now.
struct Kept {
  const float* e;
  vf whole(int64_t i, vf) const { return F32::load(e + i); }
  vf part(int64_t i, int64_t n, vf) const { return load_part<F32>(e + i, n, 0); }
};
struct Fresh {
  float m;
  vf whole(int64_t, vf x) const { return exp(x - m); }
  vf part(int64_t, int64_t, vf x) const { return exp(x - m); }
};

// A row's gradient with respect to the raw logits is, with p = exp(x - m) * inverse,
//   ((a + b) p - c w - dentropy p (x - lse + entropy)) * slope * logit_scale
// but b (p - 1) for b p in the target's column.
struct Factors {
  float m, inverse, lse;
  float a, b, c, dentropy, entropy;
};

template <class Out, class S, class Exp>
void row_gradient(
    const Source<S>& source, Exp exp_of, typename Out::type* out, int64_t v, int64_t target /* -1: not here */,
    float x_target, const Factors& f, const float* weight, const LossOptions& o) {
  const bool capped = o.softcap > 0;
  const float per_cap = capped ? 1 / o.softcap : 0;
  const auto finish = [&](vf dx, vf x) {
    if (capped) dx *= 1.0f - (x * per_cap) * (x * per_cap);
    return dx * o.logit_scale;
  };
  const auto below = [&](vf x) {  // log p + entropy; the clamp makes p log p 0 where log p is -inf
    const vf logp = x - f.lse;
    return select(logp < -1e30f, set(-1e30f), logp) + f.entropy;
  };
  vf at_target = {};
  if (target >= 0) {
    const vf x = set(x_target), p = exp(x - f.m) * f.inverse;
    vf a = set(f.a);
    if (f.dentropy != 0) a -= f.dentropy * below(x);
    vf dx = a * p + f.b * (p - 1.0f);
    if (f.c != 0) dx -= set(weight == nullptr ? f.c : f.c * weight[target]);
    at_target = finish(dx, x);
  }
  if (f.c == 0 && f.dentropy == 0 && !capped) {
    const float k = (f.a + f.b) * f.inverse * o.logit_scale;
    int64_t i = 0;
    for (; i + W <= v; i += W) Out::store(out + i, exp_of.whole(i, source.whole(i)) * k);
    if (i < v) store_part<Out>(out + i, v - i, exp_of.part(i, v - i, source.part(i, v - i)) * k);
  } else {
    each(source, v, [&](int64_t i, int64_t n, vf x) {
      const vf p = (n == W ? exp_of.whole(i, x) : exp_of.part(i, n, x)) * f.inverse;
      vf dx = p * (f.dentropy == 0 ? set(f.a + f.b) : (f.a - f.dentropy * below(x)) + f.b);
      if (f.c != 0) {
        const vf w = weight == nullptr ? set(1) : n == W ? F32::load(weight + i) : load_part<F32>(weight + i, n, 0);
        dx -= f.c * w;
      }
      dx = finish(dx, x);
      n == W ? Out::store(out + i, dx) : store_part<Out>(out + i, n, dx);
    });
  }
  if (target >= 0) store_part<Out>(out + target, 1, at_target);
}

// Room of this thread's own, kept from call to call.
struct CappedRow;
struct Exponentials;
template <class Use>
float* room(int64_t n) {
  thread_local std::vector<float> kept;
  if (int64_t(kept.size()) < n) kept.resize(n);
  return kept.data();
}

// Where exp(x - m) of a row waits for its gradient: in the gradient's place where that has room for fp32.
inline float* exponentials(float* out, int64_t) { return out; }
inline float* exponentials(uint16_t*, int64_t v) { return room<Exponentials>(v); }

// x of the contract, where it is not only scaled.
template <class S>
Source<F32> capped(const typename S::type* z, int64_t v, const LossOptions& o) {
  float* x = room<CappedRow>(v);
  const float inner = o.logit_scale / o.softcap;
  each(Source<S>{z, inner}, v, [&](int64_t i, int64_t n, vf y) {
    y = tanh(y) * o.softcap;
    n == W ? F32::store(x + i, y) : store_part<F32>(x + i, n, y);
  });
  return {x, 1.0f};
}

template <class S>
int64_t first_of(const Source<S>& source, int64_t v, float m) {
  for (int64_t i = 0; i < v; ++i) {
    const float x = source.at(i);
    if (x == m || x != x) return i;
  }
  return 0;
}

template <class S>
bool has_nan(const Source<S>& source, int64_t v) {
  for (int64_t i = 0; i < v; ++i)
    if (source.at(i) != source.at(i)) return true;
  return false;
}

template <class From, class S>
void row(const Rows& r, int64_t i, const Source<From>& source, Ahead ahead) {
  const LossOptions& o = r.options;
  const int64_t target = r.target[i];
  auto* out = r.out == nullptr ? nullptr : static_cast<typename S::type*>(r.out) + i * r.out_stride;
  float* e = out == nullptr ? nullptr : exponentials(out, r.v);
  const float m = row_max(source, r.v), x_target = source.at(target);
  // Before the logits may be overwritten:
  const bool nan = std::isinf(m) && has_nan(source, r.v);
  if (r.predicted != nullptr) r.predicted[i] = first_of(source, r.v, m);
  const bool spread = o.label_smoothing > 0 && r.loss != nullptr, entropy = r.entropy != nullptr;
  const Sums s = spread ? (entropy ? row_sums<true, true>(source, r.v, m, r.weight, e, ahead)
                                   : row_sums<true, false>(source, r.v, m, r.weight, e, ahead))
                        : (entropy ? row_sums<false, true>(source, r.v, m, r.weight, e, ahead)
                                   : row_sums<false, false>(source, r.v, m, r.weight, e, ahead));
  const float log_sum = std::log(s.exp);
  // Of a row with an infinity the sum is NaN, and the logarithm of the sum the infinity.
  const float lse = std::isinf(m) ? (nan ? NAN : m) : m + log_sum;
  const float w = r.weight == nullptr ? 1 : r.weight[target];
  const float token_weight = r.token_weight == nullptr ? 1 : r.token_weight[i];
  // Not lse - x[target], which would cancel where |x| is large.
  const float nll = (m - x_target) + log_sum;
  if (r.loss != nullptr) {
    float loss = nll * (1 - o.label_smoothing) * w;
    if (spread) loss += (s.spread + r.weight_sum * log_sum) * (o.label_smoothing / r.v);
    if (o.z_loss != 0) loss += o.z_loss * lse * lse;
    r.loss[i] = loss * token_weight;
  }
  if (r.nll != nullptr) r.nll[i] = nll;
  if (r.lse != nullptr) r.lse[i] = lse;
  if (entropy) r.entropy[i] = log_sum - s.product / s.exp;
  if (out != nullptr) {
    const float drow = r.dloss[i * r.dloss_stride] * token_weight;
    Factors f = {m, 1 / s.exp, lse, 0, drow * (1 - o.label_smoothing) * w, 0, 0, 0};
    if (o.label_smoothing > 0) {
      f.c = drow * (o.label_smoothing / r.v);
      f.a = f.c * r.weight_sum;
    }
    if (o.z_loss != 0) f.a += drow * (2 * o.z_loss) * lse;
    row_gradient<S>(source, Kept{e}, out, r.v, target, x_target, f, r.weight, o);
  }
}

template <class S>
void rows(const Rows& r, int64_t begin, int64_t end) {
  using T = typename S::type;
  for (int64_t i = begin; i < end; ++i) {
    if (r.target[i] == r.options.ignore_index) {  // whatever is in it, NaN too
      for (float* result : {r.loss, r.nll, r.lse, r.entropy})
        if (result != nullptr) result[i] = 0;
      if (r.predicted != nullptr) r.predicted[i] = -1;
      if (r.out != nullptr) std::memset(static_cast<T*>(r.out) + i * r.out_stride, 0, r.v * sizeof(T));
      continue;
    }
    const T* z = static_cast<const T*>(r.logits) + i * r.logits_stride;
    const bool has_next = i + 1 < end && r.v * int64_t(sizeof(T)) <= FETCHED_ROW;
    const Ahead ahead = {has_next ? reinterpret_cast<const char*>(z + r.logits_stride) : nullptr, sizeof(T)};
    if (r.options.softcap > 0)
      row<F32, S>(r, i, capped<S>(z, r.v, r.options), ahead);
    else
      row<S, S>(r, i, Source<S>{z, r.options.logit_scale}, ahead);
  }
}

template <class S>
void columns(const Columns& c, int64_t begin, int64_t end) {
  using T = typename S::type;
  for (int64_t i = begin; i < end; ++i) {
    T* z = static_cast<T*>(c.logits) + i * c.logits_stride;
    if (c.target[i] == c.options.ignore_index) {
      std::memset(z, 0, c.width * sizeof(T));
      continue;
    }
    const int64_t at = c.target[i] - c.first;
    const int64_t target = at >= 0 && at < c.width ? at : -1;
    const float entropy = c.entropy == nullptr ? 0 : c.entropy[i];
    const Factors f = {c.lse[i], 1, c.lse[i], c.a[i], c.b[i], c.c == nullptr ? 0 : c.c[i],
                       c.dentropy == nullptr ? 0 : c.dentropy[i], entropy};
    const auto gradient = [&](const auto& source) {
      const float x_target = target < 0 ? 0 : source.at(target);
      row_gradient<S>(source, Fresh{f.m}, z, c.width, target, x_target, f, c.weight, c.options);
    };
    if (c.options.softcap > 0)
      gradient(capped<S>(z, c.width, c.options));
    else
      gradient(Source<S>{z, c.options.logit_scale});
  }
}

void rows_of(const Rows& r, int64_t begin, int64_t end) {
  r.dtype == DType::f32 ? rows<F32>(r, begin, end) : r.dtype == DType::bf16 ? rows<BF16>(r, begin, end) : rows<F16>(r, begin, end);
}

void columns_of(const Columns& c, int64_t begin, int64_t end) {
  c.dtype == DType::f32 ? columns<F32>(c, begin, end) : c.dtype == DType::bf16 ? columns<BF16>(c, begin, end) : columns<F16>(c, begin, end);
}
