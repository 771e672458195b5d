// Vectors of floats by the compiler's own vector types: one source, compiled once for each instruction set.
//
// This file has no include guard on purpose: the kernels of an op include it, and common/each_target.inl compiles those
// once for each instruction set. See common/targets.h for the choice at run time.
//
// Products and sums are contracted to fma where the instruction set has it: kernels that promise the same bits
// everywhere do not use this file.

constexpr int W = HOTLOOP_SIMD_WIDTH;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

inline vf set(float x) { return x - vf{}; }  // vf{} is +0: x - 0 is x, for -0 too
inline vf select(vi mask, vf a, vf b) { return mask ? a : b; }
inline vf maximum(vf a, vf b) { return b > a ? b : a; }  // b where a < b: a NaN in b is passed over

// Storage: fp32 as it is; bf16 and fp16 are read exactly and written rounded to nearest, ties to even.

struct F32 {
  using type = float;
  static vf load(const type* p) {
    vf x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  static void store(type* p, vf x) { std::memcpy(p, &x, sizeof(x)); }
};

struct Half {
  using type = uint16_t;
  static vu load_bits(const type* p) {
    vh x;
    std::memcpy(&x, p, sizeof(x));
    return __builtin_convertvector(x, vu);
  }
  static void store_bits(type* p, vu x) {
    const vh y = __builtin_convertvector(x, vh);
    std::memcpy(p, &y, sizeof(y));
  }
};

struct BF16 : Half {
  static vf load(const type* p) { return bits<vf>(load_bits(p) << 16); }
  static void store(type* p, vf x) {
    const vu u = bits<vu>(x);
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const vu quiet = (u >> 16) | 0x40u;
    store_bits(p, bits<vu>(x != x ? bits<vi>(quiet) : bits<vi>(rounded)));
  }
};

struct F16 : Half {
  static vf load(const type* p) {
    const vu h = load_bits(p), magnitude = (h & 0x7fffu) << 13;
    // The exponent's bias is 112 less: times 2^112, which is exact for denormals too. Infinities and NaN are set apart.
    const vf finite = bits<vf>(magnitude) * set(0x1p112f);
    const vi special = bits<vi>(magnitude) >= (0x7c00 << 13);
    const vu wide = bits<vu>(special ? bits<vi>(magnitude | 0x7f800000u) : bits<vi>(finite));
    return bits<vf>(wide | ((h & 0x8000u) << 16));
  }
  static void store(type* p, vf x) {
    const vu u = bits<vu>(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    const vi m = bits<vi>(magnitude);
    const vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 1/2 leaves the denormal, rounded, in the lowest bits.
    const vu denormal = bits<vu>(bits<vf>(magnitude) + set(0.5f)) - 0x3f000000u;
    vi y = m < 0x38800000 ? bits<vi>(denormal) : bits<vi>(normal);
    y = m >= 0x47800000 ? vi{} + 0x7c00 : y;  // 65,536 and above; from 65,520 on `normal` carries into it
    y = m > 0x7f800000 ? vi{} + 0x7e00 : y;
    store_bits(p, bits<vu>(y) | sign);
  }
};

// The first n < W elements; `fill` in the others.
template <class S>
inline vf load_part(const typename S::type* p, int64_t n, float fill) {
  typename S::type room[W] = {};
  std::memcpy(room, p, n * sizeof(*p));
  vf x = S::load(room);
  float lanes[W];
  F32::store(lanes, x);
  for (int64_t i = n; i < W; ++i) lanes[i] = fill;
  return F32::load(lanes);
}

template <class S>
inline void store_part(typename S::type* p, int64_t n, vf x) {
  typename S::type room[W];
  S::store(room, x);
  std::memcpy(p, room, n * sizeof(*p));
}

inline float sum_of(vf x) {
  float lanes[W];
  F32::store(lanes, x);
  for (int width = W / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline float max_of(vf x) {
  float lanes[W], m;
  F32::store(lanes, x);
  m = lanes[0];
  for (int i = 1; i < W; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

// e^x for x <= 88; what is below 2^-126 is 0; NaN stays NaN.
#if HOTLOOP_SIMD_WIDTH == 16
// To 1 ulp: x = (16 k + j + r) ln 2 / 16 with |r| <= 1/2; 2^(j/16) from a register; 2^(r/16) - 1 by its series, whose next
// term is below 2^-26. Two thirds of the arithmetic of what follows.
inline vf exp(vf x) {
  // Bits of 2^(j/16), less j << 19, which 16 k + j shifted by 19 has too much for k in the exponent.
  const __m512i powers = _mm512_setr_epi32(0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
                                           0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);
  // -127 ln 2: k is -127 there, j and r are 0, and the result is 0. The second operand is the result where one is NaN.
  x = (vf)_mm512_max_ps(_mm512_set1_ps(-0x1.601e68p+6f), (__m512)x);
  constexpr float SHIFT = 0x1.8p23f, PER_UNIT = 0x1.715476p+4f, REST_PER_UNIT = 0x1.4ae0c0p-22f;  // 16 / ln 2
  const vf shifted = x * PER_UNIT + SHIFT, r = x * REST_PER_UNIT + (x * PER_UNIT - (shifted - SHIFT));
  const vi n = bits<vi>(shifted);
  const vf power = bits<vf>((vi)_mm512_permutexvar_epi32((__m512i)n, powers) + (n << 19));  // indices: the last 4 bits
  const vf rest = r * (0x1.62e43p-5f + r * (0x1.ebfbep-11f + r * 0x1.c6b08ep-17f));
  return power * rest + power;
}
#else
// To 1 ulp: x = k ln 2 + r with |r| <= ln 2 / 2; e^r = 1 + r + r^2 q(r), q of degree 4, minimax (relative error 3e-9).
inline vf exp(vf x) {
  x = select(x < -88.0f, set(-0x1.61814cp+6f), x);  // -127.5 ln 2, nearly: k is -127 there, and so 2^k is 0
  // k + 127 is in the lowest bits of `shifted`; shifting all others out leaves 2^k.
  constexpr float SHIFT = 0x1.8p23f + 127;
  const vf shifted = x * 0x1.715476p+0f + SHIFT, k = shifted - SHIFT;
  vf r = x - k * 0x1.62e4p-1f;  // 15 bits of ln 2: k times it is exact
  r = r - k * 0x1.7f7d1cp-20f;  // the rest
  vf q = set(0x1.6a2352p-10f);
  q = q * r + 0x1.123a6cp-7f;
  q = q * r + 0x1.5558f4p-5f;
  q = q * r + 0x1.555490p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const vf y = (r * r) * q + r + 1.0f;
  return y * bits<vf>(bits<vi>(shifted) << 23);
}
#endif

// tanh to 2 ulp. Below 5/8 an odd polynomial, minimax (relative error 2e-10); above 1 - 2 / (e^2|x| + 1).
inline vf tanh(vf x) {
  const vf z = x * x;
  vf q = set(0.00214754f);
  q = q * z - 0.00818268f;
  q = q * z + 0.02170297f;
  q = q * z - 0.05394720f;
  q = q * z + 0.13333210f;
  q = q * z - 0.33333331f;
  const vf small = q * z * x + x;
  const vf magnitude = bits<vf>(bits<vi>(x) & 0x7fffffff);
  const vf large = 1.0f - 2.0f / (exp(select(magnitude > 16.0f, set(32.0f), 2.0f * magnitude)) + 1.0f);
  const vf signed_large = bits<vf>(bits<vi>(large) | (bits<vi>(x) & int32_t(0x80000000)));
  return select(magnitude < 0.625f, small, signed_large);
}
