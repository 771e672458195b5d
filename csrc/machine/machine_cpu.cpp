#include "machine/machine.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace hotloop {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) names.push_back("avx2");
  if (__builtin_cpu_supports("fma")) names.push_back("fma");
  if (__builtin_cpu_supports("avx512f")) names.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) names.push_back("avx512bw");
  if (__builtin_cpu_supports("avx512vl")) names.push_back("avx512vl");
  if (__builtin_cpu_supports("avx512bf16")) names.push_back("avx512_bf16");
#elif defined(__aarch64__)
  names.push_back("neon");
#endif
  return names;
}

std::string compiler() {
#if defined(__clang__)
  return "clang++ " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#else
  return "unknown compiler";
#endif
}

std::string cuda_architectures() {
#ifdef HOTLOOP_CUDA
  return HOTLOOP_CUDA;
#else
  return "";
#endif
}

int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace hotloop
