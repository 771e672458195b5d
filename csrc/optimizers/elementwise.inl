// Compiled for each instruction set; see common/targets.h. Loops over up to 256 elements that stay in the first-level
// cache: what is stored in fp32 is updated where it lies, all else is widened, updated and rounded back.
//
// No use of AVX-512's bf16 conversion (vcvtneps2bf16): it takes denormals for zero, and the reference keeps them.

namespace {

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

inline float power_of_two(int32_t e) { return float_of(static_cast<uint32_t>(e + 127) << 23); }

void widen(const uint16_t* __restrict x, int n, float* __restrict out) {
#pragma omp simd
  for (int j = 0; j < n; ++j) out[j] = float_of(static_cast<uint32_t>(x[j]) << 16);
}

void round_nearest(const float* __restrict x, int n, uint16_t* __restrict out) {
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    const uint32_t bits = bits_of(x[j]);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    out[j] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
}

void round_stochastic(const float* __restrict x, const uint16_t* __restrict noise, int n, uint16_t* __restrict out) {
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    const uint32_t bits = bits_of(x[j]);
    const uint32_t finite = (bits & 0x7F800000) != 0x7F800000 ? 0xFFFFFFFF : 0;  // noise would make a NaN of inf
    out[j] = static_cast<uint16_t>((bits + (noise[j] & finite)) >> 16);
  }
}

// 16 random bits for each of kBlock elements from the logical index `start` on: Philox-4x32-10, one call for 8 elements.
struct Noise {
  static constexpr int kCalls = kBlock / 8 + 1;
  static constexpr int kPadded = 48;
  alignas(64) uint32_t words[4 * kPadded];
  const uint16_t* draw(int64_t start, uint64_t seed, uint32_t step, uint32_t stream) {
    const uint64_t first = static_cast<uint64_t>(start) / 8;
    const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma omp simd
    for (int call = 0; call < kPadded; ++call) {
      const uint64_t index = first + call;
      uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = step, c3 = stream;
      uint32_t k0 = key0, k1 = key1;
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
      }
      words[4 * call] = c0;
      words[4 * call + 1] = c1;
      words[4 * call + 2] = c2;
      words[4 * call + 3] = c3;
    }
    for (int i = 0; i < 4 * kCalls; ++i) {  // the low half is the earlier element's, whatever the machine's byte order
      halves[2 * i] = static_cast<uint16_t>(words[i]);
      halves[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
    }
    return halves + start % 8;
  }
  alignas(64) uint16_t halves[8 * kPadded];
};

// 8-bit moments: see kernels/optimizers/quantised.py for the map.

void dequantise(const uint8_t* __restrict codes, float scale, bool is_unsigned, int n, float* __restrict out) {
  const int32_t top = is_unsigned ? 7 : 6, mask = is_unsigned ? 255 : 127;
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    const int32_t c = codes[j], magnitude = c & mask;
    const int32_t log2 = static_cast<int32_t>(bits_of(static_cast<float>(magnitude)) >> 23) - 127;
    const float fraction = static_cast<float>(magnitude + 1) * power_of_two(-log2) * 0.875f - 0.75f;
    const float value = magnitude > 0 ? fraction * power_of_two(3 * (log2 - top)) : 0.0f;
    out[j] = (c > mask ? -value : value) * scale;
  }
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

template <bool kStochastic>
void quantise(const float* __restrict x, float reciprocal, bool is_unsigned, const uint16_t* __restrict noise, int n,
              uint8_t* __restrict codes) {
  const int32_t top = is_unsigned ? 7 : 6, largest = is_unsigned ? 255 : 127, sign_bit = is_unsigned ? 0 : 128;
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    const uint32_t bits = bits_of(x[j]);
    const float u = float_of(bits & 0x7FFFFFFF) * reciprocal;
    int32_t z = 126 - static_cast<int32_t>(bits_of(u) >> 23);
    z = z < 0 ? 0 : z > 23 ? 23 : z;
    z = (z * 43) >> 7;
    z = z > top ? top : z;
    const float v = u * power_of_two(3 * z);
    const float inner = (v + 0.75f) * 1.14285719f * power_of_two(top - z);
    float t = z == top ? v + 1.0f : inner;
    // t is in [1, 256]: adding and taking away 2^23 rounds to the nearest even integer, cutting rounds down.
    t = kStochastic ? t + static_cast<float>(noise[j]) * 0x1p-16f : (t + 0x1p23f) - 0x1p23f;
    int32_t code = static_cast<int32_t>(t) - 1;
    code = code > largest ? largest : code;
    code = is_unsigned && code == 0 && static_cast<int32_t>(bits) > 0 ? 1 : code;
    codes[j] = static_cast<uint8_t>(code + (bits >> 31 ? sign_bit : 0));
  }
}

// The rules. Each pointer is read and written in place.

