// Which tier runs a problem, and in what shape. The costs are those of cost_model.h; what a tier
// can run at all is decided here.
#include "launch/plan.h"

#include <algorithm>
#include <initializer_list>

#include "launch/cluster_resources.h"
#include "launch/cost_model.h"
#include "launch/grid_backward_resources.h"
#include "launch/grid_forward_resources.h"
#include "launch/tiers.h"

namespace rnnlm {
namespace {

constexpr CudaTier kTiers[] = {CudaTier::stepwise, CudaTier::block, CudaTier::cluster,
                               CudaTier::grid, CudaTier::grid_pairs};
constexpr int64_t kTileRows = 8;  // batch rows of a tensor-core tile

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}
int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}
bool is_16_bit(DType dtype) {
  return dtype == DType::bf16 || dtype == DType::f16;
}

// Whether float32 products may be rounded to TF32.
bool is_tf32(const CudaProblem& p) {
  return p.dtype == DType::f32 && p.allow_tf32;
}

// Whether they must not.
bool is_exact_f32(const CudaProblem& p) {
  return p.dtype == DType::f32 && !p.allow_tf32;
}

// --- costs

// Of gates, states and saved tensors of a step, however they are computed.
double memory_us(const CudaProblem& p) {
  // The gates that come in and those that are saved, h, and a cell state twice as wide.
  const double values = p.gates() * 2 + 3;
  return p.concurrent * values * size_of(p.dtype) * double(p.batch) * double(p.hidden) /
         kCostModel.memory;
}

// Products of `units` units of a layer and `rows` rows on one SM. `splits` warps share a sum.
double product_us(const CudaProblem& p, int64_t units, int64_t rows, int splits) {
  const bool forward = p.pass == Pass::forward;
  const double flops = 2.0 * p.gates() * double(units) * double(p.hidden) * double(rows);
  if (is_exact_f32(p)) return kCostModel.us(flops / kCostModel.fma_flops);
  const double tiles =
      double(ceil_div(units * (forward ? p.gates() : 1), 16)) * double(ceil_div(rows, kTileRows));
  const double k = double(p.hidden) * (forward ? 1 : p.gates());
  // An instruction on TF32 multiplies half as many k.
  const double halves = is_16_bit(p.dtype) ? 1 : 2;
  const double chain = k / 16 / splits * kCostModel.mma_cycles / std::min(4.0, tiles);
  return kCostModel.us(halves * std::max(flops / kCostModel.tensor_flops, chain));
}

// From the sums of a step to what the next one starts from, of `units` units and `rows` rows;
// `sums`: those that several warps share.
double tail_us(const CudaProblem& p, int64_t units, int64_t rows, int64_t sums) {
  return kCostModel.us(kCostModel.tail_cycles +
                       kCostModel.gate_cycles * p.gates() * double(units * rows) +
                       kCostModel.sum_cycles * double(sums));
}

// Exchanges of a step that wait for each other, and bytes that they hand over for each row: h (and
// r * h), or the gradients of all gates.
int exchanges(const CudaProblem& p) {
  return p.cell == Cell::gru_before ? 2 : 1;
}
double message_bytes(const CudaProblem& p) {
  return double(p.hidden) * size_of(p.dtype) * (p.pass == Pass::forward ? exchanges(p) : p.gates());
}

double weight_bytes(const CudaProblem& p) {
  return double(p.gates()) * double(p.hidden) * double(p.hidden) * size_of(p.dtype);
}

Forecast unable(const char* obstacle) {
  Forecast forecast;
  forecast.obstacle = obstacle;
  return forecast;
}

// Batch rows for which a stepwise launch reads weights once (launch/stepwise_launcher.h).
int64_t step_columns(const CudaProblem& p) {
  if (p.dtype == DType::f64) return 16;
  if (p.batch <= kTileRows) return kTileRows;
  return p.batch <= 32 || !is_16_bit(p.dtype) ? 32 : 64;
}

