// db of a backward call: which sums it consists of, and the launches that finish it
// (kernels/bias_grad.cuh).
#pragma once

#include <cstdint>

#include "core/params.h"
#include "core/status.h"
#include "launch/plan.h"

namespace rnnlm {

struct BiasGrad {
  void* db = nullptr;  // null: not wanted
  const void* dgates = nullptr;
  const void* candidate = nullptr;  // GRU, reset after: its sums follow those of dgates
};

// Rows of partial sums that the stepwise tier's first stage writes.
int64_t stepwise_bias_rows(const CudaProblem& problem);

// The stepwise tier's first stage: from dgates and candidate to call.bias_partials.
Status sum_gradients(const CudaProblem& problem, const BiasGrad& bias, const CudaCall& call);

// The last stage: from `rows` rows of call.bias_partials to db.
Status sum_partials(const CudaProblem& problem, const BiasGrad& bias, int64_t rows,
                    const CudaCall& call);

}  // namespace rnnlm
