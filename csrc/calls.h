// The frozen call and the step of a stream.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnkern {

// Adds their types to the module, and the functions that make them.
void add_calls(pybind11::module_& m);

}  // namespace rnnkern
