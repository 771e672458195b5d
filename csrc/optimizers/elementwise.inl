// Compiled for each instruction set; see common/targets.h. A block of up to 256 elements is updated in pieces of 64, in
// one pass: moments are widened, updated and rounded in registers, while the divider is busy with others. Loops have a
// constant length; ragged blocks are copied to where they are filled up with zeros.
//
// ns per element (Zen 4, AVX-512, data in the second-level cache): AdamW 0.38 in fp32, of which the divider takes 0.27 for a
// root and a division; 0.44 with bf16 moments (0.73 stochastic), 0.70 with 8-bit ones (0.98). Random bits are 0.17.
// Quantising a block while the next one occupies the divider is no faster (0.74), nor is a maximum kept in the loop.
//
// No use of AVX-512's bf16 conversion (vcvtneps2bf16): it takes denormals for zero, and the reference keeps them.

namespace {

constexpr int kPiece = 64;

constexpr int64_t size_of(Type type) { return type == Type::fp32 ? 4 : type == Type::bf16 ? 2 : 1; }

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

#include "optimizers/noise.inl"
#include "optimizers/codes.inl"

// The rules: p and the moments are read and written.

struct AdamW {
  static constexpr int kMoments = 2;
  explicit AdamW(const Update& u)
      : factor(u.maximize ? -u.factor : u.factor), decay(u.scalars[0]), step_size(u.scalars[1]), eps(u.scalars[2]),
        beta1(u.constants[0]), rest1(u.constants[1]), beta2(u.constants[2]), rest2(u.constants[3]) {}
  void operator()(float& p, float g, float& m, float& v) const {
    g = g * factor;
    m = m * beta1 + g * rest1;
    v = v * beta2 + g * rest2 * g;
    p = p * decay - step_size * m / (__builtin_sqrtf(v) + eps);
  }
  float factor, decay, step_size, eps, beta1, rest1, beta2, rest2;
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
  alignas(64) uint16_t noise[3][kBlock];  // by stream
  const R rule(u);
  const bool param_noise = u.stochastic && u.param == Type::bf16 && !b.master;
  const float scale0 = kQuantised ? *b.scales[0] : 0.0f, scale1 = kQuantised && R::kMoments > 1 ? *b.scales[1] : 0.0f;
  if (param_noise || (kStochastic && R::kMoments > 0)) {
    Noise bits;
    bits.draw_block(u, b.start, n);
    if (param_noise) bits.write_stream(0, n, noise[0]);
    for (int k = 1; kStochastic && k <= R::kMoments; ++k) bits.write_stream(k, n, noise[k]);
  }
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
    const float new0 = block_scale<false>(m_room[0], n), new1 = R::kMoments > 1 ? block_scale<true>(m_room[1], n) : 1.0f;
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
    const bool drawn = u.stochastic;
    if (u.moment == Type::bf16) return drawn ? update_block<R, uint16_t, true> : update_block<R, uint16_t, false>;
    if (u.moment == Type::uint8) return drawn ? update_block<R, uint8_t, true> : update_block<R, uint8_t, false>;
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
  const auto bytes = [n](Type type) { return static_cast<size_t>(n * size_of(type)); };
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
  const int64_t blocks = (t.row + kBlock - 1) / kBlock;
  int64_t row = first / blocks, column = first % blocks;
  for (int64_t block = first; block < last; ++block) {
    const int64_t i = row * t.row + column * kBlock;
    const int n = static_cast<int>(smaller(kBlock, t.row - column * kBlock));
    const auto at = [i](int64_t x, Type type) { return x ? reinterpret_cast<void*>(x + i * size_of(type)) : nullptr; };
    const auto scale = [block](int64_t x) { return x ? reinterpret_cast<float*>(x) + block : nullptr; };
    const Block b = {at(t.param, u.param),
                     at(t.master, Type::fp32),
                     at(t.grad, u.grad),
                     {at(t.moments[0], u.moment), at(t.moments[1], u.moment)},
                     {scale(t.scales[0]), scale(t.scales[1])},
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
