// What every CUDA file needs: launching on the caller's stream, workspaces, errors. Kernels are compiled by nvcc, and
// by g++ against tests/simt/simt.h, which runs them on the host; besides this file, only single instructions know of
// the difference (numbers.cuh, mma.cuh, tile.cuh).
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

#include "cpu/sizes.h"
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
// Of the device in use: its name and what this build has for it.
inline std::string no_kernel_image() {
  int device = 0;
  cudaDeviceProp properties = {};
  cudaGetDevice(&device);
  cudaGetDeviceProperties(&properties, device);
  return std::string("CUDA: no kernels for ") + properties.name + " (compute capability " +
         std::to_string(properties.major) + "." + std::to_string(properties.minor) +
         "): this build has sm_80, sm_90a and PTX of compute_90; `DLKERNELS_CUDA=1 pip install --force-reinstall "
         "--no-deps .` builds them for devices from compute capability 8.0 on.";
}

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorNoKernelImageForDevice) throw std::runtime_error(no_kernel_image());
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}
#endif

inline constexpr int64_t kSharedBytesOfAnyKernel = 48 << 10;  // more has to be asked for

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
  bool together = false;  // all blocks are on the device at once, and may wait for one another
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

#if !defined(DLKERNELS_SIMT)
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int64_t bytes) {
  if (bytes <= kSharedBytesOfAnyKernel) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}
#endif

// The shared memory that a block can have.
inline int64_t most_shared_bytes() {
#if defined(DLKERNELS_SIMT)
  return kSharedBytesOfAnyKernel;
#else
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
#endif
}

// How many blocks of a kernel can be on the device at once.
template <class... Parameters>
int64_t blocks_at_once(void (*kernel)(Parameters...), int threads, int64_t shared_bytes) {
#if defined(DLKERNELS_SIMT)
  static_cast<void>(kernel), static_cast<void>(threads), static_cast<void>(shared_bytes);
  return processors();
#else
  int of_processor = 0;
  allow_shared_memory(kernel, shared_bytes);
  check(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_processor, kernel, threads, static_cast<size_t>(shared_bytes)));
  return of_processor * processors();
#endif
}

// Runs kernel(arguments...) on the caller's stream; no blocks, no launch. Blocks lie along x, which alone may be long.
template <class... Parameters, class... Arguments>
void launch(Launch shape, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (shape.blocks == 0) return;
  if (shape.blocks > 0x7fffffff) throw std::runtime_error("CUDA: more than 2^31 blocks in a launch");
#if defined(DLKERNELS_SIMT)
  (shape.together ? ::simt::run_together : ::simt::run)(
      {{static_cast<unsigned>(shape.blocks), 1, 1}, {static_cast<unsigned>(shape.threads), 1, 1}, shape.shared_bytes},
      [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(Place::current().stream);
  allow_shared_memory(kernel, shape.shared_bytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.together ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
#endif
}

// ---- workspaces ----------------------------------------------------------------------------------------------------

// As many elements on the device as the product of the sizes says, valid for the launches that follow on the stream.
template <class T, class... Sizes>
T* workspace(Sizes... sizes) {
  const int64_t bytes = multiply_sizes("dlkernels: the memory that this call needs", sizes..., sizeof(T));
  return static_cast<T*>(Place::current().allocate(bytes));
}

// A copy of numbers of the processor, valid as long as a workspace; the numbers may go once this returns.
template <class T>
T* copy_to_device(const T* numbers, int64_t count) {
  T* copy = workspace<T>(count);
#if defined(DLKERNELS_SIMT)
  memcpy(copy, numbers, static_cast<size_t>(count) * sizeof(T));
#else
  check(cudaMemcpyAsync(copy, numbers, static_cast<size_t>(count) * sizeof(T), cudaMemcpyHostToDevice,
                        static_cast<cudaStream_t>(Place::current().stream)));
#endif
  return copy;
}

// ---- barriers of a grid --------------------------------------------------------------------------------------------

// Where all blocks of a launch `together` meet, any number of times. Memory written before is seen by all after.
class GridBarrier {
 public:
  // On the caller's stream.
  static GridBarrier create() {
    GridBarrier barrier;
    barrier.arrived_ = workspace<unsigned>(1);
#if !defined(DLKERNELS_SIMT)
    check(cudaMemsetAsync(barrier.arrived_, 0, sizeof(unsigned), static_cast<cudaStream_t>(Place::current().stream)));
#endif
    return barrier;
  }

#if defined(DLKERNELS_SIMT)
  void meet(Where where = Where::current()) { ::simt::synchronize_grid(where); }
#else
  __device__ void meet() {
    __syncthreads();
    if (threadIdx.x == 0) {
      expected_ += gridDim.x;
      __threadfence();
      atomicAdd(arrived_, 1u);
      unsigned arrived;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(arrived_) : "memory");
      } while (static_cast<int>(arrived - expected_) < 0);  // the counter may wrap around
      __threadfence();
    }
    __syncthreads();
  }
#endif

 private:
  unsigned* arrived_ = nullptr;
  unsigned expected_ = 0;
};

}  // namespace dlkernels::DLKERNELS_ISA
