// The codes of 8-bit moments; see kernels/optimizers/quantised.py for the map. Part of elementwise.inl.

template <bool kUnsigned>
struct Map {
  static constexpr int kShift = kUnsigned ? 20 : 19;
  static constexpr float kZero = kUnsigned ? 0x1p-31f : 0x1p-7f, kScale = kUnsigned ? 0.53333336f : 0.51821864f;
  static constexpr uint32_t kZeroBits = (kUnsigned ? 96u : 120u) << 23, kLargest = kUnsigned ? 255 : 127;
};

template <bool kUnsigned>
inline float dequantise(uint8_t code, float scale) {
  using M = Map<kUnsigned>;
  const uint32_t c = code;
  const float value = float_of(((c & M::kLargest) << M::kShift) + M::kZeroBits) - M::kZero;
  return float_of(bits_of(value) ^ (kUnsigned ? 0 : (c & 128) << 24)) * scale;
}

template <bool kUnsigned>
inline float block_scale(const float* __restrict x, int n) {
  uint32_t largest = 0;  // bits of numbers without a sign are ordered as the numbers are
#pragma omp simd reduction(max : largest)
  for (int j = 0; j < n; ++j) {
    const uint32_t magnitude = bits_of(x[j]) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float scale = float_of(largest) * Map<kUnsigned>::kScale;
  return scale < 0x1p-126f ? 0x1p-126f : scale;
}

template <bool kUnsigned, bool kStochastic>
inline void quantise_piece(const float* __restrict x, float reciprocal, const uint16_t* __restrict noise,
                           uint8_t* __restrict codes) {
  using M = Map<kUnsigned>;
#pragma omp simd
  for (int j = 0; j < kPiece; ++j) {
    const int32_t bits = static_cast<int32_t>(bits_of(x[j]));
    const float w = float_of(bits & 0x7FFFFFFF) * reciprocal + M::kZero;
    const uint32_t added = kStochastic ? static_cast<uint32_t>(noise[j]) << (M::kShift - 16) : 1u << (M::kShift - 1);
    uint32_t code = (bits_of(w) - M::kZeroBits + added) >> M::kShift;
    code = code > M::kLargest ? M::kLargest : code;  // of NaN, too
    if (kUnsigned) {
      const uint32_t least = bits > 0 ? 1 : 0;
      code = code > least ? code : least;
    } else {
      code |= static_cast<uint32_t>(bits) >> 24 & 128;
    }
    codes[j] = static_cast<uint8_t>(code);
  }
}
