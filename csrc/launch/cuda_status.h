// cudaError_t -> Status, and the guard that makes a tensor's device current for the time of a
// launch.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "core/status.h"

namespace rnnlm {

// What a caller can do about the errors that have a known way out; empty for the others.
inline const char* mend_of(cudaError_t error) {
  switch (error) {
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
      return "No usable NVIDIA driver or GPU: see what nvidia-smi says, or choose another backend";
    case cudaErrorInvalidDevice:
      return "Pass the index of a device that CUDA_VISIBLE_DEVICES lets this process see";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
      return "This build holds no code for the device: rebuild with its architecture in "
             "RNNLM_CUDA_ARCHS";
    case cudaErrorMemoryAllocation:
      return "Use a smaller batch or sequence, or free memory on the device";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorLaunchFailure:
      return "An earlier launch failed: run with CUDA_LAUNCH_BLOCKING=1 to find it, then restart "
             "the process";
    default:
      return "";
  }
}

// Launches that a device refuses because of what the kernel asks of it: another kernel may do.
inline bool is_refusal(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize ||
         error == cudaErrorLaunchOutOfResources || error == cudaErrorNotSupported;
}

// `doing` completes the sentence "CUDA error while ...". The runtime forgets the error, so that the
// next call of somebody else's does not report it.
inline Status cuda_status(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return Status::ok();
  (void)cudaGetLastError();
  std::string cause = std::string("CUDA error while ") + doing + ": " + cudaGetErrorString(error) +
                      " (" + cudaGetErrorName(error) + ")";
  if (error == cudaErrorMemoryAllocation)
    return Status::out_of_memory(std::move(cause), mend_of(error));
  if (is_refusal(error)) return Status::unsupported(std::move(cause), mend_of(error));
  return Status::device_error(std::move(cause), mend_of(error));
}

// Makes `device` current and, when destroyed, the one that was current before. Check status()
// before use.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : status_(select(device)) {}
  ~DeviceGuard() {
    if (switched_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  const Status& status() const { return status_; }

 private:
  Status select(int device) {
    const Status asked = cuda_status(cudaGetDevice(&previous_), "asking for the current device");
    if (!asked.is_ok() || previous_ == device) return asked;
    const Status set = cuda_status(cudaSetDevice(device), "selecting the device");
    switched_ = set.is_ok();
    return set;
  }

  int previous_ = 0;
  bool switched_ = false;
  Status status_;  // last: select() sets the two above
};

}  // namespace rnnlm
