// From products of q and k to scores. A tile has a row for each key and a lane for each query, so that what is taken
// over keys, the maximum and the sum, is element-wise. It is computed in *columns* of up to LANES queries.

// What concerns the scores of one head of one segment.
struct Scores {
  float scale, softcap, alibi_slope;
  bool shaped;                  // by more than a positive factor
  int32_t left, right, offset;  // offset: nk - nq
  int64_t nk;
  bool dropped;
  float keep_scale;
  uint32_t threshold, key[2], head, batch;

  Scores(const Call& c, const Segment& s, int64_t h)
      : scale(c.numbers.scale), softcap(c.numbers.softcap), alibi_slope(0), left(int32_t(c.problem.left)),
        right(int32_t(c.problem.right)), offset(int32_t(s.nk - s.nq)), nk(s.nk), dropped(c.problem.threshold > 0),
        keep_scale(c.numbers.keep_scale), threshold(uint32_t(c.problem.threshold)),
        key{uint32_t(c.problem.seed), uint32_t(uint64_t(c.problem.seed) >> 32)}, head(uint32_t(h)),
        batch(uint32_t(s.ordinal)) {
    const Problem& p = c.problem;
    const auto* slopes = reinterpret_cast<const float*>(p.alibi_slopes);
    if (slopes != nullptr) alibi_slope = slopes[s.ordinal * p.alibi_batch + h];
    // A factor of 0 would make NaN of -inf, a negative one a minimum of the maximum.
    shaped = softcap > 0 || p.alibi_slopes || !(scale > 1e-30f);
  }
  float factor() const { return shaped ? 1 : scale; }  // of what is in a tile
};

constexpr double LOG2_E_EXACT = 0x1.71547652b82fep+0;
constexpr float LOG2_E = float(LOG2_E_EXACT);

// Powers of 2, because a factor of the scores takes in log2(e) at no cost: a third less arithmetic than exp. With a
// whole number n and shift = SHIFT - n, x + shift is x rounded to a whole number k, and k - n + 127 in its lowest bits.
constexpr float ROUND = 0x1.8p23f, SHIFT = ROUND + 127;

// 2^(k - n + r) for |r| <= 1/2; 0 where k - n is -127. The relative error is 2e-7, half of it the polynomial's, which
// is minimax.
inline vf exp2_of(vf r, vf shifted) {
  vf y = set(0x1.5bba14p-10f);
  y = y * r + 0x1.3cea88p-7f;
  y = y * r + 0x1.c6b752p-5f;
  y = y * r + 0x1.ebf9bcp-3f;
  y = y * r + 0x1.62e42ap-1f;
  y = y * r + 1.0f;
  return y * bits<vf>(bits<vi>(shifted) << 23);  // all but k - n + 127 is shifted out
}

// 2^(x - n) for x - n <= 126, and NaN for NaN
inline vf exp2(vf x, vf shift) {
  x = maximum(x, ROUND - shift);
  const vf shifted = x + shift;
  return exp2_of(x - (shifted - shift), shifted);
}
inline vf exp2(vf x) { return exp2(x, set(SHIFT)); }

inline vf magnitude_of(vf x) { return bits<vf>(bits<vi>(x) & 0x7fffffff); }

inline vi lane_numbers() {
  int32_t lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i;
  vi x;
  std::memcpy(&x, lanes, sizeof x);
  return x;
}

// One key, and a vector of queries of which the first is `query`.
struct Place {
  vi distance;  // j - (i + nk - nq): 0 on the diagonal
  Place(const Scores& s, int64_t query, int64_t key) : distance(int32_t(key - query) - s.offset - lane_numbers()) {}
  vi hidden(const Scores& s) const { return (distance > s.right) | (distance < -s.left); }
  vf magnitude() const { return __builtin_convertvector(distance < 0 ? -distance : distance, vf); }
};

// x as the formula has it from q k', before the mask.
inline vf shaped_score(vf x, const Scores& s, const Place& place) {
  x *= s.softcap > 0 ? s.scale / s.softcap : s.scale;
  if (s.softcap > 0) x = tanh(x) * s.softcap;
  return x - s.alibi_slope * place.magnitude();
}

// The keys `rows` of a tile whose first key is `key`, in place: -inf where hidden; scaled where `shaped`.
template <int V>
void shape(float* tile, const Scores& s, Range rows, int64_t query, int64_t key) {
  for (int64_t k = rows.begin; k < rows.end; ++k)
    for (int v = 0; v < V; ++v) {
      float* at = tile + k * LANES + v * W;
      const Place place(s, query + v * W, key + k);
      vf x = F32::load(at);
      if (s.shaped) x = shaped_score(x, s, place);
      F32::store(at, key + k < s.nk ? select(place.hidden(s), set(-INFINITY), x) : set(-INFINITY));
    }
}

// a * b of words in 64 bits, of the even lanes or of the odd ones
typedef uint64_t vd __attribute__((vector_size(4 * W)));
inline vd even_products(vu a, uint32_t b) {
#if HOTLOOP_SIMD_WIDTH == 16
  return (vd)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif HOTLOOP_SIMD_WIDTH == 8
  return (vd)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (bits<vd>(a) & 0xffffffffu) * uint64_t{b};
#endif
}

// x becomes the high words of x * b, `low` the low ones.
inline vu high_product(vu x, uint32_t b, vu& low) {
  const vd even = even_products(x, b), odd = even_products(bits<vu>(bits<vd>(x) >> 32), b);
  low = bits<vu>((even & 0xffffffffu) | (odd << 32));
  return bits<vu>((even >> 32) | (odd & 0xffffffff00000000u));
}

// What the probabilities of four keys, the first a multiple of 4, are multiplied by: see dropout_keep in reference.py.
inline void keep_factors(const Scores& s, int64_t query, int64_t key, vf (&factor)[4]) {
  vu c0 = vu{} + uint32_t(key / 4), c1 = bits<vu>(lane_numbers()) + uint32_t(query), c2 = vu{} + s.head,
     c3 = vu{} + s.batch;
  uint32_t k0 = s.key[0], k1 = s.key[1];
  for (int round = 0; round < 10; ++round) {
    vu low0, low1;
    const vu high0 = high_product(c0, 0xD2511F53, low0), high1 = high_product(c2, 0xCD9E8D57, low1);
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  const vu words[4] = {c0, c1, c2, c3};
  for (int r = 0; r < 4; ++r) factor[r] = select(words[r] >= s.threshold, set(s.keep_scale), vf{});
}
