// What this CPU and this build can do, for `hotloop doctor` and for the run-time choice of code paths.
#pragma once

#include <string>
#include <vector>

namespace hotloop {

// Names of the instruction sets that code in this extension chooses between, e.g. "avx2", "avx512f", "avx512_bf16".
std::vector<std::string> instruction_sets();

// The compiler that built this extension, e.g. "g++ 12.2.0".
std::string compiler();

// GPU architectures that CUDA code was compiled for, e.g. "80,90a"; "" in a build without.
std::string cuda_architectures();

// Threads that a parallel region would use now; 1 in a build without OpenMP.
int threads();

}  // namespace hotloop
