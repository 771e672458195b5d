// Launching a CUDA kernel by its name, with each argument as the bytes it is passed as.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hotloop {

struct CudaKernel {
  const char* name;
  const void* function;
};

// Throws std::runtime_error with CUDA's message, std::invalid_argument for an unknown name. Waits for nothing.
void cuda_launch(const std::string& name, int grid_x, int grid_y, int block, int shared,
                 const std::vector<std::string>& arguments, std::uintptr_t stream);

// Those of each op.
std::vector<CudaKernel> attention_kernels();
std::vector<CudaKernel> cross_entropy_kernels();
std::vector<CudaKernel> optimizer_kernels();

}  // namespace hotloop
