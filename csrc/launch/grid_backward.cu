// The grid tier's backward pass: parameters, the fill that the exchange starts from, and which
// kernel to launch.
#include "launch/grid_backward.h"

#include "launch/tiers.h"

namespace rnnlm {
namespace {

Status not_16_bits() {
  return Status::unsupported("the grid tier's backward kernels are for bfloat16 and float16",
                             "RNNLM_CUDA_TIER=stepwise runs any dtype");
}

// What LSTM and GRU name alike.
template <class T, class Layer>
GridBackwardParams<T> common_params(const Layer& layer, const CudaCall& call,
                                    const GridPlan& plan) {
  GridBackwardParams<T> p{};
  const Sequence& seq = layer.seq;
  p.seq = {static_cast<int>(seq.steps), static_cast<int>(seq.batch), seq.reverse,
           seq.batch_sizes == nullptr ? nullptr : call.offsets};
  p.hidden = static_cast<int>(layer.hidden);
  p.rows = plan.rows;
  p.grad_output = static_cast<const T*>(layer.grad_output);
  p.grad_h_n = static_cast<const T*>(layer.grad_h_n);
  p.w_hh = static_cast<const T*>(layer.w_hh);
  p.saved = static_cast<const T*>(layer.saved);
  p.dgates = static_cast<T*>(layer.dgates);
  p.dh0 = static_cast<T*>(layer.dh0);
  p.abort_word = static_cast<uint32_t*>(call.workspace);
  p.limit = wait_limit();
  return p;
}

template <class T>
Status lstm(const LstmBackward& layer, const CudaCall& call, const GridPlan& plan) {
  GridBackwardParams<T> p = common_params<T>(layer, call, plan);
  p.grad_c_n = static_cast<const T*>(layer.grad_c_n);
  p.grad_cells = static_cast<const float*>(layer.grad_cells);
  p.initial = static_cast<const T*>(layer.c0);
  p.cells = static_cast<const float*>(layer.cells);
  p.dc0 = static_cast<T*>(layer.dc0);
  return launch_grid_backward<LstmGridBackward, TensorCore16<T>>(p, call, plan);
}

template <class T>
Status gru(const GruBackward& layer, const CudaCall& call, const GridPlan& plan) {
  GridBackwardParams<T> p = common_params<T>(layer, call, plan);
  p.initial = static_cast<const T*>(layer.h0);
  p.output = static_cast<const T*>(layer.output);
  p.candidate = static_cast<T*>(layer.candidate);
  if (layer.reset_before)
    return launch_grid_backward<GruBeforeGridBackward, TensorCore16<T>>(p, call, plan);
  return launch_grid_backward<GruAfterGridBackward, TensorCore16<T>>(p, call, plan);
}

// Nothing has arrived in a tensor of so many 16-bit values.
Status fill_not_yet(void* p, int64_t values, const CudaCall& call) {
  return fill_bytes(p, kNotYetByte, static_cast<std::size_t>(2 * values), call.stream);
}

}  // namespace

Status grid_lstm_backward(const LstmBackward& layer, const CudaCall& call, const GridPlan& plan) {
  if (layer.dtype != DType::bf16 && layer.dtype != DType::f16) return not_16_bits();
  const int64_t values = total_rows(layer.seq) * layer.hidden;
  const Status filled = fill_not_yet(layer.dgates, 4 * values, call);
  if (!filled.is_ok()) return filled;
  return layer.dtype == DType::bf16 ? lstm<Bf16>(layer, call, plan) : lstm<F16>(layer, call, plan);
}

Status grid_gru_backward(const GruBackward& layer, const CudaCall& call, const GridPlan& plan) {
  if (layer.dtype != DType::bf16 && layer.dtype != DType::f16) return not_16_bits();
  const int64_t values = total_rows(layer.seq) * layer.hidden;
  const Status filled = fill_not_yet(layer.dgates, 3 * values, call);
  if (!filled.is_ok()) return filled;
  if (!layer.reset_before) {
    const Status also = fill_not_yet(layer.candidate, values, call);
    if (!also.is_ok()) return also;
  }
  return layer.dtype == DType::bf16 ? gru<Bf16>(layer, call, plan) : gru<F16>(layer, call, plan);
}

}  // namespace rnnlm