// All CTAs read their rows of weights and of state out of L2, whoever else reads the same.
Forecast stepwise(const CudaProblem& p, const DeviceLimits& device) {
  const CostModel& m = kCostModel;
  constexpr double kCtaRows = 64;  // weight rows of a CTA
  const double row_bytes = double(p.proj ? p.proj : p.hidden) * size_of(p.dtype);
  const double weight_rows = double(p.gates()) * double(p.hidden);
  const double weights = weight_rows * row_bytes;
  const double from_l2 = weights * double(ceil_div(p.batch, step_columns(p))) +
                         row_bytes * double(p.batch) * std::max(1.0, weight_rows / kCtaRows);
  const bool in_l2 = p.concurrent * weights <= m.l2_capacity;
  const double stream =
      std::max(from_l2 / m.l2_all, weights / (in_l2 ? m.weights_from_l2 : m.weights_from_memory));
  const double rate = is_16_bit(p.dtype)      ? m.step_flops_16
                      : p.dtype == DType::f64 ? m.step_flops_f64
                      : p.allow_tf32          ? m.step_flops_tf32
                                              : m.step_flops_f32;
  const double flops = 2 * weights / size_of(p.dtype) * double(p.batch);
  const int launches = exchanges(p) + (p.proj ? 1 : 0);
  const double ramp = device.compute_capability >= 90 ? m.overlapped_ramp_us : m.launch_ramp_us;
  const double waits = ramp * launches + m.step_tail_us;
  const double work = std::max(stream, flops / rate);
  const double alone = waits + std::max(work, memory_us(p) / p.concurrent);
  // What concurrent launches wait for, they wait for together; the work adds up.
  const double together = waits + std::max(p.concurrent * work, memory_us(p));
  const double host = m.host_launch_us * launches;
  Forecast forecast;
  forecast.able = true;
  forecast.us_per_replayed_step = together;
  if (p.concurrent == 1) {
    forecast.us_per_step = std::max(alone, host);
  } else {
    // The host enqueues one launch's steps after the other's: while it does so, the first runs
    // alone, and the last does when the others have ended.
    const double alone_share = std::min(1.0, host / alone);
    forecast.us_per_step = p.concurrent * host + (1 - alone_share) * together;
  }
  return forecast;
}

// What every persistent tier asks for; null if it gets it.
const char* persistent_obstacle(const CudaProblem& p) {
  if (p.dtype == DType::f64) return "its kernels are for bfloat16, float16 and float32";
  if (p.proj) return "it has no kernel with a projection";
  if (p.hidden % 8) return "the hidden size is not a multiple of 8";
  return nullptr;
}

// Launches of a persistent call, and its weights: once from memory, and from L2 to every CTA that
// holds a copy.
double persistent_us_per_call(const CudaProblem& p, int launches, int64_t copies) {
  return p.concurrent * (launches * kCostModel.host_launch_us +
                         weight_bytes(p) * (1 / kCostModel.weights_from_memory +
                                            double(copies) / kCostModel.weights_from_l2));
}

// --- grid

GridArithmetic arithmetic_of(const CudaProblem& p) {
  return grid_arithmetic(p.dtype, p.allow_tf32);
}

int64_t grid_shared_bytes(const CudaProblem& p, const GridPlan& plan) {
  return p.pass == Pass::forward
             ? grid_forward_shared_bytes(p.cell, arithmetic_of(p), plan.fragments, plan.tiles,
                                         plan.rows, plan.pairs)
             : grid_backward_shared_bytes(p.cell, arithmetic_of(p), plan.fragments, plan.tiles,
                                          plan.rows);
}

// Bytes of weights that wait in shared memory.
int64_t grid_shared_weights(const CudaProblem& p, const GridPlan& plan) {
  return p.pass == Pass::forward
             ? grid_forward_shared_weights(p.cell, arithmetic_of(p), plan.fragments)
             : grid_backward_shared_weights(p.cell, arithmetic_of(p), plan.fragments);
}

