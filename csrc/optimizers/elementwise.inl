// Compiled for each instruction set; see common/targets.h. A block of up to 256 elements is updated in pieces of 64: few
// enough for a core to work on the next ones, and on their random bits, while it divides and takes roots. Loops have a
// constant length, and ragged blocks are copied to where they are filled up with zeros.
//
// No use of AVX-512's bf16 conversion (vcvtneps2bf16): it takes denormals for zero, and the reference keeps them.

namespace {

constexpr int kPiece = 64;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// a * b + c where the product is exact, so that contraction changes no bit.
inline float add_exact_product(float a, float b, float c) {
#if HOTLOOP_CALLS > 1
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline float widen(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

inline uint16_t round_nearest(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

inline uint16_t round_stochastic(float x, uint16_t noise) {
  const uint32_t bits = bits_of(x);
  const uint32_t finite = (bits & 0x7F800000) != 0x7F800000 ? 0xFFFFFFFF : 0;  // noise would make a NaN of inf
  return static_cast<uint16_t>((bits + (noise & finite)) >> 16);
}

// Philox-4x32-10, one call for 8 elements: the random bits of calls [call, call + 8), the earliest element's first.
#if HOTLOOP_CALLS > 1
// Counter words lie in the low halves of 64-bit lanes; products read nothing else, so what is above them may stay.
typedef uint64_t Words __attribute__((vector_size(8 * HOTLOOP_CALLS)));

#if HOTLOOP_CALLS == 8
inline Words product(Words a, Words b) { return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
inline Words low_lanes(Words a, Words b) { return (Words)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b); }
inline Words high_lanes(Words a, Words b) { return (Words)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b); }
constexpr Words kOrder = {0, 4, 1, 5, 2, 6, 3, 7};  // interleaving lanes then gives consecutive calls
#else
inline Words product(Words a, Words b) { return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
inline Words low_lanes(Words a, Words b) { return (Words)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b); }
inline Words high_lanes(Words a, Words b) { return (Words)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }
constexpr Words kOrder = {0, 2, 1, 3};
#endif

// kVectors at a time: the ten rounds of one are a chain of dependent operations.
template <int kVectors>
void draw(uint64_t call, const Update& u, uint32_t stream, uint16_t* out) {
  Words c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    c0[i] = kOrder + (call + i * HOTLOOP_CALLS);
    c1[i] = c0[i] >> 32;
    c2[i] = Words{} + u.step;
    c3[i] = Words{} + stream;
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kVectors; ++i) {
      const Words product0 = product(c0[i], Words{} + 0xD2511F53), product1 = product(c2[i], Words{} + 0xCD9E8D57);
      c0[i] = (product1 >> 32) ^ c1[i] ^ (Words{} + u.keys[round][0]);
      c1[i] = product1;
      c2[i] = (product0 >> 32) ^ c3[i] ^ (Words{} + u.keys[round][1]);
      c3[i] = product0;
    }
  }
  for (int i = 0; i < kVectors; ++i) {
    const Words first = (c0[i] & 0xFFFFFFFF) | c1[i] << 32, second = (c2[i] & 0xFFFFFFFF) | c3[i] << 32;
    const Words words[2] = {low_lanes(first, second), high_lanes(first, second)};
    std::memcpy(out + 8 * HOTLOOP_CALLS * i, words, sizeof words);
  }
}
constexpr int kDrawn = 4, kCalls = kDrawn * HOTLOOP_CALLS;
#else
constexpr int kCalls = 8, kDrawn = 1;
template <int>
void draw(uint64_t call, const Update& u, uint32_t stream, uint16_t* __restrict out) {
#pragma omp simd
  for (int i = 0; i < 8; ++i) {
    const uint64_t index = call + i;
    uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = u.step, c3 = stream;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ static_cast<uint32_t>(u.keys[round][0]);
      c1 = static_cast<uint32_t>(product1);
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ static_cast<uint32_t>(u.keys[round][1]);
      c3 = static_cast<uint32_t>(product0);
    }
    const uint32_t words[4] = {c0, c1, c2, c3};
    for (int k = 0; k < 8; ++k) out[8 * i + k] = static_cast<uint16_t>(words[k / 2] >> 16 * (k % 2));
  }
}
#endif

// 16 random bits for each of the n elements of a block, the first of which has the logical index `start`.
struct Noise {
  const uint16_t* draw_block(const Update& u, uint32_t stream, int64_t start, int n) {
    const uint64_t first = static_cast<uint64_t>(start) / 8;
    const int skipped = static_cast<int>(start % 8);
    int calls = 0;
    for (; calls < n / 8; calls += kCalls) draw<kDrawn>(first + calls, u, stream, room + 8 * calls);
    if (8 * calls < skipped + n) draw<1>(first + calls, u, stream, room + 8 * calls);
    return room + skipped;
  }
  alignas(64) uint16_t room[kBlock + 64];
};

