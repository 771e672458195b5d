// Compiles HOTLOOP_KERNELS, a file that includes common/simd.h, for each width of vectors: in the namespaces baseline,
// avx2 and avx512. The .cpp of an op includes this file after all headers.
#define HOTLOOP_SIMD_WIDTH 4
namespace baseline {
#include HOTLOOP_KERNELS
}
#undef HOTLOOP_SIMD_WIDTH

#if defined(__x86_64__)
#define HOTLOOP_SIMD_WIDTH 8
HOTLOOP_TARGET_BEGIN("avx2,fma")
HOTLOOP_CONTRACT
namespace avx2 {
#include HOTLOOP_KERNELS
}
HOTLOOP_TARGET_END
#undef HOTLOOP_SIMD_WIDTH

#define HOTLOOP_SIMD_WIDTH 16
HOTLOOP_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,fma")
HOTLOOP_CONTRACT
namespace avx512 {
#include HOTLOOP_KERNELS
}
HOTLOOP_TARGET_END
#undef HOTLOOP_SIMD_WIDTH
#endif
