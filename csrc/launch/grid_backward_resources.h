// Shared memory of a CTA of kernels/grid_backward.cuh: the plan asks whether it fits before
// anything is launched. The launcher checks at compile time that the kernel agrees.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "launch/plan.h"

namespace rnnlm {

// Fragments of weights that a thread holds in registers, eight registers each. What it has beyond
// them (LSTM with 6 or 8 fragments a gate row, GRU with 8) lies in shared memory.
constexpr int kGridBackwardFragmentsInRegisters = 20;

// `fragments`, `tiles` and `rows` as in GridPlan.
constexpr int64_t grid_backward_shared_bytes(Cell cell, DType, int fragments, int tiles, int rows) {
  constexpr int64_t kThreads = 32 * kGridWarps, kFragmentBytes = 32, kFloat = 4;
  const int64_t held = (cell == Cell::lstm ? 4 : 3) * int64_t{fragments};
  const int64_t beyond =
      held > kGridBackwardFragmentsInRegisters ? held - kGridBackwardFragmentsInRegisters : 0;
  const int64_t columns = 8 * int64_t{tiles};
  const int64_t passes = (rows + columns - 1) / columns;
  const int64_t parked = 48 * columns * kGridUnits;
  const int64_t partial_sums = 2 * kGridWarps * columns * (kGridUnits + 4) * kFloat;
  const int64_t window = 64 * kGridWarps;
  const int64_t state = passes * columns * kGridUnits * kFloat;
  return beyond * kFragmentBytes * kThreads + parked + partial_sums + window + state + 2 * kFloat;
}

}  // namespace rnnlm
