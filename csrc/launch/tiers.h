// What launch/layers.cu chooses from: each tier runs a layer's steps on the GPU its own way.
//
// Every function enqueues on the call's stream and returns without waiting. The layer's sizes,
// dtypes and pointers have been checked; T, B and H are at least 1. Persistent kernels are launched
// through launch_persistent() and wait no longer than wait_limit() says (launch/guard.h).
#pragma once

#include "core/params.h"
#include "core/status.h"
#include "launch/plan.h"

namespace rnnlm {

// Bytes of workspace that every call of a persistent tier begins with: its abort word
// (device/exchange.h), which layers.cu zeroes before and reads after (kernels/finish.cuh).
constexpr int64_t kAbortBytes = 256;

// (step, row) pairs of a sequence: rows of every per-step tensor.
inline int64_t total_rows(const Sequence& seq) {
  if (seq.batch_sizes == nullptr) return seq.steps * seq.batch;
  int64_t rows = 0;
  for (int64_t t = 0; t < seq.steps; ++t) rows += seq.batch_sizes[t];
  return rows;
}

// --- stepwise: one or two launches a step; any shape, any architecture ---------------------------

int64_t stepwise_workspace(const CudaProblem& problem);
Status stepwise_lstm_forward(const LstmForward& layer, const CudaCall& call);
Status stepwise_lstm_backward(const LstmBackward& layer, const CudaCall& call);
Status stepwise_gru_forward(const GruForward& layer, const CudaCall& call);
Status stepwise_gru_backward(const GruBackward& layer, const CudaCall& call);

// --- grid: persistent, cooperative ---------------------------------------------------------------

Status grid_lstm_forward(const LstmForward& layer, const CudaCall& call, const GridPlan& plan);
Status grid_lstm_backward(const LstmBackward& layer, const CudaCall& call, const GridPlan& plan);
Status grid_gru_forward(const GruForward& layer, const CudaCall& call, const GridPlan& plan);
Status grid_gru_backward(const GruBackward& layer, const CudaCall& call, const GridPlan& plan);

// --- block and cluster: persistent, no CTA waits outside its cluster -----------------------------

Status cluster_lstm_forward(const LstmForward& layer, const CudaCall& call,
                            const ClusterPlan& plan);
Status cluster_lstm_backward(const LstmBackward& layer, const CudaCall& call,
                             const ClusterPlan& plan);
Status cluster_gru_forward(const GruForward& layer, const CudaCall& call, const ClusterPlan& plan);
Status cluster_gru_backward(const GruBackward& layer, const CudaCall& call,
                            const ClusterPlan& plan);

}  // namespace rnnlm
