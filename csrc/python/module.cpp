// The Python module rnnlm_kernels._C: raw pointers and sizes in, exceptions out. No torch here.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <string>

#include "build_config.h"
#include "python/cpu.h"
#include "python/cuda.h"
#include "python/errors.h"
#if RNNLM_WITH_CUDA
#include "launch/probe.h"
#endif

namespace py = pybind11;

namespace rnnlm {
namespace {

// CMake hands lists over as "a;b;c".
py::tuple split(const std::string& text) {
  py::list items;
  std::istringstream stream(text);
  for (std::string item; std::getline(stream, item, ';');) items.append(item);
  return py::tuple(items);
}

py::dict build_info() {
  py::dict info;
  info["version"] = RNNLM_VERSION;
  info["compiler"] = RNNLM_CXX_COMPILER;
  info["cxx_flags"] = RNNLM_CXX_FLAGS;
  info["build_type"] = RNNLM_BUILD_TYPE;
  info["isas"] = split(RNNLM_ISAS);
  info["sanitizers"] = split(RNNLM_SANITIZERS);
  info["cuda"] = py::bool_(RNNLM_WITH_CUDA);
  info["cuda_version"] =
      RNNLM_WITH_CUDA ? py::object(py::str(RNNLM_CUDA_VERSION)) : py::object(py::none());
  info["cuda_archs"] = split(RNNLM_CUDA_ARCHS);
  info["kernels"] = RNNLM_KERNELS;
  return info;
}

#if RNNLM_WITH_CUDA
void cuda_probe(std::uintptr_t x_ptr, std::uintptr_t y_ptr, std::int64_t n, float a, int device,
                std::uintptr_t stream) {
  const ProbeParams params{
      reinterpret_cast<const float*>(x_ptr), reinterpret_cast<float*>(y_ptr), n, a, device, stream};
  raise_unless_ok(launch_probe(params));
}
#endif

}  // namespace
}  // namespace rnnlm

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of rnnlm_kernels. Private: use the Python layers.";

  m.def("build_info", &rnnlm::build_info,
        "How this module was built: version, compiler, cxx_flags, build_type, isas (CPU "
        "instruction sets), sanitizers, "
        "cuda (bool), cuda_version (None without CUDA), cuda_archs, kernels (a hash of the "
        "sources of the CUDA kernels).");

  rnnlm::bind_cpu(m);
  rnnlm::bind_plan(m);

#if RNNLM_WITH_CUDA
  rnnlm::bind_cuda(m);
  m.def("cuda_probe", &rnnlm::cuda_probe, py::arg("x_ptr"), py::arg("y_ptr"), py::arg("n"),
        py::arg("a"), py::kw_only(), py::arg("device") = 0, py::arg("stream") = 0,
        "Enqueues y = a*x + y on a stream. x_ptr and y_ptr are device addresses of n float32 "
        "each.\n\n"
        "Raises ValueError for a negative size or a null pointer and RuntimeError, with the cause "
        "and what to do, when "
        "the driver or the launch fails.");
#endif
}
