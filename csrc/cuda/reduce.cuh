// Sums and maxima over the threads of a warp and of a block, in an order that follows from their number alone.
#pragma once

#include "cuda/device.cuh"

namespace dlkernels::DLKERNELS_ISA {

inline constexpr unsigned kAllLanes = 0xffffffffu;

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// The greater; of NaN and a number, the second.
struct Greater {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Every lane gets the combination of all: combine(a, b) must not depend on the order of a and b.
template <class T, class Combine>
__device__ __forceinline__ T reduce_warp(T value, Combine combine) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// The threads that work on one thing together: `kWarps` warps side by side, the whole block where there is more than
// one. `exchange` is shared memory for one T a warp.
template <int kWarps>
struct Team {
  static constexpr int size = kWarps * kWarpSize;
  __device__ __forceinline__ static int rank() { return static_cast<int>(threadIdx.x) % size; }

  template <class T, class Combine>
  __device__ __forceinline__ static T reduce(T value, Combine combine, T* exchange) {
    value = reduce_warp(value, combine);
    if constexpr (kWarps > 1) {
      __syncthreads();  // of the last use of `exchange`
      const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
      if (lane == 0) exchange[warp] = value;
      __syncthreads();
      value = exchange[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) value = combine(value, exchange[w]);
    }
    return value;
  }
};

}  // namespace dlkernels::DLKERNELS_ISA
