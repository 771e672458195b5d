// Attention on the CPU, dense and over packed segments. The formula and its letters: kernels/attention/reference.py.
#pragma once

#include <cstdint>

namespace hotloop::attention {

enum class DType : int64_t { f32, bf16, f16 };

// Element (b, position, head, d) is at address + sizeof(element) * (b * batch + position * row + head * head + d).
struct Strided {
  int64_t address, batch, row, head;  // batch is 0 where segments are packed
};

// What a call is about, in numbers of 64 bits, in the order in which kernels/attention/cpu.py gives them.
struct Problem {
  DType dtype;
  int64_t segments, Hq, Hk, D;  // segments: B of a dense batch
  int64_t Tq, Tk;               // positions of each row of a dense batch, of all of a packed one
  int64_t cu_q, cu_k;           // addresses of (segments + 1,) int32; 0: dense
  Strided q, k, v;
  int64_t alibi_slopes, alibi_batch;  // address of (segments or 1, Hq) float, 0: none; elements from row to row
  int64_t sinks;                      // address of (Hq,) float, 0: none
  int64_t left, right;                // the window, up to UNBOUNDED
  int64_t seed, threshold;            // of dropout: what has a smaller random word than this is dropped
  int64_t o, lse;                     // addresses; contiguous, lse in float; read in the backward pass
};

// What the backward pass has more. Results are contiguous, 0 where they are not needed.
struct Gradients {
  Strided upstream;  // of o
  int64_t dlse;      // address of floats like lse, 0: none
  int64_t dq, dk, dv;
  int64_t dalibi_slopes, dsinks;  // (segments, Hq) float
};

struct Numbers {
  float scale, softcap /* 0: none */, keep_scale /* 1 / (1 - dropout_p) */;
};

constexpr int64_t UNBOUNDED = int64_t{1} << 30;

// Bytes that the passes want as `workspace`, aligned to 64.
int64_t forward_workspace(const Problem&, int threads);
int64_t backward_workspace(const Problem&, int threads);
void forward(const Problem&, const Numbers&, void* workspace, int threads);
void backward(const Problem&, const Gradients&, const Numbers&, void* workspace, int threads);

}  // namespace hotloop::attention
