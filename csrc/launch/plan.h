// What the CUDA launchers decide before they launch, as pure functions of the problem and the
// device: no CUDA here, so every build can explain a choice and every test can check one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/params.h"

namespace rnnlm {

constexpr int kCudaTiers = 6;  // enumerators of CudaTier

enum class Cell : int { lstm = 0, gru_after = 1, gru_before = 2 };
enum class Pass : int { forward = 0, backward = 1 };

// What a plan may depend on, of the device (launch/launch.h finds them out) ...
struct DeviceLimits {
  int compute_capability = 0;        // 90 for 9.0
  int sms = 0;                       // that a launch of this process can use
  std::size_t shared_per_block = 0;  // largest dynamic shared memory, in bytes
  bool cooperative = false;
  bool off[kCudaTiers] = {};  // tiers that failed here before (launch/guard.h)
};

// ... and of the layer.
struct CudaProblem {
  Cell cell;
  Pass pass;
  DType dtype;
  int64_t steps, batch, hidden, proj;  // proj = 0: none
  int64_t rows;                        // of all steps together: T*B, fewer where packed
  bool packed;
  bool allow_tf32;
  // Launches like this one that run side by side, itself included: each gets its part of the SMs.
  int concurrent = 1;

  int gates() const { return cell == Cell::lstm ? 4 : 3; }
  // Of a row of CudaCall::bias_partials: 4H where b_hn has a gradient of its own.
  int64_t bias_columns() const { return (cell == Cell::gru_before ? 3 : 4) * hidden; }
};

// Where CudaCall::bias_partials begins, behind the bytes of workspace that a tier itself uses.
constexpr int64_t bias_partials_offset(int64_t tier_bytes) {
  return (tier_bytes + 255) / 256 * 256;
}
// Bytes of workspace of a tier that itself uses `tier_bytes` and, of a backward pass, leaves `rows`
// rows of bias_partials.
int64_t with_bias_partials(const CudaProblem& problem, int64_t tier_bytes, int64_t rows);

// --- the grid tier: all SMs, state exchanged through L2 ------------------------------------------
//
// `ctas` CTAs of `kGridUnits` hidden units each make a group, which runs its own batch rows and
// never waits for another group. A CTA's 8 warps split k: each holds `fragments` fragments (32 k,
// of float32 16: hidden <= 256 or 128 * fragments) of the CTA's weights. It computes `tiles` tiles
// of 8 batch rows at a time, and as many times a step as its group's rows ask for.
//
// `pairs` (forward, 16-bit dtypes, compute capability 9.0): two CTAs are a cluster and read each
// row of h once (kernels/grid_gather.cuh). A group has an even number of them; the last may be
// without units. It is a tier by itself, grid_pairs, in all that concerns choosing: it is forecast,
// asked for, measured, and switched off where it has failed without the other.
constexpr int kGridUnits = 16;
constexpr int kGridWarps = 8;
struct GridPlan {
  int fragments = 0;  // forward: per gate row; the backward kernel holds gates() times as many
  int tiles = 0;      // 1 or 2
  int ctas = 0;
  int groups = 0;
  // Batch rows of a group, on tensor cores a multiple of 8; the last group may have fewer.
  int rows = 0;
  int64_t workspace = 0;  // without bias_partials
  bool pairs = false;
};
constexpr bool is_grid(CudaTier tier) {
  return tier == CudaTier::grid || tier == CudaTier::grid_pairs;
}

// --- the block and cluster tiers: one CTA, or the CTAs of a cluster, hold all weights ------------
//
// A cluster of `ctas` CTAs (block tier: 1) runs `rows` batch rows from the first step to the last
// and waits for no other.
struct ClusterPlan {
  int ctas = 0;
  int clusters = 0;
  int rows = 0;
  int64_t workspace = 0;  // without bias_partials
  bool tf32 = false;      // of float32: products on tensor cores, which round to TF32
};

// --- the choice ----------------------------------------------------------------------------------

// What the cost model says of a tier: microseconds of each step, and of a call beside its steps;
// of concurrent launches, until the last of them has ended.
struct Forecast {
  bool able = false;
  const char* obstacle = "";  // why it cannot run the problem
  double us_per_step = 0;
  double us_per_call = 0;
  double us_per_replayed_step = 0;  // us_per_step where a CUDA graph has done the host's part

  double us(int64_t steps) const { return us_per_call + us_per_step * double(steps); }
};

struct CudaChoice {
  CudaTier tier = CudaTier::automatic;  // automatic: the tier that was wanted cannot run this
  GridPlan grid;                        // where the tier is grid or grid_pairs
  ClusterPlan cluster;                  // where it is block or cluster
  int64_t workspace = 0;                // enough for any persistent tier that may have to run this
  Forecast forecasts[kCudaTiers];       // by CudaTier; that of `automatic` is empty

  const Forecast& of(CudaTier one) const { return forecasts[static_cast<int>(one)]; }
};

// `wanted` if the problem and the device allow it; of `automatic`, the tier with the best forecast.
// The backward pass of `grid_pairs` is that of `grid`.
CudaChoice choose(const CudaProblem& problem, const DeviceLimits& limits, CudaTier wanted);

// Whether the two directions of a bidirectional layer had better run side by side, each with half
// of the SMs, or in turn, each with all of them; and what either takes, in microseconds.
struct Directions {
  bool side_by_side = false;
  double us_side_by_side = 0;  // 0: the tier that is wanted cannot, with half of the SMs
  double us_in_turn = 0;
};
// `forward` is the forward pass of one direction, alone. `trains`: the backward pass counts too,
// for it runs as the forward pass did. `replayed`: a CUDA graph is being captured.
Directions choose_directions(const CudaProblem& forward, bool trains, bool replayed,
                             const DeviceLimits& limits, CudaTier wanted);

const char* tier_name(CudaTier tier);

// The choice in a few words: "grid, 2 groups of 64 CTAs, 8 rows each".
std::string describe(const CudaChoice& choice);

}  // namespace rnnlm
