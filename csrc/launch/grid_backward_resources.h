// Shared memory of a CTA of kernels/grid_backward.cuh: the plan asks whether it fits before
// anything is launched. The launcher checks at compile time that the kernel agrees.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "launch/grid_arithmetic.h"
#include "launch/plan.h"

namespace rnnlm {

// Fragments of a gate row that the kernels of plain multiply-adds hold, which are twice as wide.
constexpr int grid_backward_fma_fragments(int fragments) {
  return (fragments + 1) / 2;
}

// Tiles of 8 rows that a pass may have: plain multiply-adds have no registers for more sums.
constexpr int grid_backward_most_tiles(GridArithmetic arithmetic) {
  return arithmetic == GridArithmetic::fma ? 1 : 2;
}

// Weights of a CTA that its threads have no registers for (20 fragments of 8 registers, or 8 of
// 16), in bytes of shared memory: LSTM with 6 or 8 fragments a gate row, GRU with 8, and plain
// multiply-adds GRU with 6.
constexpr int64_t grid_backward_shared_weights(Cell cell, GridArithmetic arithmetic,
                                               int fragments) {
  constexpr int64_t kThreads = 32 * kGridWarps;
  const bool fma = arithmetic == GridArithmetic::fma;
  const int gates = cell == Cell::lstm ? 4 : 3;
  const int held = gates * (fma ? grid_backward_fma_fragments(fragments) : fragments);
  const int room = !fma ? 20 : cell == Cell::gru_before ? 7 : 8;
  return (held > room ? held - room : 0) * (fma ? 64 : 32) * kThreads;
}

// `fragments`, `tiles` and `rows` as in GridPlan.
constexpr int64_t grid_backward_shared_bytes(Cell cell, GridArithmetic arithmetic, int fragments,
                                             int tiles, int rows) {
  constexpr int64_t kFloat = 4, kVector = 16;
  const int64_t columns = 8 * int64_t{tiles};
  const int64_t passes = (rows + columns - 1) / columns;
  const int64_t gradients =
      arithmetic == GridArithmetic::fma ? kGridWarps * (3 * 36 + 32) * kVector : 0;
  const int64_t parked = 48 * columns * kGridUnits;
  const int64_t partial_sums = 2 * kGridWarps * columns * (kGridUnits + 4) * kFloat;
  const int64_t window = 64 * kGridWarps;
  const int64_t state = passes * columns * kGridUnits * kFloat;
  return grid_backward_shared_weights(cell, arithmetic, fragments) + gradients + parked +
         partial_sums + window + state + 2 * kFloat;
}

}  // namespace rnnlm
