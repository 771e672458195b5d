#include <cstdint>
#include <cstring>

#include "common/simd.h"
#include "optimizers/elementwise.h"

#if defined(__x86_64__)
HOTLOOP_TARGET("avx2,f16c", "")
namespace hotloop::optimizers {

#include "optimizers/elementwise_kernels.inc"

const Kernels& avx2_kernels() {
  static const Kernels kernels{update_blocks, chunk_sum};
  return kernels;
}

}  // namespace hotloop::optimizers
HOTLOOP_TARGET_END
#endif
