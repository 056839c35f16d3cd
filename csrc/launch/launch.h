// Starting kernels, asking a device what it is, filling memory: all that launchers (csrc/launch)
// need of the CUDA runtime, so that the emulator can stand in for it. Kernels take one parameter
// struct by value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/status.h"
#include "device/platform.h"
#include "launch/plan.h"

namespace rnnlm {

struct LaunchShape {
  unsigned grid_x = 1, grid_y = 1, grid_z = 1;
  unsigned threads = 1;
  std::size_t shared = 0;     // dynamic shared memory of a CTA, bytes
  unsigned cluster = 1;       // CTAs along x that share a cluster; above 8 only where it fits
  bool cooperative = false;   // all CTAs resident at once, or the launch is refused
  bool programmatic = false;  // may start before the launch in front has ended (sm_90 and newer)
};

}  // namespace rnnlm

#if defined(RNNLM_EMULATOR)
#include "emulator/launch.h"
#else
#include "launch/cuda_launch.h"
#endif