// A group computes its rows in passes of the same kind; a pass of the next step can start when all
// CTAs have ended this one, so that with several passes the exchange of one hides behind the
// others. A pair reads half of the rows each, and a look at one word of each CTA (32 bytes of L2)
// beside; what it has read comes out of shared memory once more.
double grid_us_per_step(const CudaProblem& p, const GridPlan& plan) {
  const CostModel& m = kCostModel;
  const int64_t columns = kTileRows * plan.tiles, passes = ceil_div(plan.rows, columns);
  // Tensor cores multiply whole tiles; plain multiply-adds leave out rows that there are not.
  const bool exact = is_exact_f32(p);
  const int64_t rows = exact ? std::min<int64_t>(columns, plan.rows) : columns;
  const double bytes = double(rows) * message_bytes(p);
  const double share = plan.pairs ? 0.5 * (1 + 2.0 / double(columns)) : 1;  // that a CTA reads
  const double load = std::max({bytes / m.l2_one_sm,
                                share * bytes * p.concurrent * plan.ctas * plan.groups / m.l2_all,
                                plan.pairs ? m.us(bytes / m.shared_bytes) : 0});
  const int n = exchanges(p);
  const int64_t sums = kGridUnits * columns * (p.pass == Pass::forward ? p.gates() : 1);
  // Shared memory holds weights of the widest layers only; each pass reads them again.
  const double weights = m.us(double(grid_shared_weights(p, plan)) / m.shared_bytes);
  double product = 0;
  if (exact && p.pass == Pass::forward) {
    // All rows have to be there, and are multiplied a few at a time.
    product = load + product_us(p, kGridUnits, rows, kGridWarps) +
              weights * double(ceil_div(rows, kGridFmaRows));
  } else {
    const int64_t computed = !exact || rows <= 2 ? rows : rows <= 4 ? 4 : 8;
    product = std::max(load, product_us(p, kGridUnits, computed, kGridWarps)) + weights;
  }
  const double pass =
      product + tail_us(p, kGridUnits, columns, sums) + (n - 1) * m.us(m.tail_cycles);
  const double hop = m.payload_hop_us + (plan.pairs ? m.pair_hop_us : 0);
  return std::max({n * hop + pass, double(passes) * pass, memory_us(p)});
}

int64_t grid_workspace(const CudaProblem& p) {
  const bool resets_first = p.cell == Cell::gru_before && p.pass == Pass::forward;
  return kAbortBytes + (resets_first ? p.rows * p.hidden * size_of(p.dtype) : 0);  // r * h
}

const char* pairs_obstacle(const CudaProblem& p, const DeviceLimits& device) {
  if (p.pass == Pass::backward) return "pairs gather in the forward pass only";
  if (!is_16_bit(p.dtype)) return "pairs are for bfloat16 and float16";
  if (device.compute_capability != 90) return "pairs are compiled for compute capability 9.0";
  return nullptr;
}

