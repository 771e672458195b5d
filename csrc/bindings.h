// Each op binds its functions in a file of its own, csrc/<op>/bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace hotloop {

void bind_cross_entropy(pybind11::module_& m);

}  // namespace hotloop
