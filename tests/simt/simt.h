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
#define __grid_constant__
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
// The same with all blocks at once, which may wait for one another.
void run_together(const LaunchShape& shape, const std::function<void()>& body);

void synchronize_grid(std::source_location where);
void synchronize_block(std::source_location where);

// ---- what the lanes of a warp do together --------------------------------------------------------------------------

inline int lane() {
  return static_cast<int>(current().thread.x % 32);
}

inline constexpr size_t kLaneBytes = 64;  // that a lane can give in one exchange

// Waits for all 32 lanes of the warp; returns what they gave, kLaneBytes from lane to lane. It is valid until the
// warp's next but one exchange.
const unsigned char* exchange(const void* mine, size_t bytes, std::source_location where);

// What every lane of the warp gave.
template <class T>
class Given {
 public:
  Given(const T& mine, std::source_location where) : values_(exchange(&mine, sizeof mine, where)) {
    static_assert(sizeof(T) <= kLaneBytes);
  }
  const T& operator[](int lane) const { return *reinterpret_cast<const T*>(values_ + lane * kLaneBytes); }

 private:
  const unsigned char* values_;
};

// sum + value as the matrix units have it: rounded towards zero.
inline float add_rounded_towards_zero(float sum, double value) {
  const double exact = double{sum} + value;
  const float rounded = static_cast<float>(exact);
  if (!(fabs(exact) < INFINITY)) return rounded;
  return fabs(double{rounded}) > fabs(exact) ? nextafterf(rounded, 0.0f) : rounded;
}
inline double add_rounded_towards_zero(double sum, double value) {
  return sum + value;
}

// c += left right^T for 16 rows of left and 8 of right, the fragments of mma.sync: lane l has words l % 4 and l % 4 + 4
// of rows l / 4 and, of left, l / 4 + 8, and columns 2 (l % 4) and the next of c. value(word, i) is number i of a word.
template <int kPerWord, class Sum, class Word, class Value>
void multiply_add(Sum (&c)[4], const Word (&left)[4], const Word (&right)[2], Value&& value,
                  std::source_location where) {
  struct Words {
    Word left[4], right[2];
  } mine = {{left[0], left[1], left[2], left[3]}, {right[0], right[1]}};
  const Given<Words> given(mine, where);
  constexpr int depth = 8 * kPerWord;
  double rows[2][depth], columns[2][depth];
  const int row = lane() / 4 * 4, column = lane() % 4 * 2 * 4;  // the lanes that hold them begin here
  for (int half = 0; half < 2; ++half) {
    for (int word = 0; word < 8; ++word) {
      const Word a = given[row + word % 4].left[half + word / 4 * 2];
      const Word b = given[column + half * 4 + word % 4].right[word / 4];
      for (int j = 0; j < kPerWord; ++j) {
        rows[half][word * kPerWord + j] = value(a, j), columns[half][word * kPerWord + j] = value(b, j);
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    double sum = 0;
    for (int k = 0; k < depth; ++k) sum += rows[i / 2][k] * columns[i % 2][k];
    c[i] = add_rounded_towards_zero(c[i], sum);
  }
}

// Lane l gets word l % 4 of row l / 4 of each of four matrices of eight rows of 16 bytes; lane 8 m + r names row r of
// matrix m. Transposed: numbers l / 4 of rows 2 (l % 4) and the next.
void load_matrices(uint32_t (&words)[4], const void* row, bool transposed, std::source_location where);

// ---- copies that run beside the thread: seen at the latest moment, their place poisoned before ---------------------

void copy_later(void* shared, const void* global, int bytes);  // 16 bytes, zero beyond the first `bytes`
void commit_copies();
void wait_for_copies(int but_for_groups);

// ---- what Hopper adds (csrc/cuda/hopper.cuh) -----------------------------------------------------------------------

// Whether kernels on it are chosen.
bool uses_hopper();
void use_hopper(bool wanted);

// Barriers of shared memory. The address is that of eight bytes.
void initialize_barrier(void* barrier, int arrivals);
void arrive(void* barrier, int expected_bytes);
void wait_for_phase(void* barrier, unsigned parity, std::source_location where);

// A matrix of 16-bit numbers whose boxes, 64 numbers wide, are copied.
struct BoxMap {
  const void* data;
  int64_t lines, length, stride_bytes;
  int box_lines;
};
// Beside all threads; poisons its place, and arrives when nobody can go on without it.
void copy_box(void* shared, const BoxMap& map, int64_t line, int64_t along, void* barrier);

// sums += left right^T of boxes, one step deep, for the fragment of this thread. The sums are NaN and the operands are
// read when the batch is waited for.
void multiply_boxes(float (&sums)[64], uint64_t left, uint64_t right, bool left_along_depth, bool right_along_depth,
                    float (*value)(uint16_t));
void commit_products();
void wait_for_products(int but_for_batches);

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
  return ::simt::Given<T>(value, where)[(::simt::lane() ^ lane_mask) % 32];
}
inline void __syncwarp(Where where = Where::current()) {
  ::simt::Given<int>(0, where);
}
template <class T>
T __shfl_sync(unsigned, T value, int source, int = 32, Where where = Where::current()) {
  return ::simt::Given<T>(value, where)[source % 32];
}
