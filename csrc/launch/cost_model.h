// What a step costs in each tier, in microseconds: the model that chooses between tiers and between
// the layouts of one.
//
// No number here has been measured by this project. "quoted" constants were measured by others, on
// an H100 unless said otherwise; "derived" ones follow from such and from the PTX that the kernels
// use. What scripts/gpu_check.sh measures on a device is to replace them. The model is used for all
// GPUs alike: what it has to get right is which tier is faster, not by how much.
#pragma once

namespace rnnlm {

struct CostModel {
  double cycles_per_us = 1850;  // quoted: boost clock under load

  // Handing over the state of a step, first store to last CTA's load, beside the bytes.
  double payload_hop_us = 0.40;  // derived: a release-flag hop (0.56, quoted) without its MEMBAR
  double cluster_hop_us = 0.20;  // derived: DSMEM latency of 200 cycles (quoted) and a wake-up
  // What a pair adds to the first: the copy is started when the look at its words has come back,
  // and has to come back itself; two latencies of L2 less what the plain load waits for.
  double pair_hop_us = 0.25;   // derived, as an assumption: nobody has measured it
  double block_hop_us = 0.05;  // derived: two CTA barriers and a round through shared memory

  // Bytes per microsecond.
  double l2_all = 5.5e6;           // quoted: all SMs reading together
  double l2_one_sm = 100e3;        // derived: 64 bytes a clock (quoted), less what never arrives
  double cluster_one_sm = 25e3;    // derived: DSMEM traffic of an SM, all its peers at once
  double weights_from_l2 = 4.5e6;  // quoted: a GEMM streaming weights that fit L2 ...
  double weights_from_memory = 3.5e6;  // ... and weights that do not
  double l2_capacity = 45e6;           // bytes of weights that stay in L2 from step to step
  double memory = 4.3e6;               // quoted, H200: gates, states and saved tensors

  // Arithmetic of an SM, per clock.
  double tensor_flops = 2680;  // quoted: mma.sync m16n8k16, the instruction's own ceiling
  double mma_cycles = 25;      // quoted: latency of one, hence the pace of a chain of them
  double fma_flops = 200;  // derived: float32 exactly; 256 (quoted), less loads that it waits for
  double shared_bytes = 128;  // quoted: weights that are read from shared memory every step

  // A step's work between product and next product, cycles (derived): a barrier, the sums of the
  // warps, the gates' chain of special functions; then per gate, and per sum of several warps.
  double tail_cycles = 45 + 100 + 120;
  double gate_cycles = 14.0 / 128;
  double sum_cycles = 16.0 / 128;

  // Launches.
  double host_launch_us = 2.2;      // quoted: what the CPU needs to enqueue one
  double launch_ramp_us = 1.3;      // quoted: one launch of a graph that depends on another
  double overlapped_ramp_us = 0.8;  // derived: where it may start early, its first loads are hidden
  double side_by_side_us = 20;  // derived: events, change of streams, record_stream of ~20 tensors

  // A stepwise launch: gates and stores, and floating-point operations per microsecond of products
  // of this shape.
  double step_tail_us = 0.3;     // derived, as all of these: a third to a half of the peaks
  double step_flops_16 = 350e6;  // bfloat16 and float16
  double step_flops_tf32 = 180e6;
  double step_flops_f32 = 40e6;
  double step_flops_f64 = 20e6;

  // A persistent tier must promise to need less than this share of the stepwise time. The model
  // may be off by that much, and the stepwise tier is the one that cannot go wrong.
  double required_share = 0.8;

  double us(double cycles) const { return cycles / cycles_per_us; }
};

constexpr CostModel kCostModel;

}  // namespace rnnlm