// 8-bit moments: see kernels/optimizers/quantised.py for the map.

// With P = 2^L and the power of two k = 8^-(top + 1), the value of a code c is (7 k (c + 1) - 6 k P) P^2, which is exact:
// an integer below 2^11 and powers of two. Zero's P is zero.
template <bool kUnsigned>
inline float dequantise(uint8_t code, float scale) {
  constexpr float k = kUnsigned ? 0x1p-24f : 0x1p-21f;
  const float c = static_cast<float>(kUnsigned ? code : code & 127);
  const float power = float_of(bits_of(c) & 0x7F800000);
  const float magnitude = add_exact_product(power, -6.0f * k, add_exact_product(c, 7.0f * k, 7.0f * k)) * (power * power);
  return float_of(bits_of(magnitude) ^ (kUnsigned ? 0 : static_cast<uint32_t>(code & 128) << 24)) * scale;
}

float block_scale(const float* __restrict x, int n) {
  uint32_t largest = bits_of(0x1p-126f);  // bits of numbers without a sign are ordered as the numbers are
#pragma omp simd reduction(max : largest)
  for (int j = 0; j < n; ++j) {
    const uint32_t magnitude = bits_of(x[j]) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  return float_of(largest);
}

// The last piece, z = top, is v + 1: the same formula with other numbers. A product by a power of two is exact here.
template <bool kUnsigned, bool kStochastic>
inline uint8_t quantise(float x, float reciprocal, uint16_t noise) {
  constexpr int32_t top = kUnsigned ? 7 : 6;
  constexpr uint32_t largest = kUnsigned ? 255 : 127;
  const int32_t bits = static_cast<int32_t>(bits_of(x));
  const float u = float_of(bits & 0x7FFFFFFF) * reciprocal;
  int32_t z = 126 - static_cast<int32_t>(bits_of(u) >> 23);
  z = z < 0 ? 0 : z > 3 * top ? 3 * top : z;
  z = (z * 43) >> 7;
  const float v = u * float_of((z * 3 + 127) << 23);
  const float offset = z == top ? 1.0f : 0.75f;
  const float factor = z == top ? 1.0f : float_of(bits_of(1.14285719f) + ((top - z) << 23));
  const float t = (v + offset) * factor;
  // t is in [1, 256]: adding 2^23 rounds to the nearest even integer, cutting rounds down.
  const uint32_t counted = kStochastic ? static_cast<uint32_t>(static_cast<int32_t>(add_exact_product(noise, 0x1p-16f, t)))
                                       : bits_of(t + 0x1p23f) - bits_of(0x1p23f);
  uint32_t code = counted - 1;
  code = code > largest ? largest : code;  // of NaN, too
  if (kUnsigned) {
    const int32_t least = bits < 1 ? bits : 1;
    return static_cast<uint8_t>(static_cast<int32_t>(code) > least ? code : least);
  }
  return static_cast<uint8_t>(code | ((bits >> 24) & 128));
}

#if HOTLOOP_CALLS == 8
// `quantise` with the numbers that depend on z looked up by the last 5 bits of u's exponent: 31 stands for 127 (u = 1).
template <bool kUnsigned>
struct Pieces {
  constexpr Pieces() : power(), offset(), factor() {
    constexpr int top = kUnsigned ? 7 : 6;
    for (int i = 0; i < 32; ++i) {
      const int z = i == 31 ? 0 : (30 - i) / 3 < top ? (30 - i) / 3 : top;
      power[i] = static_cast<float>(1 << 3 * z);
      offset[i] = z == top ? 1.0f : 0.75f;
      factor[i] = z == top ? 1.0f : 1.14285719f * static_cast<float>(1 << (top - z));
    }
  }
  alignas(64) float power[32], offset[32], factor[32];
};

inline __m512 look_up(const float* table, __m512i index) {
  return _mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
}

template <bool kUnsigned, bool kStochastic>
inline void quantise_piece(const float* x, float reciprocal, const uint16_t* noise, uint8_t* codes) {
  static constexpr Pieces<kUnsigned> pieces;
  __m512i all[4];
  for (int i = 0; i < 4; ++i) {
    const int j = 16 * i;
    const __m512i bits = _mm512_loadu_si512(x + j);
    const __m512 u = _mm512_mul_ps(_mm512_abs_ps(_mm512_castsi512_ps(bits)), _mm512_set1_ps(reciprocal));
    // Below 8^-top all numbers are treated alike: 127 - 96 is an exponent of one of them.
    const __m512i exponent = _mm512_max_epi32(_mm512_srli_epi32(_mm512_castps_si512(u), 23), _mm512_set1_epi32(96));
    const __m512 v = _mm512_mul_ps(u, look_up(pieces.power, exponent));
    __m512 t = _mm512_mul_ps(_mm512_add_ps(v, look_up(pieces.offset, exponent)), look_up(pieces.factor, exponent));
    __m512i code;
    if constexpr (kStochastic) {
      const __m512i drawn = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(noise + j)));
      t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(drawn), _mm512_set1_ps(0x1p-16f), t);  // the product is exact
      code = _mm512_sub_epi32(_mm512_cvttps_epi32(t), _mm512_set1_epi32(1));
    } else {
      const __m512i counted = _mm512_castps_si512(_mm512_add_ps(t, _mm512_set1_ps(0x1p23f)));
      code = _mm512_sub_epi32(counted, _mm512_set1_epi32(0x4B000001));
    }
    code = _mm512_min_epu32(code, _mm512_set1_epi32(kUnsigned ? 255 : 127));
    if constexpr (kUnsigned) code = _mm512_max_epi32(code, _mm512_min_epi32(bits, _mm512_set1_epi32(1)));
    else code = _mm512_or_si512(code, _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(128)));
    all[i] = code;
  }
  // Packing works within 128 bits.
  const __m512i packed = _mm512_packus_epi16(_mm512_packus_epi32(all[0], all[1]), _mm512_packus_epi32(all[2], all[3]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(order, packed));
}
#else
template <bool kUnsigned, bool kStochastic>
inline void quantise_piece(const float* __restrict x, float reciprocal, const uint16_t* __restrict noise,
                           uint8_t* __restrict codes) {
#pragma omp simd
  for (int j = 0; j < kPiece; ++j)
    codes[j] = quantise<kUnsigned, kStochastic>(x[j], reciprocal, kStochastic ? noise[j] : 0);
}
#endif

