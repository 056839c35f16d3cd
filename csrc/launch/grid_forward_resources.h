// What kernels/grid_forward.cuh needs of a device: the plan asks before anything is launched. The
// launcher checks at compile time that the kernel agrees.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/params.h"
#include "launch/plan.h"

namespace rnnlm {

// `fragments` of a layer: one of those that are compiled; 0 for one that is too wide. A fragment is
// 64 bytes of a weight row.
constexpr int grid_forward_fragments(DType dtype, int64_t hidden) {
  const int64_t width = (dtype == DType::f32 ? 16 : 32) * kGridWarps;
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

// Shared memory of a CTA. `fragments`, `tiles` and `rows` as in GridPlan.
constexpr int64_t grid_forward_shared_bytes(Cell cell, DType dtype, int fragments, int tiles,
                                            int rows) {
  constexpr int64_t kThreads = 32 * kGridWarps, kFragmentBytes = 32, kFloat = 4;
  const bool lstm = cell == Cell::lstm;
  const int64_t gates = lstm ? 4 : 3;
  // Fragments for which a thread has registers; the widest LSTMs use one less.
  const int64_t room = (lstm ? 6 : 7) - (dtype == DType::f32 ? 1 : 0);
  const int64_t held = fragments <= room ? fragments : fragments == 8 && lstm ? room - 1 : room;
  const int64_t weights = (fragments - held) * gates * kFragmentBytes * kThreads;
  const int64_t columns = 8 * int64_t{tiles};
  const int64_t sums = cell == Cell::gru_before ? 2 : gates;  // of a unit, in an exchange
  const int64_t partial_sums = 2 * kGridWarps * columns * (sums * kGridUnits + 4) * kFloat;
  const int64_t padded_rows = (rows + columns - 1) / columns * columns;
  const int64_t state = padded_rows * (cell == Cell::gru_before ? 2 : 1) * kGridUnits * kFloat;
  return weights + partial_sums + state + 16;
}

}  // namespace rnnlm
