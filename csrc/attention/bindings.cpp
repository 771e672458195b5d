#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "attention/attention.h"
#include "bindings.h"

namespace hotloop {
namespace {

using namespace attention;

// The structs are numbers in a row, all of one size.
template <class Struct, class Number>
Struct from(const std::vector<Number>& numbers) {
  if (sizeof(Struct) != numbers.size() * sizeof(Number)) throw std::invalid_argument("see csrc/attention/attention.h");
  Struct s;
  std::memcpy(&s, numbers.data(), sizeof s);
  return s;
}

void* at(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

void bind_attention(pybind11::module_& m) {
  using Integers = std::vector<int64_t>;
  using Floats = std::vector<float>;
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;
  const char* doc = "See csrc/attention/attention.h.";
  m.def("attention_forward_workspace",
        [](const Integers& problem, int threads) { return forward_workspace(from<Problem>(problem), threads); }, doc);
  m.def("attention_backward_workspace",
        [](const Integers& problem, int threads) { return backward_workspace(from<Problem>(problem), threads); }, doc);
  m.def("attention_forward",
        [](const Integers& problem, const Floats& numbers, std::uintptr_t workspace, int threads) {
          forward(from<Problem>(problem), from<Numbers>(numbers), at(workspace), threads);
        }, Free(), doc);
  m.def("attention_backward",
        [](const Integers& problem, const Integers& gradients, const Floats& numbers, std::uintptr_t workspace,
           int threads) {
          backward(from<Problem>(problem), from<Gradients>(gradients), from<Numbers>(numbers), at(workspace), threads);
        }, Free(), doc);
}

}  // namespace hotloop
