// A layer's steps on a GPU: the entries that Python calls. Free of CUDA headers.
//
// Each checks what it was given, chooses a tier (launch/plan.h), enqueues the work on the call's
// stream and returns without waiting. Where `automatic` chose a persistent tier that the device
// then refuses to launch, the stepwise tier does the work. `ran`, if not null, is told which tier
// it was.
//
// A persistent launch that gave up waiting is only found out later: its outputs are NaN by then,
// and the next of these calls on the device returns the failure as its own status and does nothing.
#pragma once

#include <cstdint>
#include <string>

#include "core/params.h"
#include "core/status.h"
#include "launch/plan.h"

namespace rnnlm {

Status cuda_lstm_forward(const LstmForward& layer, const CudaCall& call, CudaTier* ran = nullptr);
Status cuda_lstm_backward(const LstmBackward& layer, const CudaCall& call, CudaTier* ran = nullptr);
Status cuda_gru_forward(const GruForward& layer, const CudaCall& call, CudaTier* ran = nullptr);
Status cuda_gru_backward(const GruBackward& layer, const CudaCall& call, CudaTier* ran = nullptr);

// What a call needs that its caller has to provide.
struct CudaNeeds {
  int64_t workspace;  // bytes
  bool offsets;       // CudaCall::offsets, of a packed sequence
};
// Enough for every tier that may have to run the problem; a tier that is off later needs no more.
Status cuda_needs(const CudaProblem& problem, int device, CudaTier tier, CudaNeeds* needs);

// What the device is, and which tiers are off on it. Asked once per device.
Status cuda_device_limits(int device, DeviceLimits* limits);
// Why a tier is off on the device; empty while it is on.
std::string cuda_why_off(int device, CudaTier tier);

// A stream of our own on the device, for the rest of the process, with the priority of `like`. For
// the directions of a bidirectional layer: streams of torch's pool are handed out again and again,
// and what is allocated on one may be taken by whoever else holds it.
Status cuda_new_stream(int device, std::uintptr_t like, std::uintptr_t* stream);

// The failure that the next call would return, as a sentence; empty if there is none. Its tier is
// off from then on. Says nothing of launches that still run.
std::string cuda_take_failure(int device);

// For tests. How long the waits of a persistent launch may last at least; and forgetting all that
// was found out about devices, and the wait limit.
void cuda_set_wait_limit(uint32_t polls, uint64_t nanoseconds);
void cuda_forget_devices();

}  // namespace rnnlm
