// The CPU part of rnnlm_kernels._C.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnlm {
void bind_cpu(pybind11::module_& m);
}
