// The functions of launch/tiers.h: Stepwise<T> for the tensors' dtype.
#include "launch/stepwise.h"

namespace rnnlm {
namespace {

// f(Stepwise<T>{}) for the T of a dtype.
template <class F>
auto of(DType dtype, F f) {
  switch (dtype) {
    case DType::f64:
      return f(Stepwise<double>{});
    case DType::bf16:
      return f(Stepwise<Bf16>{});
    case DType::f16:
      return f(Stepwise<F16>{});
    case DType::f32:
      break;
  }
  return f(Stepwise<float>{});
}

}  // namespace

int64_t stepwise_workspace(const CudaProblem& problem) {
  return of(problem.dtype, [&](auto tier) { return tier.workspace(problem); });
}
Status stepwise_lstm_forward(const LstmForward& layer, const CudaCall& call) {
  return of(layer.dtype, [&](auto tier) { return tier.lstm_forward(layer, call); });
}
Status stepwise_lstm_backward(const LstmBackward& layer, const CudaCall& call) {
  return of(layer.dtype, [&](auto tier) { return tier.lstm_backward(layer, call); });
}
Status stepwise_gru_forward(const GruForward& layer, const CudaCall& call) {
  return of(layer.dtype, [&](auto tier) { return tier.gru_forward(layer, call); });
}
Status stepwise_gru_backward(const GruBackward& layer, const CudaCall& call) {
  return of(layer.dtype, [&](auto tier) { return tier.gru_backward(layer, call); });
}

}  // namespace rnnlm
