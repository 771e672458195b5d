#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "bindings.h"
#include "optimizers/elementwise.h"

namespace py = pybind11;

namespace hotloop {
namespace {

void optimizer_update(int rule, int param, int grad, int moment, int n_moments, bool stochastic, bool maximize,
                      bool nesterov, uint64_t seed, uint32_t step, float factor, const std::vector<float>& scalars,
                      const std::vector<float>& constants, const std::vector<int64_t>& table, int threads) {
  using namespace optimizers;
  Update u{Rule(rule), Type(param), Type(grad), Type(moment), n_moments, stochastic, maximize, nesterov, seed, step,
           factor, {}, {}};
  if (scalars.size() > 3 || constants.size() > 4) throw std::invalid_argument("too many scalars");
  std::copy(scalars.begin(), scalars.end(), u.scalars);
  std::copy(constants.begin(), constants.end(), u.constants);
  py::gil_scoped_release free;
  update(u, table, threads);
}

}  // namespace

void bind_optimizers(py::module_& m) {
  m.def("optimizer_update", &optimizer_update, py::arg("rule"), py::arg("param"), py::arg("grad"), py::arg("moment"),
        py::arg("n_moments"), py::kw_only(), py::arg("stochastic"), py::arg("maximize"), py::arg("nesterov"),
        py::arg("seed"), py::arg("step"), py::arg("factor"), py::arg("scalars"), py::arg("constants"),
        py::arg("table"), py::arg("threads"), "See csrc/optimizers/elementwise.h: Update and Tensor.");
  m.def("optimizer_sum_of_squares", &optimizers::sum_of_squares, py::arg("table"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace hotloop
