// All that is compiled for each instruction set; see attention_cpu.cpp.
#include "common/simd.h"

inline int64_t vectors(int64_t D) { return round_up(D, W) / W; }

#include "attention/tiles.inl"
#include "attention/scores.inl"
#include "attention/forward.inl"
#include "attention/backward.inl"

template <class Dot, class S>
Kernels kernels_of() {
  return {
      pack_keys<Dot, S>,
      forward_task<Dot, S>,
      [](const Call& c, const Task& task, float* room, float* dalibi) {
        BackwardTask<Dot>(c, task, room).template run<S>(dalibi);
      },
      sum_task<S>,
      [](const Call& c) { return ForwardScratch(nullptr, c).size; },
      [](const Call& c) { return BackwardScratch(nullptr, c).size; },
  };
}

Kernels kernels([[maybe_unused]] DType dtype) {
#ifdef HOTLOOP_BF16
  return kernels_of<Bf16, BF16>();
#else
  if (dtype == DType::bf16) return kernels_of<Fp32, BF16>();
  if (dtype == DType::f16) return kernels_of<Fp32, F16>();
  return kernels_of<Fp32, F32>();
#endif
}