Forecast grid(const CudaProblem& p, const DeviceLimits& device, bool pairs, GridPlan* best) {
  if (const char* obstacle = persistent_obstacle(p)) return unable(obstacle);
  const char* const no_pairs = pairs ? pairs_obstacle(p, device) : nullptr;
  if (no_pairs != nullptr) return unable(no_pairs);
  if (!device.cooperative) return unable("the device refuses cooperative launches");
  int fragments = grid_forward_fragments(arithmetic_of(p), p.hidden);
  if (fragments == 0) {
    return unable(is_16_bit(p.dtype) ? "the hidden size is above 2048"
                                     : "the hidden size is above 1024");
  }
  if (pairs) fragments = std::max(fragments, kGridPairFragments);
  const int64_t ctas = round_up(ceil_div(p.hidden, kGridUnits), pairs ? 2 : 1);
  // Pairs on all SMs but an odd one: groups of SMs that share a crossbar are even (quoted, H100: 66
  // pairs on 132 SMs). Where they are not, the launcher finds out, and grid_pairs is off.
  if (ctas > device.sms) return unable("it needs more SMs than the device has");

  Forecast forecast = unable("it needs more shared memory than the device has");
  const int64_t step = is_exact_f32(p) ? 1 : kTileRows;  // of a group's number of rows
  const int64_t most_groups = std::min(device.sms / ctas, ceil_div(p.batch, step));
  const int most_tiles = p.pass == Pass::forward ? grid_forward_most_tiles(fragments)
                                                 : grid_backward_most_tiles(arithmetic_of(p));
  for (int64_t groups = 1; groups <= most_groups; ++groups) {
    const int64_t rows = round_up(ceil_div(p.batch, groups), step);
    if (ceil_div(p.batch, rows) != groups) continue;  // fewer groups hold as many rows each
    // Of pairs each number of fragments has one kernel.
    for (int tiles = pairs ? most_tiles : 1; tiles <= most_tiles; ++tiles) {
      GridPlan plan{fragments, tiles, int(ctas), int(groups), int(rows), grid_workspace(p), pairs};
      if (grid_shared_bytes(p, plan) > int64_t(device.shared_per_block)) continue;
      const double us = grid_us_per_step(p, plan);
      if (forecast.able && us >= forecast.us_per_step) continue;
      // Filling, clearing the abort word, the kernel, kernels/finish.cuh.
      forecast = {true, "", us, persistent_us_per_call(p, 4, groups)};
      *best = plan;
    }
  }
  return forecast;
}

// --- block and cluster

// Clusters of `ctas` CTAs that run side by side. A cluster lies within a group of SMs that shares
// their crossbar, and groups are not multiples of it (quoted, H100: 66 of 2, 30 of 4, 15 of 8).
int64_t resident_clusters(const DeviceLimits& device, int ctas) {
  return std::max<int64_t>(1, ctas <= 2 ? device.sms / ctas : device.sms * 10 / (11 * ctas));
}

// Exact float32 products are those of the rows that there are, a few at a time; for the next ones
// weights in shared memory are read again.
double cluster_us_per_step(const CudaProblem& p, const ClusterPlan& plan, int64_t shared_bytes,
                           int64_t resident) {
  const CostModel& m = kCostModel;
  const int n = plan.ctas, hops = exchanges(p);
  // Forward hands over h (and r * h), backward float32 parts of dh.
  const double bytes = hops * double(p.hidden) * (p.pass == Pass::forward ? size_of(p.dtype) : 4);
  const double sent = plan.rows * bytes * (n - 1) / n;
  const double hop =
      n == 1 ? hops * m.block_hop_us : hops * m.cluster_hop_us + sent / m.cluster_one_sm;
  const int64_t units = ceil_div(p.hidden, n);
  const int64_t rows = is_exact_f32(p) ? std::min<int64_t>(plan.rows, p.batch) : plan.rows;
  const int64_t passes = is_exact_f32(p) ? ceil_div(rows, cluster_fma_rows(p.cell, p.hidden)) : 1;
  const double step = hop + product_us(p, units, rows, 1) +
                      m.us(double(passes * shared_bytes) / m.shared_bytes) +
                      tail_us(p, units, plan.rows, /*sums=*/0) + (hops - 1) * m.us(m.tail_cycles);
  return std::max(double(ceil_div(plan.clusters, resident)) * step, memory_us(p));
}

