// The CUDA side of launch/launch.h.
#pragma once

#include <cuda_runtime.h>

#include "core/status.h"
#include "launch/cuda_status.h"
#include "launch/launch.h"

namespace rnnlm {

inline Status device_limits(int device, DeviceLimits* limits) {
  int major = 0, minor = 0, sms = 0, shared = 0, cooperative = 0;
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } wanted[] = {{&major, cudaDevAttrComputeCapabilityMajor},
                {&minor, cudaDevAttrComputeCapabilityMinor},
                {&sms, cudaDevAttrMultiProcessorCount},
                {&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                {&cooperative, cudaDevAttrCooperativeLaunch}};
  for (const auto& one : wanted) {
    const Status status = cuda_status(cudaDeviceGetAttribute(one.value, one.attribute, device),
                                      "asking what the device can do");
    if (!status.is_ok()) return status;
  }
  *limits = {10 * major + minor, sms, static_cast<std::size_t>(shared), cooperative != 0};
  return Status::ok();
}

// Lets the kernel have the shape's shared memory and cluster size. Part of launch().
template <class Params>
Status prepare(void (*kernel)(Params), const LaunchShape& shape) {
  if (shape.shared > 48 * 1024) {
    const Status status =
        cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(shape.shared)),
                    "reserving shared memory");
    if (!status.is_ok()) return status;
  }
  if (shape.cluster > 8) {
    return cuda_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "allowing a large cluster");
  }
  return Status::ok();
}

// CTAs of this shape that the current device can hold at once (clusters, where the shape has them).
template <class Params>
Status resident_limit(void (*kernel)(Params), const LaunchShape& shape, int sms, int* limit) {
  const Status prepared = prepare(kernel, shape);
  if (!prepared.is_ok()) return prepared;
  if (shape.cluster > 1) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(shape.cluster);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {shape.cluster, 1, 1};
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cuda_status(cudaOccupancyMaxActiveClusters(limit, kernel, &config),
                       "asking how many clusters fit");
  }
  int per_sm = 0;
  const Status status =
      cuda_status(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                      &per_sm, kernel, static_cast<int>(shape.threads), shape.shared),
                  "asking how many CTAs fit");
  *limit = per_sm * sms;
  return status;
}

// Enqueues the kernel and returns. `doing` completes "CUDA error while ...".
template <class Params>
Status launch(const char* doing, void (*kernel)(Params), const LaunchShape& shape,
              std::uintptr_t stream, const Params& params) {
  const Status prepared = prepare(kernel, shape);
  if (!prepared.is_ok()) return prepared;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[3];
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {shape.cluster, 1, 1};
  }
  if (shape.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (shape.programmatic) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  // No document says that clusters can be launched cooperatively, nor how that would be refused.
  const bool both = shape.cluster > 1 && shape.cooperative;
  if (both && (error == cudaErrorInvalidValue || error == cudaErrorInvalidConfiguration)) {
    (void)cudaGetLastError();
    error = cudaErrorNotSupported;
  }
  return cuda_status(error, doing);
}

// Enqueues the filling of memory with a byte.
inline Status fill_bytes(void* p, int byte, std::size_t bytes, std::uintptr_t stream) {
  if (bytes == 0) return Status::ok();
  return cuda_status(cudaMemsetAsync(p, byte, bytes, reinterpret_cast<cudaStream_t>(stream)),
                     "filling memory");
}

// A stream with the priority of another, which waits for no stream unless told to (the default
// stream included). Creating one is no work for a stream either: see host_word().
inline Status new_stream(std::uintptr_t like, std::uintptr_t* stream) {
  const char* const doing = "creating a stream";
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  Status status = cuda_status(cudaThreadExchangeStreamCaptureMode(&mode), doing);
  if (!status.is_ok()) return status;
  int priority = 0;
  cudaStream_t created = nullptr;
  status = cuda_status(cudaStreamGetPriority(reinterpret_cast<cudaStream_t>(like), &priority),
                       "asking for the priority of a stream");
  if (status.is_ok()) {
    status =
        cuda_status(cudaStreamCreateWithPriority(&created, cudaStreamNonBlocking, priority), doing);
    *stream = reinterpret_cast<std::uintptr_t>(created);
  }
  const Status restored = cuda_status(cudaThreadExchangeStreamCaptureMode(&mode), doing);
  return status.is_ok() ? restored : status;
}

// A word, 0 at first and never freed, that the host and kernels of the current device both reach.
// Allocating is no work for a stream, so a capture that goes on must not mind.
inline Status host_word(uint32_t** on_host, uint32_t** on_device) {
  const char* const doing = "allocating a word of host memory";
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  Status status = cuda_status(cudaThreadExchangeStreamCaptureMode(&mode), doing);
  if (!status.is_ok()) return status;
  void* word = nullptr;
  status = cuda_status(cudaHostAlloc(&word, sizeof(uint32_t), cudaHostAllocMapped), doing);
  if (status.is_ok()) {
    *on_host = static_cast<uint32_t*>(word);
    **on_host = 0;
    status =
        cuda_status(cudaHostGetDevicePointer(reinterpret_cast<void**>(on_device), word, 0), doing);
  }
  const Status restored = cuda_status(cudaThreadExchangeStreamCaptureMode(&mode), doing);
  return status.is_ok() ? restored : status;
}

}  // namespace rnnlm
