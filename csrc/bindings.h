// Each op binds its functions in a file of its own, csrc/<op>/bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace hotloop {

void bind_attention(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_optimizers(pybind11::module_& m);

}  // namespace hotloop