Forecast clusters(const CudaProblem& p, const DeviceLimits& device,
                  std::initializer_list<int> sizes, ClusterPlan* best) {
  if (const char* obstacle = persistent_obstacle(p)) return unable(obstacle);
  Forecast forecast = unable("the hidden size is above what it holds");
  const auto consider = [&](int ctas, ClusterProduct product) {
    const bool tf32 = product == ClusterProduct::tensor_cores_tf32;
    const ClusterPlan plan{ctas, int(ceil_div(p.batch, kClusterPlanRows)), kClusterPlanRows,
                           kAbortBytes, tf32};
    int64_t shared = 0;
    if (!cluster_fits(p.cell, p.pass, product, p.hidden, ctas, plan.rows, &shared)) return;
    if (!forecast.able && shared > int64_t(device.shared_per_block))
      forecast.obstacle = "it needs more shared memory than the device has";
    if (shared > int64_t(device.shared_per_block) || ctas > device.sms) return;
    const int64_t resident = resident_clusters(device, ctas);
    CudaProblem as_computed = p;
    as_computed.allow_tf32 = tf32;
    const double us = cluster_us_per_step(as_computed, plan, shared, resident);
    if (forecast.able && us >= forecast.us_per_step) return;
    const int64_t copies = std::min<int64_t>(plan.clusters, resident);
    forecast = {true, "", us, persistent_us_per_call(p, ctas == 1 ? 1 : 3, copies)};
    *best = plan;
  };
  for (const int ctas : sizes) {
    if (is_16_bit(p.dtype)) consider(ctas, ClusterProduct::tensor_cores_16);
    if (is_tf32(p)) consider(ctas, ClusterProduct::tensor_cores_tf32);
    if (p.dtype == DType::f32) consider(ctas, ClusterProduct::multiply_adds);
  }
  return forecast;
}

Forecast block(const CudaProblem& p, const DeviceLimits& device, ClusterPlan* best) {
  return clusters(p, device, {1}, best);
}

Forecast cluster(const CudaProblem& p, const DeviceLimits& device, ClusterPlan* best) {
  if (device.compute_capability < 90) return unable("clusters need compute capability 9.0");
  // More than 8 are beyond what CUDA promises; the GPUs of data centres have them.
  if (device.compute_capability >= 120) return clusters(p, device, {2, 4, 8}, best);
  return clusters(p, device, {2, 4, 8, 16}, best);
}

// Whether pairs are better than what was chosen, within `limit` us; than the other grid kernels by
// as much as the model may be off.
bool prefers_pairs(const CudaChoice& choice, int64_t steps, double limit) {
  const Forecast& pairs = choice.of(CudaTier::grid_pairs);
  const double margin = choice.tier == CudaTier::grid ? kCostModel.required_share : 1;
  return pairs.able && pairs.us(steps) < margin * limit;
}

const char* const kOff = "it is off since it failed on this device";

}  // namespace

int64_t with_bias_partials(const CudaProblem& problem, int64_t tier_bytes, int64_t rows) {
  if (problem.pass == Pass::forward) return tier_bytes;
  const int64_t arithmetic = problem.dtype == DType::f64 ? 8 : 4;
  return bias_partials_offset(tier_bytes) + rows * problem.bias_columns() * arithmetic;
}

