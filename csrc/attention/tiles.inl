// Small matrix products in registers, and the layouts that they read.
//
// A *unit* is what a multiply-add contracts at once, in 32 bits: one float (Fp32), or two bf16 (Bf16). In
//   C (rows, lanes) += A (rows, units) B (units, lanes)
// A is read unit by unit, wherever its rows and units are; B and C by vectors of W lanes: B lies in *panels*,
// (lanes / W, units, W).

constexpr int ROWS = W == 16 ? 8 : 4;    // of C in registers, and of its vectors at most:
constexpr int VECTORS = 2;
constexpr int64_t LANES = VECTORS * W;

inline vf broadcast(const float* unit) { return bits<vf>(vu{} + bits<uint32_t>(*unit)); }

struct Fp32 {
  static constexpr int64_t STEP = 1;  // elements in a unit
  static vf multiply_add(vf c, vf a, vf b) { return a * b + c; }
  template <class S>
  static vf units(const typename S::type* x, int64_t n) {  // n <= W, zeros behind
    return n == W ? S::load(x) : load_part<S>(x, n, 0);
  }
  template <class S>
  static vf paired(const typename S::type* x, const typename S::type*, int64_t n) {
    return units<S>(x, n);
  }
};

#ifdef HOTLOOP_BF16
// Lane i: (low[i], high[i]), rounded to nearest; denormals become zeros, as in the product itself.
inline vf pairs(vf low, vf high) {
  constexpr vi ORDER = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                        0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
  return (vf)_mm512_permutexvar_epi16((__m512i)ORDER, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

struct Bf16 {
  static constexpr int64_t STEP = 2;
  static vf multiply_add(vf c, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
  template <class S>
  static vf units(const uint16_t* x, int64_t n) {
    vf y = {};
    n == W ? std::memcpy(&y, x, sizeof y) : std::memcpy(&y, x, 4 * n);
    return y;
  }
  template <class S>
  static vf paired(const uint16_t* x, const uint16_t* next, int64_t n) {  // n units (x[i], next[i])
    vh low = {}, high = {};
    if (x != nullptr) n == W ? std::memcpy(&low, x, sizeof low) : std::memcpy(&low, x, 2 * n);
    if (next != nullptr) n == W ? std::memcpy(&high, next, sizeof high) : std::memcpy(&high, next, 2 * n);
    return bits<vf>(__builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16);
  }
};
#endif

template <class Dot, int V>
[[gnu::always_inline]] inline void multiply(vf (&c)[ROWS][V], const float* a, int64_t a_row, int64_t a_unit,
                                            const float* b, int64_t b_panel, int64_t units) {
  for (int64_t p = 0; p < units; ++p) {
    vf x[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) x[v] = F32::load(b + v * b_panel + p * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const vf y = broadcast(a + r * a_row + p * a_unit);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) c[r][v] = Dot::multiply_add(c[r][v], y, x[v]);
    }
  }
}

struct A {
  const float* units;
  int64_t row, unit;  // floats from one to the next
};
struct B {
  const float* units;
  int64_t panel;
};

struct C {
  float* at;
  int64_t row;
  const float* factor;  // of its rows; null: 1
  bool fresh;           // there is nothing in it yet
};

// C = factor * C + A B. The product is summed by itself and then added: one rounding to the size of C, not one for each
// unit.
template <class Dot, int V>
void accumulate(C c, int64_t rows, A a, B b, int64_t units) {
  for (int64_t i = 0; i < rows; i += ROWS) {
    vf sum[ROWS][V] = {};
    multiply<Dot, V>(sum, a.units + i * a.row, a.row, a.unit, b.units, b.panel, units);
    if (!c.fresh) {
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const float factor = c.factor == nullptr ? 1 : c.factor[i + r];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] += F32::load(c.at + (i + r) * c.row + v * W) * factor;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) F32::store(c.at + (i + r) * c.row + v * W, sum[r][v]);
  }
}

template <class Dot>
void accumulate(C c, int64_t rows, int64_t panels, A a, B b, int64_t units) {
  int64_t left = panels;
  for (; left >= VECTORS; left -= VECTORS, c.at += LANES, b.units += VECTORS * b.panel)
    accumulate<Dot, VECTORS>(c, rows, a, b, units);
  for (; left > 0; --left, c.at += W, b.units += b.panel) accumulate<Dot, 1>(c, rows, a, b, units);
}

// --- layouts; row(i) is the address of row i of D elements, or null for a row of zeros ---

// (rows, D / STEP): A of products that contract D
template <class Dot, class S, class Row>
void pack_rows(float* out, int64_t rows, int64_t D, Row row) {
  const int64_t U = D / Dot::STEP;
  for (int64_t i = 0; i < rows; ++i, out += U) {
    const auto* x = row(i);
    for (int64_t u = 0; u < U; u += W) {
      const int64_t n = smaller(W, U - u);
      const vf y = x == nullptr ? vf{} : Dot::template units<S>(x + u * Dot::STEP, n);
      n == W ? F32::store(out + u, y) : store_part<F32>(out + u, n, y);
    }
  }
}

// panels (D / W, rows / STEP, W), `panel` floats apart: B of products that contract rows
template <class Dot, class S, class Row>
void pack_panels(float* out, int64_t panel, int64_t rows, int64_t D, Row row) {
  for (int64_t i = 0; i < rows; i += Dot::STEP, out += W) {
    const auto *x = row(i), *next = Dot::STEP == 1 ? nullptr : row(i + 1);
    for (int64_t d = 0; d < D; d += W) {
      vf y = {};
      if (x != nullptr || next != nullptr)
        y = Dot::template paired<S>(x == nullptr ? x : x + d, next == nullptr ? next : next + d, smaller(W, D - d));
      F32::store(out + d / W * panel, y);
    }
  }
}

#if defined(__clang__)
template <int... I>
inline vf interleave(vf a, vf b, int offset, std::integer_sequence<int, I...>) {
  return offset == 0 ? __builtin_shufflevector(a, b, (I / 2 + I % 2 * W)...)
                     : __builtin_shufflevector(a, b, (I / 2 + I % 2 * W + W / 2)...);
}
#else
template <int... I>
inline vf interleave(vf a, vf b, int offset, std::integer_sequence<int, I...>) {
  return offset == 0 ? __builtin_shuffle(a, b, vi{(I / 2 + I % 2 * W)...})
                     : __builtin_shuffle(a, b, vi{(I / 2 + I % 2 * W + W / 2)...});
}
#endif
inline vf interleave_low(vf a, vf b) { return interleave(a, b, 0, std::make_integer_sequence<int, W>()); }
inline vf interleave_high(vf a, vf b) { return interleave(a, b, 1, std::make_integer_sequence<int, W>()); }

// Each pass shuffles rows i and i + W / 2 perfectly; after log2(W) of them rows are columns.
inline void transpose(vf (&x)[W]) {
#pragma GCC unroll 4
  for (int pass = 1; pass < W; pass *= 2) {
    vf y[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + W / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
}

// panels (rows / W, D / STEP, W), without gaps: B of products that contract D, lanes are rows
template <class Dot, class S, class Row>
void pack_transposed(float* out, int64_t rows, int64_t D, Row row) {
  const int64_t U = D / Dot::STEP;
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t u = 0; u < U; u += W) {
      const int64_t n = smaller(W, U - u);
      vf x[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        const auto* from = row(i + r);
        x[r] = from == nullptr ? vf{} : Dot::template units<S>(from + u * Dot::STEP, n);
      }
      transpose(x);
      for (int64_t r = 0; r < n; ++r, out += W) F32::store(out, x[r]);
    }
}
