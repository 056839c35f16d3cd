// The grid tier's backward pass: parameters, the fill that the exchange starts from, and which
// kernel to launch.
#include "launch/grid_backward.h"

#include "launch/tiers.h"

namespace rnnlm {
namespace {

Status no_such_kernel() {
  return Status::unsupported(
      "the grid tier's backward kernels are for bfloat16, float16 and float32",
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
  p.bias_partials = static_cast<Arithmetic<T>*>(call.bias_partials);
  p.abort_word = static_cast<uint32_t*>(call.workspace);
  p.limit = wait_limit();
  return p;
}

// Nothing has arrived yet in a tensor of the gradients of `units` units of every row.
template <class T, class Layer>
Status fill_not_yet(T* tensor, int64_t units, const Layer& layer, const CudaCall& call) {
  const std::size_t values = static_cast<std::size_t>(total_rows(layer.seq) * units);
  return fill_bytes(tensor, kNotYetByte, values * sizeof(T), call.stream);
}

template <class Product>
Status lstm(const LstmBackward& layer, const CudaCall& call, const GridPlan& plan) {
  using T = typename Product::Element;
  GridBackwardParams<T> p = common_params<T>(layer, call, plan);
  p.grad_c_n = static_cast<const T*>(layer.grad_c_n);
  p.grad_cells = static_cast<const float*>(layer.grad_cells);
  p.initial = static_cast<const T*>(layer.c0);
  p.cells = static_cast<const float*>(layer.cells);
  p.dc0 = static_cast<T*>(layer.dc0);
  const Status filled = fill_not_yet(p.dgates, 4 * layer.hidden, layer, call);
  if (!filled.is_ok()) return filled;
  return launch_grid_backward<LstmGridBackward, Product>(p, call, plan);
}

template <class Product>
Status gru(const GruBackward& layer, const CudaCall& call, const GridPlan& plan) {
  using T = typename Product::Element;
  GridBackwardParams<T> p = common_params<T>(layer, call, plan);
  p.initial = static_cast<const T*>(layer.h0);
  p.output = static_cast<const T*>(layer.output);
  p.candidate = static_cast<T*>(layer.candidate);
  const Status filled = fill_not_yet(p.dgates, 3 * layer.hidden, layer, call);
  if (!filled.is_ok()) return filled;
  if (layer.reset_before)
    return launch_grid_backward<GruBeforeGridBackward, Product>(p, call, plan);
  const Status also = fill_not_yet(p.candidate, layer.hidden, layer, call);
  if (!also.is_ok()) return also;
  return launch_grid_backward<GruAfterGridBackward, Product>(p, call, plan);
}

}  // namespace

Status grid_lstm_backward(const LstmBackward& layer, const CudaCall& call, const GridPlan& plan) {
  switch (layer.dtype) {
    case DType::bf16:
      return lstm<TensorCore16<Bf16>>(layer, call, plan);
    case DType::f16:
      return lstm<TensorCore16<F16>>(layer, call, plan);
    case DType::f32:
      return call.allow_tf32 ? lstm<HeldTf32>(layer, call, plan)
                             : lstm<GridBackwardFma>(layer, call, plan);
    case DType::f64:
      break;
  }
  return no_such_kernel();
}

Status grid_gru_backward(const GruBackward& layer, const CudaCall& call, const GridPlan& plan) {
  switch (layer.dtype) {
    case DType::bf16:
      return gru<TensorCore16<Bf16>>(layer, call, plan);
    case DType::f16:
      return gru<TensorCore16<F16>>(layer, call, plan);
    case DType::f32:
      return call.allow_tf32 ? gru<HeldTf32>(layer, call, plan)
                             : gru<GridBackwardFma>(layer, call, plan);
    case DType::f64:
      break;
  }
  return no_such_kernel();
}

}  // namespace rnnlm
