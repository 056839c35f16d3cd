#include "launch/bias_grad.h"

#include <algorithm>

#include "kernels/bias_grad.cuh"
#include "launch/launch.h"

namespace rnnlm {
namespace {

// f(T{}) for the T of a dtype.
template <class F>
auto of(DType dtype, F f) {
  switch (dtype) {
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(Bf16{});
    case DType::f16:
      return f(F16{});
    case DType::f32:
      break;
  }
  return f(float{});
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Rows of a chunk of the first stage: enough chunks for some 1024 CTAs, a handful for each SM,
// unless they would have less than 64 rows.
int64_t chunk_rows(const CudaProblem& problem) {
  constexpr int64_t kCtas = 1024, kFewestRows = 64;
  const int64_t across = ceil_div(problem.bias_columns(), ColumnSumsTraits::kColumns);
  const int64_t chunks =
      std::min(ceil_div(problem.rows, kFewestRows), std::max<int64_t>(1, kCtas / across));
  return ceil_div(problem.rows, chunks);
}

template <class In, class Out>
Status column_sums(const char* doing, const ColumnSumsParams<In, Out>& params,
                   std::uintptr_t stream) {
  using Traits = ColumnSumsTraits;
  LaunchShape shape;
  shape.threads = Traits::kThreads;
  shape.shared = Traits::template kShared<Arithmetic<In>>;
  shape.grid_x =
      static_cast<unsigned>(ceil_div(params.left_columns + params.right_columns, Traits::kColumns));
  shape.grid_y = static_cast<unsigned>(ceil_div(params.rows, params.chunk));
  return launch(doing, &column_sums_kernel<Traits, In, Out>, shape, stream, params);
}

}  // namespace

int64_t stepwise_bias_rows(const CudaProblem& problem) {
  return ceil_div(problem.rows, chunk_rows(problem));
}

Status sum_gradients(const CudaProblem& problem, const BiasGrad& bias, const CudaCall& call) {
  return of(problem.dtype, [&](auto value) {
    using T = decltype(value);
    const int64_t gates = problem.gates() * problem.hidden;
    return column_sums<T, Arithmetic<T>>(
        "launching the sums of gradients for biases",
        {static_cast<const T*>(bias.dgates), static_cast<const T*>(bias.candidate), gates,
         problem.bias_columns() - gates, problem.rows, chunk_rows(problem),
         static_cast<Arithmetic<T>*>(call.bias_partials)},
        call.stream);
  });
}

Status sum_partials(const CudaProblem& problem, const BiasGrad& bias, int64_t rows,
                    const CudaCall& call) {
  return of(problem.dtype, [&](auto value) {
    using T = decltype(value);
    return column_sums<Arithmetic<T>, T>(
        "launching the last sums of gradients for biases",
        {static_cast<const Arithmetic<T>*>(call.bias_partials), nullptr, problem.bias_columns(), 0,
         rows, rows, static_cast<T*>(bias.db)},
        call.stream);
  });
}

}  // namespace rnnlm
