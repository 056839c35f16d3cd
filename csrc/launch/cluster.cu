// The block and cluster tiers: parameters, and which kernel to launch.
#include "launch/cluster.h"

#include "launch/tiers.h"

namespace rnnlm {

namespace {

// What all params begin with.
template <class Params, class Layer>
Params params_of(const Layer& layer, const CudaCall& call) {
  Params p{};
  const Sequence& seq = layer.seq;
  p.seq = {static_cast<int>(seq.steps), static_cast<int>(seq.batch), seq.reverse,
           seq.batch_sizes == nullptr ? nullptr : call.offsets};
  p.hidden = static_cast<int>(layer.hidden);
  p.abort_word = static_cast<uint32_t*>(call.workspace);
  p.wait_limit = wait_limit();
  return p;
}

template <class Product, class T = typename Product::Element>
Status forward(const LstmForward& layer, const CudaCall& call, const ClusterPlan& plan) {
  auto p = params_of<ClusterForwardParams<T>>(layer, call);
  p.gates_x = static_cast<const T*>(layer.gates_x);
  p.w_hh = static_cast<const T*>(layer.w_hh);
  p.b_hh = static_cast<const T*>(layer.b_hh);
  p.h0 = static_cast<const T*>(layer.h0);
  p.c0 = static_cast<const T*>(layer.c0);
  p.output = static_cast<T*>(layer.output);
  p.h_n = static_cast<T*>(layer.h_n);
  p.c_n = static_cast<T*>(layer.c_n);
  p.cells = static_cast<float*>(layer.cells);
  p.saved = static_cast<T*>(layer.saved);
  return ClusterKernels<ClusterLstm, Product>::forward(p, call, plan);
}

template <class Product, class T = typename Product::Element>
Status forward(const GruForward& layer, const CudaCall& call, const ClusterPlan& plan) {
  auto p = params_of<ClusterForwardParams<T>>(layer, call);
  p.gates_x = static_cast<const T*>(layer.gates_x);
  p.w_hh = static_cast<const T*>(layer.w_hh);
  p.b_hh = static_cast<const T*>(layer.b_hh);
  p.h0 = static_cast<const T*>(layer.h0);
  p.output = static_cast<T*>(layer.output);
  p.h_n = static_cast<T*>(layer.h_n);
  p.saved = static_cast<T*>(layer.saved);
  if (layer.reset_before) return ClusterKernels<ClusterGruBefore, Product>::forward(p, call, plan);
  return ClusterKernels<ClusterGruAfter, Product>::forward(p, call, plan);
}

template <class Product, class T = typename Product::Element>
Status backward(const LstmBackward& layer, const CudaCall& call, const ClusterPlan& plan) {
  auto p = params_of<ClusterBackwardParams<T>>(layer, call);
  p.grad_output = static_cast<const T*>(layer.grad_output);
  p.grad_h_n = static_cast<const T*>(layer.grad_h_n);
  p.grad_c_n = static_cast<const T*>(layer.grad_c_n);
  p.grad_cells = static_cast<const float*>(layer.grad_cells);
  p.w_hh = static_cast<const T*>(layer.w_hh);
  p.initial = static_cast<const T*>(layer.c0);
  p.cells = static_cast<const float*>(layer.cells);
  p.saved = static_cast<const T*>(layer.saved);
  p.dgates = static_cast<T*>(layer.dgates);
  p.dh0 = static_cast<T*>(layer.dh0);
  p.dc0 = static_cast<T*>(layer.dc0);
  p.bias_partials = static_cast<float*>(call.bias_partials);
  return ClusterKernels<ClusterLstm, Product>::backward(p, call, plan);
}

template <class Product, class T = typename Product::Element>
Status backward(const GruBackward& layer, const CudaCall& call, const ClusterPlan& plan) {
  auto p = params_of<ClusterBackwardParams<T>>(layer, call);
  p.grad_output = static_cast<const T*>(layer.grad_output);
  p.grad_h_n = static_cast<const T*>(layer.grad_h_n);
  p.w_hh = static_cast<const T*>(layer.w_hh);
  p.initial = static_cast<const T*>(layer.h0);
  p.output = static_cast<const T*>(layer.output);
  p.saved = static_cast<const T*>(layer.saved);
  p.dgates = static_cast<T*>(layer.dgates);
  p.candidate = static_cast<T*>(layer.candidate);
  p.dh0 = static_cast<T*>(layer.dh0);
  p.bias_partials = static_cast<float*>(call.bias_partials);
  if (layer.reset_before) return ClusterKernels<ClusterGruBefore, Product>::backward(p, call, plan);
  return ClusterKernels<ClusterGruAfter, Product>::backward(p, call, plan);
}

// Status ok where there are kernels for the dtype and the device.
Status check(DType dtype, const CudaCall& call, const ClusterPlan& plan) {
  if (dtype == DType::f64)
    return Status::unsupported("the block and cluster tiers are for bfloat16, float16 and float32",
                               "RNNLM_CUDA_TIER=stepwise runs any dtype");
  if (plan.ctas == 1) return Status::ok();
  DeviceLimits device;
  const Status known = known_limits(call.device, &device);
  if (!known.is_ok()) return known;
  if (device.compute_capability < 90)
    return Status::unsupported("the cluster tier needs compute capability 9.0",
                               "RNNLM_CUDA_TIER=auto takes a tier that the device has");
  return Status::ok();
}

template <class Layer>
Status run_forward(const Layer& layer, const CudaCall& call, const ClusterPlan& plan) {
  const Status status = check(layer.dtype, call, plan);
  if (!status.is_ok()) return status;
  if (layer.dtype == DType::bf16) return forward<TensorCore16<Bf16>>(layer, call, plan);
  if (layer.dtype == DType::f16) return forward<TensorCore16<F16>>(layer, call, plan);
  return plan.tf32 ? forward<StoredTf32>(layer, call, plan)
                   : forward<ClusterFma>(layer, call, plan);
}
template <class Layer>
Status run_backward(const Layer& layer, const CudaCall& call, const ClusterPlan& plan) {
  const Status status = check(layer.dtype, call, plan);
  if (!status.is_ok()) return status;
  if (layer.dtype == DType::bf16) return backward<TensorCore16<Bf16>>(layer, call, plan);
  if (layer.dtype == DType::f16) return backward<TensorCore16<F16>>(layer, call, plan);
  return plan.tf32 ? backward<StoredTf32>(layer, call, plan)
                   : backward<ClusterFma>(layer, call, plan);
}

}  // namespace

Status cluster_lstm_forward(const LstmForward& layer, const CudaCall& call,
                            const ClusterPlan& plan) {
  return run_forward(layer, call, plan);
}
Status cluster_lstm_backward(const LstmBackward& layer, const CudaCall& call,
                             const ClusterPlan& plan) {
  return run_backward(layer, call, plan);
}
Status cluster_gru_forward(const GruForward& layer, const CudaCall& call, const ClusterPlan& plan) {
  return run_forward(layer, call, plan);
}
Status cluster_gru_backward(const GruBackward& layer, const CudaCall& call,
                            const ClusterPlan& plan) {
  return run_backward(layer, call, plan);
}

}  // namespace rnnlm
