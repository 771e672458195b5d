// hotloop.kernels._C: raw pointers, sizes and strides in, nothing out. No torch header is included anywhere, so that one
// build serves every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#ifdef HOTLOOP_CUDA
#include "common/launch.h"
#endif
#include "common/targets.h"
#include "machine/machine.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backends of hotloop.kernels.";
  m.def("instruction_sets", &hotloop::instruction_sets, "Instruction sets of this CPU that the code can choose between.");
  m.def("compiler", &hotloop::compiler, "The compiler that built this extension.");
  m.def("force_instruction_set", &hotloop::force_instruction_set,
        "Compute as a CPU with less would: baseline, avx2, avx512 or avx512_bf16; the empty string is the best there is. "
        "For tests.");
  m.def("cuda_architectures", &hotloop::cuda_architectures, "What the CUDA code is compiled for; \"\" without any.");
  m.def("threads", &hotloop::threads, "Threads that a parallel region would use now.");
#ifdef HOTLOOP_CUDA
  // Arguments as bytes objects, which pybind11 copies into the strings.
  m.def("cuda_launch", &hotloop::cuda_launch, "See csrc/common/launch.h.");
#endif
  hotloop::bind_attention(m);
  hotloop::bind_cross_entropy(m);
  hotloop::bind_optimizers(m);
}