void adamw(const Update& u, int n, float* __restrict p, const float* __restrict g0, float* __restrict m0,
           float* __restrict v0) {
  const float factor = u.factor, sign = u.maximize ? -1.0f : 1.0f;
  const float decay = u.scalars[0], step_size = u.scalars[1], bias2_sqrt = u.scalars[2];
  const float beta1 = u.constants[0], rest1 = u.constants[1], beta2 = u.constants[2], rest2 = u.constants[3];
  const float eps = u.constants[4];
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    const float g = g0[j] * factor * sign;
    const float m = m0[j] * beta1 + g * rest1;
    const float v = v0[j] * beta2 + g * rest2 * g;
    p[j] = p[j] * decay - step_size * m / (__builtin_sqrtf(v) / bias2_sqrt + eps);
    m0[j] = m;
    v0[j] = v;
  }
}

void lion(const Update& u, int n, float* __restrict p, const float* __restrict g0, float* __restrict m0) {
  const float factor = u.factor, sign = u.maximize ? -1.0f : 1.0f, decay = u.scalars[0], lr = u.scalars[1];
  const float beta1 = u.constants[0], rest1 = u.constants[1], beta2 = u.constants[2], rest2 = u.constants[3];
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    const float g = g0[j] * factor * sign;
    const float direction = m0[j] * beta1 + g * rest1;
    p[j] = p[j] * decay - (direction > 0 ? lr : direction < 0 ? -lr : 0.0f);
    m0[j] = m0[j] * beta2 + g * rest2;
  }
}

template <bool kMomentum, bool kNesterov>
void sgd(const Update& u, int n, float* __restrict p, const float* __restrict g0, float* __restrict b0) {
  const float factor = u.factor, sign = u.maximize ? -1.0f : 1.0f, lr = u.scalars[0];
  const float momentum = u.constants[0], weight_decay = u.constants[1];
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    float direction = g0[j] * factor * sign + p[j] * weight_decay;
    if (kMomentum) {
      const float b = b0[j] * momentum + direction;
      direction = kNesterov ? direction + b * momentum : b;
      b0[j] = b;
    }
    p[j] = p[j] - lr * direction;
  }
}

void apply(const Update& u, int n, float* p, const float* g, float* m0, float* m1) {
  if (u.rule == Rule::adamw) return adamw(u, n, p, g, m0, m1);
  if (u.rule == Rule::lion) return lion(u, n, p, g, m0);
  if (u.n_moments == 0) return sgd<false, false>(u, n, p, g, m0);
  return u.nesterov ? sgd<true, true>(u, n, p, g, m0) : sgd<true, false>(u, n, p, g, m0);
}

// Elements [i, i + n) of x as fp32: where they lie, or widened into `room`.
float* read(Type type, int64_t x, int64_t i, int n, float* room) {
  if (type == Type::fp32) return reinterpret_cast<float*>(x) + i;
  widen(reinterpret_cast<const uint16_t*>(x) + i, n, room);
  return room;
}

void update_block(const Update& u, const Tensor& t, int64_t i, int n, int64_t block) {
  alignas(64) float p_room[kBlock], g_room[kBlock], m_room[2][kBlock];
  Noise noise;
  const auto draw = [&](int stream) { return noise.draw(t.start + i, u.seed, u.step, stream); };
  float* p = t.master ? reinterpret_cast<float*>(t.master) + i : read(u.param, t.param, i, n, p_room);
  const float* g = read(u.grad, t.grad, i, n, g_room);
  float* m[2] = {nullptr, nullptr};
  for (int k = 0; k < u.n_moments; ++k) {
    if (u.moment == Type::uint8) {
      m[k] = m_room[k];
      dequantise(reinterpret_cast<const uint8_t*>(t.moments[k]) + i, reinterpret_cast<float*>(t.scales[k])[block],
                 k == 1, n, m[k]);
    } else {
      m[k] = read(u.moment, t.moments[k], i, n, m_room[k]);
    }
  }
  apply(u, n, p, g, m[0], m[1]);
  if (u.param == Type::bf16) {
    uint16_t* param = reinterpret_cast<uint16_t*>(t.param) + i;
    if (u.stochastic && !t.master) round_stochastic(p, draw(0), n, param);
    else round_nearest(p, n, param);
  }
  for (int k = 0; k < u.n_moments; ++k) {
    if (u.moment == Type::bf16) {
      uint16_t* moment = reinterpret_cast<uint16_t*>(t.moments[k]) + i;
      if (u.stochastic) round_stochastic(m[k], draw(k + 1), n, moment);
      else round_nearest(m[k], n, moment);
    } else if (u.moment == Type::uint8) {
      uint8_t* codes = reinterpret_cast<uint8_t*>(t.moments[k]) + i;
      const float scale = block_scale(m[k], n), reciprocal = 1.0f / scale;
      reinterpret_cast<float*>(t.scales[k])[block] = scale;
      if (u.stochastic) quantise<true>(m[k], reciprocal, k == 1, draw(k + 1), n, codes);
      else quantise<false>(m[k], reciprocal, k == 1, nullptr, n, codes);
    }
  }
}

void update_blocks(const Update& u, const Tensor& t, int64_t first, int64_t last) {
  const int64_t blocks = (t.row + kBlock - 1) / kBlock;
  int64_t row = first / blocks, column = first % blocks;
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = column * kBlock;
    update_block(u, t, row * t.row + begin, static_cast<int>(smaller(kBlock, t.row - begin)), block);
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
      const float* __restrict x = read(type, grad, begin + i, n, room);
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
