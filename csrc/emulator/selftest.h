// Small kernels that test the emulator: correct ones, whose results Python checks, and the same
// ones with a planted bug each, which the emulator must show.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"

namespace rnnlm::emulator {

struct SelftestParams {
  const uint32_t* in;
  uint32_t* out;
  uint32_t* scratch;  // zeros
  int n;              // rounds, elements or whatever the kernel counts
  int variant;        // 0: as it should be; set from the name of the test
};

// Names that launch_selftest() knows.
std::vector<std::string> selftest_names();

// selftest.cpp says, kernel by kernel, what `in`, `out` and `scratch` hold.
Status launch_selftest(const std::string& name, const SelftestParams& params);

}  // namespace rnnlm::emulator
