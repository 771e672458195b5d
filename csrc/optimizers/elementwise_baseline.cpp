#include <cstdint>
#include <cstring>

#include "common/simd.h"
#include "optimizers/elementwise.h"

namespace hotloop::optimizers {

#include "optimizers/elementwise_kernels.inc"

const Kernels& baseline_kernels() {
  static const Kernels kernels{update_blocks, chunk_sum};
  return kernels;
}

}  // namespace hotloop::optimizers