// The rules: p and the moments are read and written.

struct AdamW {
  static constexpr int kMoments = 2;
  explicit AdamW(const Update& u)
      : factor(u.maximize ? -u.factor : u.factor), decay(u.scalars[0]), step_size(u.scalars[1]),
        bias2_sqrt(u.scalars[2]), beta1(u.constants[0]), rest1(u.constants[1]), beta2(u.constants[2]),
        rest2(u.constants[3]), eps(u.constants[4]) {}
  void operator()(float& p, float g, float& m, float& v) const {
    g = g * factor;
    m = m * beta1 + g * rest1;
    v = v * beta2 + g * rest2 * g;
    p = p * decay - step_size * m / (__builtin_sqrtf(v) / bias2_sqrt + eps);
  }
  float factor, decay, step_size, bias2_sqrt, beta1, rest1, beta2, rest2, eps;
};

struct Lion {
  static constexpr int kMoments = 1;
  explicit Lion(const Update& u)
      : factor(u.maximize ? -u.factor : u.factor), decay(u.scalars[0]), lr(u.scalars[1]), beta1(u.constants[0]),
        rest1(u.constants[1]), beta2(u.constants[2]), rest2(u.constants[3]) {}
  void operator()(float& p, float g, float& m, float&) const {
    g = g * factor;
    const float direction = m * beta1 + g * rest1;
    p = p * decay - (direction > 0 ? lr : direction < 0 ? -lr : 0.0f);
    m = m * beta2 + g * rest2;
  }
  float factor, decay, lr, beta1, rest1, beta2, rest2;
};

template <bool kMomentum, bool kNesterov>
struct Sgd {
  static constexpr int kMoments = kMomentum ? 1 : 0;
  explicit Sgd(const Update& u)
      : factor(u.maximize ? -u.factor : u.factor), lr(u.scalars[0]), momentum(u.constants[0]),
        weight_decay(u.constants[1]) {}
  void operator()(float& p, float g, float& m, float&) const {
    float direction = g * factor + p * weight_decay;
    if (kMomentum) {
      m = m * momentum + direction;
      direction = kNesterov ? direction + m * momentum : m;
    }
    p = p - lr * direction;
  }
  float factor, lr, momentum, weight_decay;
};

// Addresses of one block's elements, and of its scales.
struct Block {
  void *param, *master, *grad, *moments[2];
  float* scales[2];
  int64_t start;
};

