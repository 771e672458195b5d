// The codes of 8-bit moments; see kernels/optimizers/quantised.py for the map. Part of elementwise.inl.
//
// A piece z of the map is (v + offset) * factor with v = u * 8^z, the last one (z = top) with other numbers than the
// others. Products by powers of two are exact here, so that they may be done in any order. t is in [1, 256]: adding
// 2^23 rounds it to the nearest even integer, cutting rounds down.

// With P = 2^L and the power of two k = 8^-(top + 1), the value of a code c is (7 k (c + 1) - 6 k P) P^2, exact: an
// integer below 2^11 and powers of two. Zero's P is zero.
template <bool kUnsigned>
inline float dequantise(uint8_t code, float scale) {
  constexpr float k = kUnsigned ? 0x1p-24f : 0x1p-21f;
  const float c = static_cast<float>(kUnsigned ? code : code & 127);
  const float power = float_of(bits_of(c) & 0x7F800000);
  const float fraction = add_exact_product(power, -6.0f * k, add_exact_product(c, 7.0f * k, 7.0f * k));
  const uint32_t sign = kUnsigned ? 0 : static_cast<uint32_t>(code & 128) << 24;
  return float_of(bits_of(fraction * (power * power)) ^ sign) * scale;
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

#if HOTLOOP_CALLS == 8
// What depends on z, by the last 5 bits of u's exponent: 31 stands for 127 (u = 1), smaller ones down to 0 for 96.
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
    // Numbers below 8^-top are treated alike, so that no exponent need be less than 96.
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
  const uint32_t counted =
      kStochastic ? static_cast<uint32_t>(static_cast<int32_t>(add_exact_product(noise, 0x1p-16f, t)))
                  : bits_of(t + 0x1p23f) - bits_of(0x1p23f);
  uint32_t code = counted - 1;
  code = code > largest ? largest : code;  // of NaN, too
  if (kUnsigned) {
    const int32_t least = bits < 1 ? bits : 1;
    return static_cast<uint8_t>(static_cast<int32_t>(code) > least ? code : least);
  }
  return static_cast<uint8_t>(code | ((bits >> 24) & 128));
}

template <bool kUnsigned, bool kStochastic>
inline void quantise_piece(const float* __restrict x, float reciprocal, const uint16_t* __restrict noise,
                           uint8_t* __restrict codes) {
#pragma omp simd
  for (int j = 0; j < kPiece; ++j)
    codes[j] = quantise<kUnsigned, kStochastic>(x[j], reciprocal, kStochastic ? noise[j] : 0);
}
#endif
