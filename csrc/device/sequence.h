// Which rows a step holds and where they lie: dense or packed, either direction.
#pragma once

#include "device/platform.h"

namespace rnnlm {

// Dense: row b of step t is row t * batch + b of every per-step tensor, and every step holds all
// rows. Packed: step t begins at row offsets[t] and holds offsets[t + 1] - offsets[t] rows, never
// more than the step before.
struct DeviceSequence {
  int steps;
  int batch;
  bool reverse;
  const int64_t* offsets;  // [steps + 1] in device memory, null for dense

  // The i-th step in the order of the recurrence.
  RNNLM_DEVICE int step(int i) const { return reverse ? steps - 1 - i : i; }
  RNNLM_DEVICE int rows(int t) const {
    return offsets == nullptr ? batch : static_cast<int>(offsets[t + 1] - offsets[t]);
  }
  RNNLM_DEVICE int64_t row(int t, int b) const {
    return (offsets == nullptr ? int64_t{t} * batch : offsets[t]) + b;
  }
};

}  // namespace rnnlm
