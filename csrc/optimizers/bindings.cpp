#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "optimizers/elementwise.h"
#ifdef HOTLOOP_CUDA
#include "optimizers/elementwise_cuda.h"
#endif

namespace py = pybind11;

namespace hotloop {
namespace {

void optimizer_update(int rule, int param, int grad, int moment, int n_moments, bool stochastic, bool maximize,
                      bool nesterov, uint64_t seed, uint32_t step, float factor, const std::vector<float>& scalars,
                      const std::vector<float>& constants, const std::vector<int64_t>& table, int threads) {
  using namespace optimizers;
  Update u{Rule(rule), Type(param), Type(grad), Type(moment), n_moments, stochastic, maximize, nesterov, seed, step,
           factor, {}, {}};
  if (scalars.size() > 3 || constants.size() > 5) throw std::invalid_argument("too many scalars");
  std::copy(scalars.begin(), scalars.end(), u.scalars);
  std::copy(constants.begin(), constants.end(), u.constants);
  py::gil_scoped_release free;
  update(u, table, threads);
}

#ifdef HOTLOOP_CUDA
using Pointer = std::uintptr_t;

void optimizer_update_cuda(Pointer table, Pointer chunks, Pointer scalars, Pointer factor, Pointer skip, Pointer step,
                           const std::string& packed, int grid, Pointer stream) {
  optimizers::Options options;
  if (packed.size() != sizeof options) throw std::invalid_argument("options: expected as many bytes as Options has");
  std::memcpy(&options, packed.data(), sizeof options);
  const auto numbers = [](Pointer p) { return reinterpret_cast<const int64_t*>(p); };
  const auto scalar = [](Pointer p) { return reinterpret_cast<const float*>(p); };
  optimizers::launch_update(numbers(table), numbers(chunks), grid, scalar(scalars), scalar(factor), scalar(skip),
                            scalar(step), options, reinterpret_cast<void*>(stream));
}

void optimizer_sum_of_squares_cuda(Pointer table, Pointer chunks, Pointer sums, Pointer arrived, int count,
                                   Pointer stream) {
  optimizers::launch_sum_of_squares(reinterpret_cast<const int64_t*>(table), reinterpret_cast<const int64_t*>(chunks),
                                    reinterpret_cast<double*>(sums), reinterpret_cast<int*>(arrived), count,
                                    reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

void bind_optimizers(py::module_& m) {
  m.def("optimizer_update", &optimizer_update, py::arg("rule"), py::arg("param"), py::arg("grad"), py::arg("moment"),
        py::arg("n_moments"), py::kw_only(), py::arg("stochastic"), py::arg("maximize"), py::arg("nesterov"),
        py::arg("seed"), py::arg("step"), py::arg("factor"), py::arg("scalars"), py::arg("constants"),
        py::arg("table"), py::arg("threads"), "See csrc/optimizers/elementwise.h: Update and Tensor.");
  m.def("optimizer_sum_of_squares", &optimizers::sum_of_squares, py::arg("table"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
#ifdef HOTLOOP_CUDA
  m.def("optimizer_update_cuda", &optimizer_update_cuda, "See csrc/optimizers/elementwise_cuda.h.");
  m.def("optimizer_sum_of_squares_cuda", &optimizer_sum_of_squares_cuda, "See csrc/optimizers/elementwise_cuda.h.");
#endif
}

}  // namespace hotloop
