#include "launch/probe.h"

#include <algorithm>

#include "kernels/probe.cuh"
#include "launch/launch.h"

namespace rnnlm {

Status launch_probe(const ProbeParams& params) {
  if (params.n < 0) {
    return Status::invalid_argument("n is " + std::to_string(params.n),
                                    "Pass the number of elements, 0 or more");
  }
  if (params.device < 0) {
    return Status::invalid_argument("device is " + std::to_string(params.device),
                                    "Pass the index of a CUDA device, 0 or more");
  }
  if (params.n == 0) return Status::ok();
  if (params.x_ptr == nullptr || params.y_ptr == nullptr) {
    return Status::invalid_argument("x or y is a null pointer",
                                    "Pass the data_ptr() of a tensor on the device");
  }

  const DeviceGuard guard(params.device);
  if (!guard.status().is_ok()) return guard.status();

  using Traits = ProbeTraits;
  const std::int64_t blocks = (params.n + Traits::kThreads - 1) / Traits::kThreads;
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>(std::min<std::int64_t>(blocks, Traits::kMaxBlocks));
  shape.threads = Traits::kThreads;
  const ProbeArguments arguments{params.x_ptr, params.y_ptr, params.n, params.a};
  return launch("launching the probe kernel", &probe_kernel<Traits>, shape, params.stream,
                arguments);
}

}  // namespace rnnlm
