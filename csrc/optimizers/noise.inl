// Random bits of stochastic rounding; see kernels/optimizers/philox.py. Part of elementwise.inl.

constexpr uint16_t kMultipliers[3] = {1, 44205, 64805};  // by stream

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
void draw(uint64_t call, const Update& u, uint16_t* out) {
  Words c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    c0[i] = kOrder + (call + i * HOTLOOP_CALLS);
    c1[i] = c0[i] >> 32;
    c2[i] = Words{} + u.step;
    c3[i] = Words{};
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
void draw(uint64_t call, const Update& u, uint16_t* __restrict out) {
#pragma omp simd
  for (int i = 0; i < 8; ++i) {
    const uint64_t index = call + i;
    uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = u.step, c3 = 0;
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
  void draw_block(const Update& u, int64_t start, int n) {
    const uint64_t first = static_cast<uint64_t>(start) / 8;
    skipped = static_cast<int>(start % 8);
    int calls = 0;
    for (; calls < n / 8; calls += kCalls) draw<kDrawn>(first + calls, u, room + 8 * calls);
    if (8 * calls < skipped + n) draw<1>(first + calls, u, room + 8 * calls);
  }
  // The element's bits of a stream.
  void write_stream(int stream, int n, uint16_t* __restrict out) const {
    const uint16_t* __restrict bits = room + skipped;
    const uint16_t multiplier = kMultipliers[stream];
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = static_cast<uint16_t>(bits[i] * multiplier);
  }
  int skipped = 0;
  alignas(64) uint16_t room[kBlock + 64];
};
