// The kernels of attention, by the names and shapes that kernels/attention/cuda.py launches.
#include "attention/forward.cuh"
#include "common/launch.h"

// SUFFIX is of the type T; KEYS in a block, STAGES buffers in the ring, CTAS on a multiprocessor at a time.
#define HOTLOOP_FORWARD(SUFFIX, T, D, KEYS, STAGES, CTAS)                                                              \
  extern "C" __global__ void __launch_bounds__(hotloop::attention::THREADS, CTAS)                                      \
      attention_forward_##SUFFIX##_d##D##_keys##KEYS##_stages##STAGES(                                                 \
          const T* q, const T* k, const T* v, const int* cu_seqlens_q, const int* cu_seqlens_k, T* o, float* lse,      \
          const hotloop::attention::Problem p) {                                                     \
    using namespace hotloop::attention;                                                                                \
    forward<Shape<T, D, KEYS, STAGES>>(q, k, v, cu_seqlens_q, cu_seqlens_k, o, lse, p);                                \
  }
#define HOTLOOP_SHAPES(DO, SUFFIX, T) \
  DO(SUFFIX, T, 64, 64, 3, 3) DO(SUFFIX, T, 128, 64, 3, 2) DO(SUFFIX, T, 128, 32, 2, 2)

HOTLOOP_SHAPES(HOTLOOP_FORWARD, bf16, __nv_bfloat16)
HOTLOOP_SHAPES(HOTLOOP_FORWARD, fp16, __half)

std::vector<hotloop::CudaKernel> hotloop::attention_kernels() {
#define HOTLOOP_NAMED(SUFFIX, T, D, KEYS, STAGES, CTAS)                                                                \
  {"attention_forward_" #SUFFIX "_d" #D "_keys" #KEYS "_stages" #STAGES,                                               \
   reinterpret_cast<const void*>(attention_forward_##SUFFIX##_d##D##_keys##KEYS##_stages##STAGES)},
  return {HOTLOOP_SHAPES(HOTLOOP_NAMED, bf16, __nv_bfloat16) HOTLOOP_SHAPES(HOTLOOP_NAMED, fp16, __half)};
}