CudaChoice choose(const CudaProblem& problem, const DeviceLimits& device, CudaTier wanted) {
  if (wanted == CudaTier::grid_pairs && problem.pass == Pass::backward) wanted = CudaTier::grid;
  CudaChoice choice;
  ClusterPlan block_plan, cluster_plan;
  GridPlan grid_plan, pairs_plan;
  DeviceLimits share = device;
  share.sms = std::max(1, device.sms / problem.concurrent);
  auto forecast = [&](CudaTier tier) -> Forecast& { return choice.forecasts[int(tier)]; };
  forecast(CudaTier::stepwise) = stepwise(problem, device);
  forecast(CudaTier::block) = block(problem, share, &block_plan);
  forecast(CudaTier::cluster) = cluster(problem, share, &cluster_plan);
  forecast(CudaTier::grid) = grid(problem, share, /*pairs=*/false, &grid_plan);
  forecast(CudaTier::grid_pairs) = grid(problem, share, /*pairs=*/true, &pairs_plan);
  for (const CudaTier tier : kTiers) {
    if (tier == CudaTier::stepwise) continue;
    if (device.off[int(tier)]) forecast(tier) = unable(kOff);
    forecast(tier).us_per_replayed_step = forecast(tier).us_per_step;
  }

  if (wanted != CudaTier::automatic) {
    if (forecast(wanted).able) choice.tier = wanted;
  } else {
    choice.tier = CudaTier::stepwise;
    double limit = kCostModel.required_share * forecast(CudaTier::stepwise).us(problem.steps);
    for (const CudaTier tier : {CudaTier::block, CudaTier::cluster, CudaTier::grid}) {
      if (!forecast(tier).able || forecast(tier).us(problem.steps) >= limit) continue;
      limit = forecast(tier).us(problem.steps);
      choice.tier = tier;
    }
    if (prefers_pairs(choice, problem.steps, limit)) choice.tier = CudaTier::grid_pairs;
  }
  choice.cluster = choice.tier == CudaTier::block ? block_plan : cluster_plan;
  choice.grid = choice.tier == CudaTier::grid_pairs ? pairs_plan : grid_plan;

  // A tier may be switched off, and another take its place, between planning and running.
  const struct {
    CudaTier tier;
    int64_t bytes;
    int groups;
  } persistent[] = {{CudaTier::block, block_plan.workspace, block_plan.clusters},
                    {CudaTier::cluster, cluster_plan.workspace, cluster_plan.clusters},
                    {CudaTier::grid, grid_plan.workspace, grid_plan.groups},
                    {CudaTier::grid_pairs, pairs_plan.workspace, pairs_plan.groups}};
  for (const auto& one : persistent) {
    if (!forecast(one.tier).able || (wanted != CudaTier::automatic && wanted != one.tier)) continue;
    choice.workspace =
        std::max(choice.workspace, with_bias_partials(problem, one.bytes, one.groups));
  }
  return choice;
}

Directions choose_directions(const CudaProblem& forward, bool trains, bool replayed,
                             const DeviceLimits& limits, CudaTier wanted) {
  Directions directions;
  bool able = true;
  CudaProblem problem = forward;
  const auto us = [&](int concurrent) {
    problem.concurrent = concurrent;
    const CudaChoice choice = choose(problem, limits, wanted);
    if (choice.tier == CudaTier::automatic) able = false;
    const Forecast& forecast = choice.of(choice.tier);
    return forecast.us_per_call + double(problem.steps) * (replayed ? forecast.us_per_replayed_step
                                                                    : forecast.us_per_step);
  };
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    if (pass == Pass::backward && !trains) break;
    problem.pass = pass;
    directions.us_in_turn += 2 * us(1);
    directions.us_side_by_side += us(2) + (replayed ? 0 : kCostModel.side_by_side_us);
  }
  if (!able) directions.us_side_by_side = 0;
  directions.side_by_side = able && directions.us_side_by_side <= directions.us_in_turn;
  return directions;
}

const char* tier_name(CudaTier tier) {
  switch (tier) {
    case CudaTier::automatic:
      return "auto";
    case CudaTier::stepwise:
      return "stepwise";
    case CudaTier::block:
      return "block";
    case CudaTier::cluster:
      return "cluster";
    case CudaTier::grid:
      return "grid";
    case CudaTier::grid_pairs:
      return "grid-pairs";
  }
  return "";
}

std::string describe(const CudaChoice& choice) {
  const auto count = [](int n, const char* what) {
    return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
  };
  const std::string name = tier_name(choice.tier);
  switch (choice.tier) {
    case CudaTier::automatic:
      return {};
    case CudaTier::stepwise:
      return name;
    case CudaTier::block:
      return name + ", " + count(choice.cluster.clusters, "CTA") + ", " +
             count(choice.cluster.rows, "row") + " each";
    case CudaTier::cluster:
      return name + ", " + count(choice.cluster.clusters, "cluster") + " of " +
             count(choice.cluster.ctas, "CTA") + ", " + count(choice.cluster.rows, "row") + " each";
    case CudaTier::grid:
    case CudaTier::grid_pairs:
      return name + ", " + count(choice.grid.groups, "group") + " of " +
             count(choice.grid.ctas, "CTA") + ", " + count(choice.grid.rows, "row") + " each";
  }
  return {};
}

}  // namespace rnnlm