// Elements [i, i + n) of x as fp32: where they lie, or widened into `room`.
inline float* read(Type type, void* x, int64_t i, int n, float* __restrict room) {
  if (type == Type::fp32) return static_cast<float*>(x) + i;
  const uint16_t* __restrict bf16 = static_cast<uint16_t*>(x) + i;
#pragma omp simd
  for (int j = 0; j < n; ++j) room[j] = widen(bf16[j]);
  return room;
}

template <int kMoment, class Stored>
inline float load(Stored x, float scale) {
  if constexpr (sizeof x == 4) return x;
  else if constexpr (sizeof x == 2) return widen(x);
  else return dequantise<kMoment == 1>(x, scale);
}

// 8-bit moments are stored when the maximum of their block is known, until then they are in `room`.
template <bool kStochastic, class Stored>
inline void store(Stored& x, float value, const uint16_t* noise, float* room) {
  if constexpr (sizeof x == 4) x = value;
  else if constexpr (sizeof x == 2) x = kStochastic ? round_stochastic(value, *noise) : round_nearest(value);
  else *room = value;
}

template <class R, class Stored, bool kStochastic>
void update_block(const Update& u, const Block& b, int n) {
  constexpr bool kQuantised = sizeof(Stored) == 1;
  alignas(64) float p_room[kPiece], g_room[kPiece], m_room[2][kQuantised ? kBlock : kPiece];
  const R rule(u);
  const bool param_noise = u.stochastic && u.param == Type::bf16 && !b.master;
  Noise rooms[3];
  const float scale0 = kQuantised ? *b.scales[0] : 0.0f, scale1 = kQuantised && R::kMoments > 1 ? *b.scales[1] : 0.0f;
  const uint16_t* noise[3] = {};
  if (param_noise) noise[0] = rooms[0].draw_block(u, 0, b.start, n);
  for (int k = 1; kStochastic && k <= R::kMoments; ++k) noise[k] = rooms[k].draw_block(u, k, b.start, n);
  for (int i = 0; i < n; i += kPiece) {
    float* p = b.master ? static_cast<float*>(b.master) + i : read(u.param, b.param, i, kPiece, p_room);
    const float* g = read(u.grad, b.grad, i, kPiece, g_room);
    Stored *m0 = static_cast<Stored*>(b.moments[0]) + i, *m1 = static_cast<Stored*>(b.moments[1]) + i;
    float *room0 = m_room[0] + (kQuantised ? i : 0), *room1 = m_room[1] + (kQuantised ? i : 0);
#pragma omp simd
    for (int j = 0; j < kPiece; ++j) {
      float x = p[j], m = 0.0f, v = 0.0f;
      if constexpr (R::kMoments > 0) m = load<0>(m0[j], scale0);
      if constexpr (R::kMoments > 1) v = load<1>(m1[j], scale1);
      rule(x, g[j], m, v);
      p[j] = x;
      if constexpr (R::kMoments > 0) store<kStochastic>(m0[j], m, noise[1] + i + j, room0 + j);
      if constexpr (R::kMoments > 1) store<kStochastic>(m1[j], v, noise[2] + i + j, room1 + j);
    }
    if (u.param == Type::bf16) {
      uint16_t* param = static_cast<uint16_t*>(b.param) + i;
      if (param_noise) {
#pragma omp simd
        for (int j = 0; j < kPiece; ++j) param[j] = round_stochastic(p[j], noise[0][i + j]);
      } else {
#pragma omp simd
        for (int j = 0; j < kPiece; ++j) param[j] = round_nearest(p[j]);
      }
    }
  }
  if constexpr (kQuantised) {
    // Both scales first: a maximum and its reciprocal have a long latency.
    const float new0 = block_scale(m_room[0], n), new1 = R::kMoments > 1 ? block_scale(m_room[1], n) : 1.0f;
    const float reciprocal0 = 1.0f / new0, reciprocal1 = 1.0f / new1;
    *b.scales[0] = new0;
    if (R::kMoments > 1) *b.scales[1] = new1;
    for (int i = 0; i < n; i += kPiece) {
      Stored *m0 = static_cast<Stored*>(b.moments[0]) + i, *m1 = static_cast<Stored*>(b.moments[1]) + i;
      quantise_piece<false, kStochastic>(m_room[0] + i, reciprocal0, noise[1] + i, m0);
      if constexpr (R::kMoments > 1) quantise_piece<true, kStochastic>(m_room[1] + i, reciprocal1, noise[2] + i, m1);
    }
  }
}

using UpdateBlock = void (*)(const Update&, const Block&, int n);

