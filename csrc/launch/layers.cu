#include "launch/layers.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "kernels/finish.cuh"
#include "launch/bias_grad.h"
#include "launch/guard.h"
#include "launch/tiers.h"

namespace rnnlm {
namespace {

constexpr std::uintptr_t kWorkspaceAlignment = 256;
constexpr std::uintptr_t kVector = 16;  // bytes that the persistent tiers load and store at once

// A tensor of the call, and whether the call cannot do without it.
struct Tensor {
  const void* p;
  const char* name;
  bool needed = true;
};
constexpr bool kOptional = false;

// A tensor that the call writes: `values` of the layer's dtype.
struct Written {
  void* p;
  int64_t values;
  DType dtype;
};

template <class Layer>
struct Tiers {
  Status (*stepwise)(const Layer&, const CudaCall&);
  Status (*cluster)(const Layer&, const CudaCall&, const ClusterPlan&);
  Status (*grid)(const Layer&, const CudaCall&, const GridPlan&);
};

int64_t words_of_16_bits(DType dtype) {
  return dtype == DType::f64 ? 4 : dtype == DType::f32 ? 2 : 1;
}
DType arithmetic(DType dtype) {
  return dtype == DType::f64 ? DType::f64 : DType::f32;
}

Status check_sizes(const CudaProblem& problem) {
  const struct {
    int64_t value;
    const char* name;
  } sizes[] = {{problem.steps, "steps"},
               {problem.batch, "batch"},
               {problem.hidden, "hidden"},
               {problem.concurrent, "concurrent"}};
  for (const auto& size : sizes) {
    if (size.value < 1 || size.value > std::numeric_limits<int>::max())
      return Status::invalid_argument(std::string(size.name) + " is " + std::to_string(size.value),
                                      "Pass a number from 1 to 2^31 - 1");
  }
  return Status::ok();
}

Status check_pointers(std::initializer_list<Tensor> tensors) {
  for (const Tensor& one : tensors) {
    if (one.p == nullptr && one.needed)
      return Status::invalid_argument(std::string(one.name) + " is a null pointer",
                                      "Pass the data_ptr() of a tensor on the device");
  }
  return Status::ok();
}

// Name of a tensor that does not start on a whole vector; null if all do.
const char* unaligned(std::initializer_list<Tensor> tensors) {
  for (const Tensor& one : tensors) {
    if (reinterpret_cast<std::uintptr_t>(one.p) % kVector != 0) return one.name;
  }
  return nullptr;
}

Status check_workspace(const CudaCall& call, int64_t needed) {
  if (call.workspace_bytes < needed || (needed > 0 && call.workspace == nullptr))
    return Status::invalid_argument("the workspace has " + std::to_string(call.workspace_bytes) +
                                        " bytes and the call needs " + std::to_string(needed),
                                    "Allocate what cuda_needs says");
  if (reinterpret_cast<std::uintptr_t>(call.workspace) % kWorkspaceAlignment != 0)
    return Status::invalid_argument("the workspace is not aligned to 256 bytes",
                                    "Pass the start of an allocation of the device's allocator");
  return Status::ok();
}

Status launch_finish(const CudaCall& call, CudaTier tier, std::initializer_list<Written> outputs) {
  FinishParams params{};
  const Status status = failure_place(call.device, &params.failure);
  if (!status.is_ok()) return status;
  params.abort_word = static_cast<const uint32_t*>(call.workspace);
  params.failure_tier = failure_word(tier, 0);
  int count = 0;
  for (const Written& one : outputs) {
    if (one.p == nullptr) continue;
    params.outputs[count++] = {static_cast<uint16_t*>(one.p),
                               one.values * words_of_16_bits(one.dtype)};
  }
  LaunchShape shape;
  shape.grid_x = FinishTraits::kCtas;
  shape.threads = FinishTraits::kThreads;
  return launch("launching the check of a persistent call", &finish_kernel<FinishTraits>, shape,
                call.stream, params);
}

// The tier for a problem on a device, and the workspace for it and for what may take its place.
Status choose_on(const CudaProblem& problem, int device, CudaTier wanted, CudaChoice* choice) {
  DeviceLimits limits;
  const Status status = known_limits(device, &limits);
  if (!status.is_ok()) return status;
  *choice = choose(problem, limits, wanted);
  if (choice->tier == CudaTier::automatic)
    return Status::unsupported(std::string("the ") + tier_name(wanted) +
                                   " tier cannot run this layer: " + choice->of(wanted).obstacle,
                               "RNNLM_CUDA_TIER=auto takes one that can");
  if (wanted == CudaTier::automatic || wanted == CudaTier::stepwise) {
    choice->workspace = std::max(
        choice->workspace,
        with_bias_partials(problem, stepwise_workspace(problem), stepwise_bias_rows(problem)));
  }
  return Status::ok();
}

// The call of a tier that itself uses `tier_bytes` of the workspace.
CudaCall with_partials(const CudaCall& call, const BiasGrad& bias, int64_t tier_bytes) {
  CudaCall tiers = call;
  tiers.bias_partials = bias.db == nullptr
                            ? nullptr
                            : static_cast<char*>(call.workspace) + bias_partials_offset(tier_bytes);
  return tiers;
}

template <class Layer>
Status run_persistent(const CudaProblem& problem, const Layer& layer, const CudaCall& whole,
                      const CudaChoice& choice, const Tiers<Layer>& tiers,
                      std::initializer_list<Written> outputs, const BiasGrad& bias) {
  const bool on_grid = is_grid(choice.tier);
  const CudaCall call =
      with_partials(whole, bias, on_grid ? choice.grid.workspace : choice.cluster.workspace);
  // A CTA on its own waits for nobody.
  const bool waits = choice.tier != CudaTier::block;
  Status status;
  if (waits) status = fill_bytes(call.workspace, 0, kAbortBytes, call.stream);
  if (status.is_ok()) {
    status =
        on_grid ? tiers.grid(layer, call, choice.grid) : tiers.cluster(layer, call, choice.cluster);
  }
  if (status.is_ok() && bias.db != nullptr) {
    status =
        sum_partials(problem, bias, on_grid ? choice.grid.groups : choice.cluster.clusters, call);
  }
  if (status.is_ok() && waits) status = launch_finish(call, choice.tier, outputs);
  return status;
}

template <class Layer>
Status run_stepwise(const CudaProblem& problem, const Layer& layer, const CudaCall& whole,
                    const Tiers<Layer>& tiers, const BiasGrad& bias) {
  Status status = tiers.stepwise(layer, whole);
  if (!status.is_ok() || bias.db == nullptr) return status;
  const CudaCall call = with_partials(whole, bias, stepwise_workspace(problem));
  status = sum_gradients(problem, bias, call);
  if (status.is_ok()) status = sum_partials(problem, bias, stepwise_bias_rows(problem), call);
  return status;
}

template <class Layer>
Status run(const CudaProblem& problem, const Layer& layer, const CudaCall& call,
           const Tiers<Layer>& tiers, std::initializer_list<Tensor> tensors,
           std::initializer_list<Written> outputs, const BiasGrad& bias, CudaTier* ran) {
  Status status = check_sizes(problem);
  if (status.is_ok()) status = check_pointers(tensors);
  if (!status.is_ok()) return status;
  const std::string failure = take_failure(call.device);
  if (!failure.empty())
    return Status::device_error(failure,
                                "This call did nothing: repeat it and the failed one, which now "
                                "run in another tier. RNNLM_CUDA_TIER=stepwise avoids the tiers "
                                "that wait");

  // What only stepwise launches can do with: a packed sequence known from the host's batch_sizes
  // alone, and tensors that begin anywhere.
  const char* const crooked = unaligned(tensors);
  const bool without_offsets = problem.packed && call.offsets == nullptr;
  CudaTier wanted = call.tier;
  if (wanted == CudaTier::automatic && (crooked != nullptr || without_offsets))
    wanted = CudaTier::stepwise;
  CudaChoice choice;
  status = choose_on(problem, call.device, wanted, &choice);
  if (!status.is_ok()) return status;
  if (choice.tier != CudaTier::stepwise && crooked != nullptr)
    return Status::invalid_argument(std::string(crooked) + " is not aligned to 16 bytes",
                                    "Pass a clone() of it, or let RNNLM_CUDA_TIER=auto choose");
  if (choice.tier != CudaTier::stepwise && without_offsets)
    return Status::invalid_argument("offsets is a null pointer for a packed sequence",
                                    "Pass the first row of each step, or take the stepwise tier");
  status = check_workspace(call, choice.workspace);
  if (!status.is_ok()) return status;

  const DeviceGuard guard(call.device);
  if (!guard.status().is_ok()) return guard.status();
  if (choice.tier != CudaTier::stepwise) {
    if (ran != nullptr) *ran = choice.tier;
    status = run_persistent(problem, layer, call, choice, tiers, outputs, bias);
    if (status.code != StatusCode::kUnsupported || call.tier != CudaTier::automatic) return status;
    switch_off(call.device, choice.tier, status.cause);
  }
  if (ran != nullptr) *ran = CudaTier::stepwise;
  return run_stepwise(problem, layer, call, tiers, bias);
}

template <class Layer>
CudaProblem problem_of(const Layer& layer, const CudaCall& call, Cell cell, Pass pass,
                       int64_t proj) {
  CudaProblem problem{};
  problem.cell = cell;
  problem.pass = pass;
  problem.dtype = layer.dtype;
  problem.steps = layer.seq.steps;
  problem.batch = layer.seq.batch;
  problem.hidden = layer.hidden;
  problem.proj = proj;
  problem.rows = total_rows(layer.seq);
  problem.packed = layer.seq.batch_sizes != nullptr;
  problem.allow_tf32 = call.allow_tf32;
  problem.concurrent = call.concurrent;
  return problem;
}

template <class Layer>
Cell gru_cell(const Layer& layer) {
  return layer.reset_before ? Cell::gru_before : Cell::gru_after;
}

}  // namespace

Status cuda_lstm_forward(const LstmForward& layer, const CudaCall& call, CudaTier* ran) {
  const CudaProblem problem = problem_of(layer, call, Cell::lstm, Pass::forward, layer.proj);
  const int64_t n = problem.rows, h = layer.hidden, state = layer.seq.batch * h;
  return run(problem, layer, call,
             Tiers<LstmForward>{stepwise_lstm_forward, cluster_lstm_forward, grid_lstm_forward},
             {{layer.gates_x, "gates_x"},
              {layer.w_hh, "w_hh"},
              {layer.b_hh, "b_hh", kOptional},
              {layer.w_hr, "w_hr", layer.proj > 0},
              {layer.h0, "h0"},
              {layer.c0, "c0"},
              {layer.output, "output"},
              {layer.h_n, "h_n"},
              {layer.c_n, "c_n"},
              {layer.cells, "cells", kOptional},
              {layer.saved, "saved", kOptional}},
             {{layer.output, n * h, layer.dtype},
              {layer.h_n, state, layer.dtype},
              {layer.c_n, state, layer.dtype},
              {layer.cells, n * h, arithmetic(layer.dtype)},
              {layer.saved, 4 * n * h, layer.dtype}},
             BiasGrad{}, ran);
}

Status cuda_lstm_backward(const LstmBackward& layer, const CudaCall& call, CudaTier* ran) {
  const CudaProblem problem = problem_of(layer, call, Cell::lstm, Pass::backward, layer.proj);
  const int64_t n = problem.rows, h = layer.hidden, state = layer.seq.batch * h;
  return run(problem, layer, call,
             Tiers<LstmBackward>{stepwise_lstm_backward, cluster_lstm_backward, grid_lstm_backward},
             {{layer.grad_output, "grad_output", kOptional},
              {layer.grad_h_n, "grad_h_n", kOptional},
              {layer.grad_c_n, "grad_c_n", kOptional},
              {layer.grad_cells, "grad_cells", kOptional},
              {layer.w_hh, "w_hh"},
              {layer.w_hr, "w_hr", layer.proj > 0},
              {layer.c0, "c0"},
              {layer.cells, "cells"},
              {layer.saved, "saved"},
              {layer.dgates, "dgates"},
              {layer.dh0, "dh0", layer.dc0 != nullptr},
              {layer.dc0, "dc0", layer.dh0 != nullptr},
              {layer.dproj, "dproj", layer.proj > 0},
              {layer.unprojected, "unprojected", layer.proj > 0}},
             {{layer.dgates, 4 * n * h, layer.dtype},
              {layer.db, problem.bias_columns(), layer.dtype},
              {layer.dh0, state, layer.dtype},
              {layer.dc0, state, layer.dtype}},
             BiasGrad{layer.db, layer.dgates, nullptr}, ran);
}

Status cuda_gru_forward(const GruForward& layer, const CudaCall& call, CudaTier* ran) {
  const CudaProblem problem = problem_of(layer, call, gru_cell(layer), Pass::forward, 0);
  const int64_t n = problem.rows, h = layer.hidden, state = layer.seq.batch * h;
  return run(problem, layer, call,
             Tiers<GruForward>{stepwise_gru_forward, cluster_gru_forward, grid_gru_forward},
             {{layer.gates_x, "gates_x"},
              {layer.w_hh, "w_hh"},
              {layer.b_hh, "b_hh", kOptional},
              {layer.h0, "h0"},
              {layer.output, "output"},
              {layer.h_n, "h_n"},
              {layer.saved, "saved", kOptional}},
             {{layer.output, n * h, layer.dtype},
              {layer.h_n, state, layer.dtype},
              {layer.saved, (layer.reset_before ? 3 : 4) * n * h, layer.dtype}},
             BiasGrad{}, ran);
}

Status cuda_gru_backward(const GruBackward& layer, const CudaCall& call, CudaTier* ran) {
  const CudaProblem problem = problem_of(layer, call, gru_cell(layer), Pass::backward, 0);
  const int64_t n = problem.rows, h = layer.hidden, state = layer.seq.batch * h;
  return run(problem, layer, call,
             Tiers<GruBackward>{stepwise_gru_backward, cluster_gru_backward, grid_gru_backward},
             {{layer.grad_output, "grad_output", kOptional},
              {layer.grad_h_n, "grad_h_n", kOptional},
              {layer.w_hh, "w_hh"},
              {layer.h0, "h0"},
              {layer.output, "output"},
              {layer.saved, "saved"},
              {layer.dgates, "dgates"},
              {layer.candidate, "candidate"},
              {layer.dh0, "dh0", kOptional}},
             {{layer.dgates, 3 * n * h, layer.dtype},
              {layer.candidate, n * h, layer.dtype},
              {layer.db, problem.bias_columns(), layer.dtype},
              {layer.dh0, state, layer.dtype}},
             BiasGrad{layer.db, layer.dgates, layer.reset_before ? nullptr : layer.candidate}, ran);
}

Status cuda_needs(const CudaProblem& problem, int device, CudaTier tier, CudaNeeds* needs) {
  Status status = check_sizes(problem);
  CudaChoice choice;
  if (status.is_ok()) status = choose_on(problem, device, tier, &choice);
  if (status.is_ok())
    *needs = {choice.workspace, problem.packed && choice.tier != CudaTier::stepwise};
  return status;
}

Status cuda_device_limits(int device, DeviceLimits* limits) {
  return known_limits(device, limits);
}

std::string cuda_why_off(int device, CudaTier tier) {
  return why_off(device, tier);
}

Status cuda_new_stream(int device, std::uintptr_t like, std::uintptr_t* stream) {
  const DeviceGuard guard(device);
  return guard.status().is_ok() ? new_stream(like, stream) : guard.status();
}

std::string cuda_take_failure(int device) {
  return take_failure(device);
}

void cuda_set_wait_limit(uint32_t polls, uint64_t nanoseconds) {
  set_wait_limit({polls, nanoseconds});
}

void cuda_forget_devices() {
  forget_devices();
}

}  // namespace rnnlm
