// What every CUDA file needs: launching on the caller's stream, workspaces, errors. Kernels are compiled by nvcc, and
// by g++ against tests/simt/simt.h, which runs them on the host; nothing else in csrc/cuda knows of the difference.
//
// The caller of a table's functions (kernels.h) says where they run with a Place, for the calling thread.
#pragma once

#if defined(DLKERNELS_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif

#include <stdexcept>
#include <string>

#include "cpu/types.h"
#include "cuda/place.h"

namespace dlkernels::DLKERNELS_ISA {

inline constexpr int kWarpSize = 32;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// ---- shared memory: one object a block, its size given at the launch -----------------------------------------------

template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(DLKERNELS_SIMT)
  return reinterpret_cast<T*>(::simt::current().shared);
#else
  extern __shared__ __align__(128) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

// ---- launching -----------------------------------------------------------------------------------------------------

#if !defined(DLKERNELS_SIMT)
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}
#endif

inline constexpr int64_t kSharedBytesOfAnyKernel = 48 << 10;  // more has to be asked for

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
};

// What the grid of a kernel is cut by. The simulator's four are as many as make its tests take every path.
inline int64_t processors() {
#if defined(DLKERNELS_SIMT)
  return 4;
#else
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
#endif
}

// Elements of an intermediate result that a call holds at a time; the simulator's few make several parts of it.
#if defined(DLKERNELS_SIMT)
inline constexpr int64_t kHeldElements = 1 << 11;
#else
inline constexpr int64_t kHeldElements = 1 << 25;
#endif

// Runs kernel(arguments...) on the caller's stream; no blocks, no launch. Blocks lie along x, which alone may be long.
template <class... Parameters, class... Arguments>
void launch(Launch shape, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (shape.blocks == 0) return;
  if (shape.blocks > 0x7fffffff) throw std::runtime_error("CUDA: more than 2^31 blocks in a launch");
#if defined(DLKERNELS_SIMT)
  ::simt::run(
      {{static_cast<unsigned>(shape.blocks), 1, 1}, {static_cast<unsigned>(shape.threads), 1, 1}, shape.shared_bytes},
      [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(Place::current().stream);
  if (shape.shared_bytes > kSharedBytesOfAnyKernel) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)));
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
#endif
}

// ---- workspaces ----------------------------------------------------------------------------------------------------

// `count` elements on the device, valid for the launches that follow on the stream.
template <class T>
T* workspace(int64_t count) {
  return static_cast<T*>(Place::current().allocate(count * static_cast<int64_t>(sizeof(T))));
}

}  // namespace dlkernels::DLKERNELS_ISA
