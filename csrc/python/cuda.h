// The CUDA part of rnnlm_kernels._C, and of the emulator's module, which has the same functions.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnlm {
// The layers and what is known of a device. Where CUDA kernels, or their emulation, were built.
void bind_cuda(pybind11::module_& m);
// What would run: pure functions of problem and device, in every build.
void bind_plan(pybind11::module_& m);
}  // namespace rnnlm
