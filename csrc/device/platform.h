// One source for two machines: nvcc compiles the kernels for GPUs, a C++ compiler compiles the same
// files for the emulator (csrc/emulator), which runs them on a CPU in tests.
//
// Kernels use threadIdx.x, blockIdx.{x,y,z}, gridDim, blockDim, __global__ and __syncthreads() as
// CUDA has them; shared memory through dynamic_shared(); every other thing that is not plain C++
// through the wrappers of device/ptx.h, which have a body for either machine.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define RNNLM_DEVICE __device__ __forceinline__
// Unrolls a loop whose body indexes register arrays.
#define RNNLM_UNROLL _Pragma("unroll")
// Keeps the compiler from unrolling a loop that should stay small.
#define RNNLM_NO_UNROLL _Pragma("unroll 1")
#else
#include "emulator/device.h"

#define RNNLM_DEVICE inline
#define RNNLM_UNROLL
#define RNNLM_NO_UNROLL
#endif
