// CUDA's execution model on the host, to run kernels (csrc/cuda) without a GPU: what g++ needs to compile a .cu file.
//
// The threads of a block are fibers of one operating-system thread. A fiber runs until it has to wait, at a barrier or
// in a warp's exchange, so a missing barrier is not a rare race but a wrong result under one of the schedules, always.
// Shared memory begins as NaN and ends in a fence that is looked at when the block is done. A barrier that some thread
// of the block does not reach, or that two threads reach at different places, is an error.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

namespace simt {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// The running thread.
struct Thread {
  Index thread, block, block_size, grid_size;
  unsigned char* shared;
};
const Thread& current();

// Who runs next: threads in order, in reverse, at random, or one warp as far as it comes before the others.
enum class Schedule { forward, reverse, random, warp_ahead };
void set_schedule(Schedule schedule);

struct LaunchShape {
  Index blocks, threads;
  int64_t shared_bytes;
};
// Runs body once for every thread. Throws std::logic_error for what a kernel must not do.
void run(const LaunchShape& shape, const std::function<void()>& body);

void synchronize_block(std::source_location where);
// Waits for all 32 lanes of the warp; returns what lane `source` gave.
uint64_t exchange(uint64_t value, int source, std::source_location where);

template <class T>
T exchange_value(T value, int source, std::source_location where) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, source, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane() {
  return static_cast<int>(current().thread.x % 32);
}

}  // namespace simt

#define threadIdx (::simt::current().thread)
#define blockIdx (::simt::current().block)
#define blockDim (::simt::current().block_size)
#define gridDim (::simt::current().grid_size)

using Where = std::source_location;

inline void __syncthreads(Where where = Where::current()) {
  simt::synchronize_block(where);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int lane_mask, int = 32, Where where = Where::current()) {
  return ::simt::exchange_value(value, ::simt::lane() ^ lane_mask, where);
}
template <class T>
T __shfl_sync(unsigned, T value, int source, int = 32, Where where = Where::current()) {
  return ::simt::exchange_value(value, source, where);
}