template <class R>
UpdateBlock for_rule(const Update& u) {
  if constexpr (R::kMoments > 0) {
    if (u.moment == Type::bf16) return u.stochastic ? update_block<R, uint16_t, true> : update_block<R, uint16_t, false>;
    if (u.moment == Type::uint8) return u.stochastic ? update_block<R, uint8_t, true> : update_block<R, uint8_t, false>;
  }
  return update_block<R, float, false>;
}

UpdateBlock choose(const Update& u) {
  if (u.rule == Rule::adamw) return for_rule<AdamW>(u);
  if (u.rule == Rule::lion) return for_rule<Lion>(u);
  if (u.n_moments == 0) return for_rule<Sgd<false, false>>(u);
  return u.nesterov ? for_rule<Sgd<true, true>>(u) : for_rule<Sgd<true, false>>(u);
}

// A block whose length is no multiple of kPiece: in a copy that is filled up with zeros.
void update_ragged(UpdateBlock run, const Update& u, const Block& block, int n) {
  alignas(64) unsigned char rooms[5][4 * kBlock] = {};
  Block copy = block;
  const size_t size[] = {4, 2, 1};
  const auto bytes = [&](Type type) { return n * size[static_cast<int>(type)]; };
  const struct {
    void *original, **copied;
    size_t bytes;
  } all[] = {{block.param, &copy.param, bytes(u.param)},
             {block.master, &copy.master, bytes(Type::fp32)},
             {block.grad, &copy.grad, bytes(u.grad)},
             {block.moments[0], &copy.moments[0], bytes(u.moment)},
             {block.moments[1], &copy.moments[1], bytes(u.moment)}};
  for (int k = 0; k < 5; ++k) {
    if (!all[k].original) continue;
    *all[k].copied = rooms[k];
    std::memcpy(rooms[k], all[k].original, all[k].bytes);
  }
  run(u, copy, n);
  for (const auto& x : all)
    if (x.original && x.original != block.grad) std::memcpy(x.original, *x.copied, x.bytes);
}

void update_blocks(const Update& u, const Tensor& t, int64_t first, int64_t last) {
  const UpdateBlock run = choose(u);
  const int64_t size[] = {4, 2, 1};
  const int64_t blocks = (t.row + kBlock - 1) / kBlock;
  int64_t row = first / blocks, column = first % blocks;
  for (int64_t block = first; block < last; ++block) {
    const int64_t i = row * t.row + column * kBlock;
    const int n = static_cast<int>(smaller(kBlock, t.row - column * kBlock));
    const auto at = [i](int64_t x, int64_t bytes) { return x ? reinterpret_cast<void*>(x + i * bytes) : nullptr; };
    const int64_t moment = size[static_cast<int>(u.moment)];
    const Block b = {at(t.param, size[static_cast<int>(u.param)]), at(t.master, 4), at(t.grad, size[static_cast<int>(u.grad)]),
                     {at(t.moments[0], moment), at(t.moments[1], moment)},
                     {reinterpret_cast<float*>(t.scales[0]) + block, reinterpret_cast<float*>(t.scales[1]) + block},
                     t.start + i};
    if (n % kPiece == 0) run(u, b, n);
    else update_ragged(run, u, b, n);
    if (++column == blocks) {
      column = 0;
      ++row;
    }
  }
}

double halve(double* x, int n) {
  for (n /= 2; n > 0; n /= 2)
    for (int j = 0; j < n; ++j) x[j] += x[j + n];
  return x[0];
}

double chunk_sum(Type type, int64_t grad, int64_t begin, int64_t count) {
  double runs[kChunk / kRun] = {};
  alignas(64) float room[kLanes];
  for (int64_t done = 0; done < count; done += kRun) {
    alignas(64) double lanes[kLanes] = {};
    const int64_t end = smaller(count, done + kRun);
    for (int64_t i = done; i < end; i += kLanes) {
      const int n = static_cast<int>(smaller(kLanes, end - i));
      const float* __restrict x = read(type, reinterpret_cast<void*>(grad), begin + i, n, room);
      // A square of an fp32 number is exact in fp64: contraction could change no bit.
      if (n == kLanes) {
#pragma omp simd
        for (int j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(x[j]) * static_cast<double>(x[j]);
      } else {
        for (int j = 0; j < n; ++j) lanes[j] += static_cast<double>(x[j]) * static_cast<double>(x[j]);
      }
    }
    runs[done / kRun] = halve(lanes, kLanes);
  }
  return halve(runs, kChunk / kRun);
}

}  // namespace
