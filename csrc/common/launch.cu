#include "common/launch.h"

#include <stdexcept>
#include <unordered_map>

namespace hotloop {
namespace {

// Of dynamic shared memory: what a kernel declares of its own counts towards the limit, which is 48 KiB.
constexpr int SHARED_WITHOUT_ASKING = 32 << 10;

void check(cudaError_t error, const std::string& name) {
  if (error != cudaSuccess) throw std::runtime_error(name + ": CUDA: " + cudaGetErrorString(error));
}

std::unordered_map<std::string, const void*> all_kernels() {
  std::unordered_map<std::string, const void*> found;
  for (const auto& kernels : {attention_kernels(), cross_entropy_kernels(), optimizer_kernels()})
    for (const CudaKernel& kernel : kernels) found[kernel.name] = kernel.function;
  return found;
}

}  // namespace

void cuda_launch(const std::string& name, int grid_x, int grid_y, int block, int shared,
                 const std::vector<std::string>& arguments, std::uintptr_t stream) {
  static const auto kernels = all_kernels();
  const auto kernel = kernels.find(name);
  if (kernel == kernels.end()) throw std::invalid_argument("no CUDA kernel is called '" + name + "'");
  if (shared > SHARED_WITHOUT_ASKING)
    check(cudaFuncSetAttribute(kernel->second, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  std::vector<void*> pointers;
  for (const std::string& argument : arguments) pointers.push_back(const_cast<char*>(argument.data()));
  check(cudaLaunchKernel(kernel->second, dim3(grid_x, grid_y), dim3(block), pointers.data(), shared,
                         reinterpret_cast<cudaStream_t>(stream)),
        name);
}

}  // namespace hotloop
