// Which kernels of the block and cluster tiers there are and what they need: the plan asks before
// anything is launched. launch/cluster.h checks at compile time that the kernels agree.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "launch/plan.h"

namespace rnnlm {

// Batch rows of a cluster.
constexpr int kClusterPlanRows = 8;

// A build has room for `hidden` units on `ctas` CTAs. One CTA is the block tier. More than 8 CTAs
// are beyond what every device with clusters guarantees: they fit where the driver says so.
struct ClusterBuild {
  int hidden, ctas;
};
constexpr ClusterBuild kClusterBuilds[] = {{64, 1},  {128, 1}, {128, 2},
                                           {256, 4}, {512, 8}, {512, 16}};

// The smallest build for a layer on so many CTAs; {0, 0} if there is none.
constexpr ClusterBuild cluster_build(int64_t hidden, int ctas) {
  for (const ClusterBuild& build : kClusterBuilds) {
    if (build.ctas == ctas && build.hidden >= hidden) return build;
  }
  return {0, 0};
}

constexpr int64_t cluster_shared_bytes(Cell cell, Pass pass, const ClusterBuild& build) {
  const int units = build.hidden / build.ctas, gates = cell == Cell::lstm ? 4 : 3;
  const bool forward = pass == Pass::forward, block = build.ctas == 1;
  const int warps = units / (block ? 16 : 8);
  // Fragments of 32 k that a thread holds of each tile, and how many of them in registers.
  const int tiles = forward ? (block ? gates : 2) : build.hidden / 16 / warps;
  const int fragments = forward ? build.hidden / 32 : gates * units / 32;
  const bool room = fragments * tiles * 8 <= (forward ? 192 : 160);
  const int held = room ? fragments : (forward ? 112 : 96) / (tiles * 8);
  const int64_t slots = 2 * 512 * int64_t{fragments};
  const int64_t weights = int64_t{fragments - held} * tiles * 2 * 16 * 32 * warps;
  const int64_t sums = forward || block ? 0 : 2 * 512 * int64_t{build.ctas} * (units / 16);
  return slots + weights + sums + (block ? 0 : 16);
}

// Whether there is a kernel for `rows` batch rows on each cluster of `ctas` CTAs, and the dynamic
// shared memory that each CTA of it needs.
constexpr bool cluster_fits(Cell cell, Pass pass, DType dtype, int64_t hidden, int ctas, int rows,
                            int64_t* shared_bytes) {
  if (dtype != DType::bf16 && dtype != DType::f16) return false;
  if (hidden < 1 || hidden % 8 != 0 || rows != kClusterPlanRows) return false;
  const ClusterBuild build = cluster_build(hidden, ctas);
  if (build.ctas == 0) return false;
  *shared_bytes = cluster_shared_bytes(cell, pass, build);
  return true;
}

}  // namespace rnnlm
