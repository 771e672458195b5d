// hotloop.kernels._C: raw pointers, sizes and strides in, nothing out. No torch header is included anywhere, so that one
// build serves every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "common/targets.h"
#include "machine/machine.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backends of hotloop.kernels.";
  m.def("instruction_sets", &hotloop::instruction_sets, "Instruction sets of this CPU that the code can choose between.");
  m.def("compiler", &hotloop::compiler, "The compiler that built this extension.");
  m.def("force_instruction_set", &hotloop::force_instruction_set,
        "Compute as a CPU with less would: baseline, avx2 or avx512; the empty string is the best there is. For tests.");
  m.def("threads", &hotloop::threads, "Threads that a parallel region would use now.");
  hotloop::bind_cross_entropy(m);
}
