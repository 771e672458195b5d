// hotloop.kernels._C: raw pointers, sizes and strides in, nothing out. No torch header is included anywhere, so that one
// build serves every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "common/simd.h"
#include "machine/machine.h"
#include "optimizers/elementwise.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backends of hotloop.kernels.";
  m.def("instruction_sets", &hotloop::instruction_sets, "Instruction sets of this CPU that the code can choose between.");
  m.def("compiler", &hotloop::compiler, "The compiler that built this extension.");
  m.def("threads", &hotloop::threads, "Threads that a parallel region would use now.");
  m.def("force_instruction_set", &hotloop::force_instruction_set, py::arg("name"),
        "Compute with 'baseline', 'avx2' or 'avx512' from now on; '': with the widest that the CPU has.");

  m.def(
      "optimizer_update",
      [](int rule, int param, int grad, int moment, int n_moments, bool stochastic, bool maximize, bool nesterov,
         uint64_t seed, uint32_t step, float factor, std::vector<float> scalars, std::vector<float> constants,
         const std::vector<int64_t>& table, int threads) {
        using namespace hotloop::optimizers;
        Update u{static_cast<Rule>(rule), static_cast<Type>(param), static_cast<Type>(grad), static_cast<Type>(moment),
                 n_moments, stochastic, maximize, nesterov, seed, step, factor, {}, {}};
        if (scalars.size() > 3 || constants.size() > 5) throw std::invalid_argument("too many scalars");
        std::copy(scalars.begin(), scalars.end(), u.scalars);
        std::copy(constants.begin(), constants.end(), u.constants);
        py::gil_scoped_release release;
        update(u, table, threads);
      },
      py::arg("rule"), py::arg("param"), py::arg("grad"), py::arg("moment"), py::arg("n_moments"), py::kw_only(),
      py::arg("stochastic"), py::arg("maximize"), py::arg("nesterov"), py::arg("seed"), py::arg("step"),
      py::arg("factor"), py::arg("scalars"), py::arg("constants"), py::arg("table"), py::arg("threads"));
  m.def("optimizer_sum_of_squares", &hotloop::optimizers::sum_of_squares, py::arg("table"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}
