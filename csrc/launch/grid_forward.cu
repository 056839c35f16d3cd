// The grid tier's forward pass: parameters, the fill that the exchange starts from, and which
// kernel to launch.
#include "launch/grid_forward.h"

#include "launch/tiers.h"

namespace rnnlm {
namespace {

Status no_such_kernel() {
  return Status::unsupported(
      "the grid tier's forward kernels are for bfloat16, float16 and float32",
      "RNNLM_CUDA_TIER=stepwise runs any dtype");
}

// What LSTM and GRU name alike.
template <class T, class Layer>
GridForwardParams<T> common_params(const Layer& layer, const CudaCall& call, const GridPlan& plan) {
  GridForwardParams<T> p{};
  const Sequence& seq = layer.seq;
  p.seq = {static_cast<int>(seq.steps), static_cast<int>(seq.batch), seq.reverse,
           seq.batch_sizes == nullptr ? nullptr : call.offsets};
  p.hidden = static_cast<int>(layer.hidden);
  p.group_rows = plan.rows;
  p.gates_x = static_cast<const T*>(layer.gates_x);
  p.w_hh = static_cast<const T*>(layer.w_hh);
  p.b_hh = static_cast<const T*>(layer.b_hh);
  p.h0 = static_cast<const T*>(layer.h0);
  p.output = static_cast<T*>(layer.output);
  p.h_n = static_cast<T*>(layer.h_n);
  p.saved = static_cast<T*>(layer.saved);
  p.abort_word = static_cast<uint32_t*>(call.workspace);
  p.wait_limit = wait_limit();
  return p;
}

// Nothing has arrived yet in a [total_rows, hidden] tensor.
template <class T, class Layer>
Status fill_not_yet(T* tensor, const Layer& layer, const CudaCall& call) {
  const std::size_t values = static_cast<std::size_t>(total_rows(layer.seq) * layer.hidden);
  return fill_bytes(tensor, kNotYetByte, values * sizeof(T), call.stream);
}

template <class Product>
Status lstm(const LstmForward& layer, const CudaCall& call, const GridPlan& plan) {
  using T = typename Product::Element;
  GridForwardParams<T> p = common_params<T>(layer, call, plan);
  p.c0 = static_cast<const T*>(layer.c0);
  p.c_n = static_cast<T*>(layer.c_n);
  p.cells = static_cast<float*>(layer.cells);
  const Status filled = fill_not_yet(p.output, layer, call);
  if (!filled.is_ok()) return filled;
  return launch_grid_forward<LstmCell, Product>(p, call, plan);
}

template <class Product>
Status gru(const GruForward& layer, const CudaCall& call, const GridPlan& plan) {
  using T = typename Product::Element;
  GridForwardParams<T> p = common_params<T>(layer, call, plan);
  const Status filled = fill_not_yet(p.output, layer, call);
  if (!filled.is_ok()) return filled;
  if (!layer.reset_before) return launch_grid_forward<GruAfterCell, Product>(p, call, plan);
  p.reset_h = reinterpret_cast<T*>(static_cast<char*>(call.workspace) + kAbortBytes);
  const Status reset_filled = fill_not_yet(p.reset_h, layer, call);
  if (!reset_filled.is_ok()) return reset_filled;
  return launch_grid_forward<GruBeforeCell, Product>(p, call, plan);
}

}  // namespace

Status grid_lstm_forward(const LstmForward& layer, const CudaCall& call, const GridPlan& plan) {
  switch (layer.dtype) {
    case DType::bf16:
      return lstm<TensorCore16<Bf16>>(layer, call, plan);
    case DType::f16:
      return lstm<TensorCore16<F16>>(layer, call, plan);
    case DType::f32:
      return call.allow_tf32 ? lstm<HeldTf32>(layer, call, plan) : lstm<GridFma>(layer, call, plan);
    case DType::f64:
      break;
  }
  return no_such_kernel();
}

Status grid_gru_forward(const GruForward& layer, const CudaCall& call, const GridPlan& plan) {
  switch (layer.dtype) {
    case DType::bf16:
      return gru<TensorCore16<Bf16>>(layer, call, plan);
    case DType::f16:
      return gru<TensorCore16<F16>>(layer, call, plan);
    case DType::f32:
      return call.allow_tf32 ? gru<HeldTf32>(layer, call, plan) : gru<GridFma>(layer, call, plan);
    case DType::f64:
      break;
  }
  return no_such_kernel();
}

}  // namespace rnnlm
