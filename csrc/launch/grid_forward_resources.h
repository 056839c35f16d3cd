// What kernels/grid_forward.cuh needs of a device: the plan asks before anything is launched. The
// launcher checks at compile time that the kernel agrees.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/params.h"
#include "launch/grid_arithmetic.h"
#include "launch/plan.h"

namespace rnnlm {

// `fragments` of a layer: one of those that are compiled; 0 for one that is too wide. A fragment is
// 64 bytes of a weight row.
constexpr int grid_forward_fragments(GridArithmetic arithmetic, int64_t hidden) {
  const int64_t width = (arithmetic == GridArithmetic::tensor16 ? 32 : 16) * kGridWarps;
  for (const int fragments : {1, 2, 4, 6, 8}) {
    if (hidden <= width * fragments) return fragments;
  }
  return 0;
}

// More than one tile of 8 rows at a time for layers whose products are short beside what every pass
// costs; others have no registers to spare.
constexpr int grid_forward_most_tiles(int fragments) {
  return fragments <= 4 ? 2 : 1;
}

// Rows of a pass that plain multiply-adds compute together: they read the weights in shared memory
// once.
constexpr int kGridFmaRows = 4;

// Weights of a CTA that its threads have no registers for, in bytes of shared memory.
constexpr int64_t grid_forward_shared_weights(Cell cell, GridArithmetic arithmetic, int fragments) {
  constexpr int64_t kThreads = 32 * kGridWarps, kVector = 16;
  const bool lstm = cell == Cell::lstm, fma = arithmetic == GridArithmetic::fma;
  // Vectors of a weight row, of two a fragment, for which a thread has registers.
  const int room =
      fma ? (lstm ? (fragments == 8 ? 10 : 11) : 12)
          : (lstm ? (fragments == 8 ? 10 : 12) : 14) - (arithmetic == GridArithmetic::tf32 ? 2 : 0);
  const int beyond = 2 * fragments > room ? 2 * fragments - room : 0;
  return beyond * (lstm ? 4 : 3) * kVector * kThreads;
}

// Kernels of pairs (kernels/grid_gather.cuh) are compiled for layers whose gather counts.
constexpr int kGridPairFragments = 4;  // at least; narrower layers leave some of them empty

// Shared memory of a CTA. `fragments`, `tiles`, `rows` and `pairs` as in GridPlan.
constexpr int64_t grid_forward_shared_bytes(Cell cell, GridArithmetic arithmetic, int fragments,
                                            int tiles, int rows, bool pairs) {
  constexpr int64_t kFloat = 4, kVector = 16;
  const int64_t window =
      arithmetic == GridArithmetic::fma ? kGridWarps * 8 * 4 * fragments * kVector : 0;
  const int64_t columns = 8 * int64_t{tiles};
  // Two slots of h, rows 64 bytes apart, and their mbarriers.
  const int64_t slots = pairs ? 2 * columns * (kGridWarps * 64 * fragments + 64) + 32 : 0;
  // Of a unit, in an exchange.
  const int64_t sums = cell == Cell::lstm ? 4 : cell == Cell::gru_after ? 3 : 2;
  const int64_t partial_sums = 2 * kGridWarps * columns * (sums * kGridUnits + 4) * kFloat;
  const int64_t padded_rows = (rows + columns - 1) / columns * columns;
  const int64_t state = padded_rows * (cell == Cell::gru_before ? 2 : 1) * kGridUnits * kFloat;
  return grid_forward_shared_weights(cell, arithmetic, fragments) + window + slots + partial_sums +
         state + 16;
}

}  // namespace rnnlm
