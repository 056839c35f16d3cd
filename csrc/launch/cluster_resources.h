// Which kernels of the block and cluster tiers there are and what they need: the plan asks before
// anything is launched. launch/cluster.h checks at compile time that the kernels agree.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "launch/plan.h"

namespace rnnlm {

// Batch rows of a cluster.
constexpr int kClusterPlanRows = 8;

// Batch rows that plain multiply-adds compute at a time.
constexpr int cluster_fma_rows(Cell cell, int64_t hidden) {
  return cell == Cell::lstm && hidden > 256 ? 2 : 4;
}

// How the recurrent product is computed.
enum class ClusterProduct : int { tensor_cores_16 = 0, tensor_cores_tf32 = 1, multiply_adds = 2 };

// A build has room for `hidden` units on `ctas` CTAs. One CTA is the block tier. More than 8 CTAs
// are beyond what every device with clusters guarantees: they fit where the driver says so.
struct ClusterBuild {
  int hidden, ctas;
};
struct ClusterBuilds {
  const ClusterBuild* first;
  int count;
};
constexpr ClusterBuild kClusterBuilds16[] = {{64, 1},  {128, 1}, {128, 2},
                                             {256, 4}, {512, 8}, {512, 16}};
// Weights of float32 take twice the room, and the products of a step are shared by more CTAs.
constexpr ClusterBuild kClusterBuilds32[] = {{64, 1},  {128, 2}, {128, 4},
                                             {256, 4}, {256, 8}, {512, 16}};
constexpr ClusterBuilds cluster_builds(ClusterProduct product) {
  if (product == ClusterProduct::tensor_cores_16) return {kClusterBuilds16, 6};
  return {kClusterBuilds32, 6};
}

constexpr int64_t cluster_shared_bytes(Cell cell, Pass pass, ClusterProduct product,
                                       const ClusterBuild& build) {
  const int units = build.hidden / build.ctas, gates = cell == Cell::lstm ? 4 : 3;
  const bool forward = pass == Pass::forward, block = build.ctas == 1;
  const bool halves = product == ClusterProduct::tensor_cores_16;
  const bool wide_warps = block && (halves || !forward);  // of 16 units
  const int warps = units / (wide_warps ? 16 : 8), threads = 32 * warps;
  // Fragments of 64 bytes of k that a thread holds of each tile, and how many of them in registers.
  const int tiles = forward ? (wide_warps ? gates : 2) : build.hidden / 16 / warps;
  const int fragments = (forward ? build.hidden : gates * units) / (halves ? 32 : 16);
  const int64_t slots = 2 * 512 * int64_t{fragments};
  const int64_t sums = forward || block ? 0 : 2 * 512 * int64_t{build.ctas} * (units / 16);
  const int64_t others = slots + sums + (block ? 0 : 16);
  // Gradients of biases: two units a thread, where these sums are not in registers.
  const int64_t bias_sums = (cell == Cell::gru_before ? 3 : 4) * int64_t{8} * threads;
  if (product == ClusterProduct::multiply_adds) {
    // Vectors of 4 k of each of a lane's rows.
    const int values = forward ? 2 * gates : 4 * tiles, vectors = fragments / 2;
    const int all = values * vectors;
    const int held = all <= 32               ? all
                     : all <= 48 && !forward ? 16
                     : all <= 96             ? 24
                     : forward               ? 33
                                             : 37;
    const int64_t row_sums = 1024 * int64_t{warps} + (forward ? 4 * threads : 0);  // and biases
    const bool sums_biases = !forward && (block || (all > 32 && all <= 96));
    return others + int64_t{all - held} * threads * 16 + row_sums + (sums_biases ? bias_sums : 0);
  }
  const int room = halves ? (forward ? 192 : 160) : block && !forward ? 96 : 128;
  const int of_many = halves && forward ? 112 : 96;
  const int held = fragments * tiles * 8 <= room ? fragments : of_many / (tiles * 8);
  return others + int64_t{fragments - held} * tiles * 2 * 16 * threads +
         (block && !forward ? bias_sums : 0);
}

// More than this no GPU has: a build that needs it is not compiled.
constexpr int64_t kClusterMostShared = 227 * 1024;

// The smallest build for a layer on so many CTAs; {0, 0} if there is none.
constexpr ClusterBuild cluster_build(Cell cell, Pass pass, ClusterProduct product, int64_t hidden,
                                     int ctas) {
  const ClusterBuilds builds = cluster_builds(product);
  for (int i = 0; i < builds.count; ++i) {
    const ClusterBuild& build = builds.first[i];
    if (build.ctas != ctas || build.hidden < hidden) continue;
    if (cluster_shared_bytes(cell, pass, product, build) <= kClusterMostShared) return build;
  }
  return {0, 0};
}

// Whether there is a kernel for `rows` batch rows on each cluster of `ctas` CTAs, and the dynamic
// shared memory that each CTA of it needs.
constexpr bool cluster_fits(Cell cell, Pass pass, ClusterProduct product, int64_t hidden, int ctas,
                            int rows, int64_t* shared_bytes) {
  if (hidden < 1 || hidden % 8 != 0 || rows != kClusterPlanRows) return false;
  const ClusterBuild build = cluster_build(cell, pass, product, hidden, ctas);
  if (build.ctas == 0) return false;
  *shared_bytes = cluster_shared_bytes(cell, pass, product, build);
  return true;
}

}  // namespace rnnlm
