// What a kernel must not do, one fault a name: prints what the simulator says of it, or nothing.
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "simt.h"

namespace {

float* shared() {
  return reinterpret_cast<float*>(::simt::current().shared);
}

void divergent_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}
void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void divergent_exchange() {
  if (threadIdx.x % 2 == 0) __shfl_xor_sync(0xffffffffu, 1, 2);
}
void writes_outside() {
  if (threadIdx.x == 63) shared()[64] = 1.0f;
}

// Thread i leaves i for its neighbour; correct with the barrier between.
template <bool kWaits>
void neighbours(float* out) {
  shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kWaits) __syncthreads();
  out[threadIdx.x] = shared()[(threadIdx.x + 32) % 64];
}

// Two rounds through the same memory; correct with a barrier before it is written again.
template <bool kWaits>
void rounds(float* out) {
  for (int round = 0; round < 2; ++round) {
    if (kWaits) __syncthreads();
    shared()[threadIdx.x] = static_cast<float>(threadIdx.x + 100 * round);
    __syncthreads();
    const float value = shared()[(threadIdx.x + 32) % 64] - static_cast<float>(100 * round);
    out[threadIdx.x] = round == 0 ? value : (out[threadIdx.x] + value) / 2;
  }
}

// Sixteen threads copy four numbers each; correct after waiting for them and for the others.
template <bool kWaits>
void copies(float* out) {
  alignas(16) static float source[64];
  source[threadIdx.x] = static_cast<float>((threadIdx.x + 32) % 64);
  __syncthreads();
  if (threadIdx.x < 16) simt::copy_later(shared() + 4 * threadIdx.x, source + 4 * threadIdx.x, 16);
  simt::commit_copies();
  if (kWaits) simt::wait_for_copies(0);
  __syncthreads();
  out[threadIdx.x] = shared()[threadIdx.x];
}

// Two blocks, each of which leaves numbers for the other; correct with the barrier of the grid between.
template <bool kWaits>
void blocks_of_a_grid(float* out) {
  static float left[64];
  if (threadIdx.x < 32) left[blockIdx.x * 32 + threadIdx.x] = static_cast<float>(blockIdx.x * 32 + threadIdx.x);
  if (kWaits) simt::synchronize_grid(Where::current());
  const unsigned other = (blockIdx.x * 32 + threadIdx.x % 32 + 32) % 64;
  if (threadIdx.x < 32) out[blockIdx.x * 32 + threadIdx.x] = left[other];
  if (!kWaits && threadIdx.x < 32) left[other] = -1;  // so that the next schedule begins anew
}

void block_that_waits_alone() {
  simt::synchronize_grid(Where::current());
}
void misaligned_copy() {
  simt::copy_later(shared() + 1, shared(), 16);
}

// ---- Hopper: a barrier at the end of a kilobyte of shared memory, a box before it ----------------------------------

constexpr int64_t kBoxBytes = 8 * 128;

void* barrier() {
  return ::simt::current().shared + kBoxBytes;
}
simt::BoxMap eight_lines() {
  alignas(16) static uint16_t numbers[8 * 64];
  for (int i = 0; i < 8 * 64; ++i) numbers[i] = static_cast<uint16_t>(i);
  return {numbers, 8, 64, 128, 8};
}
void begin_box(int offset = 0) {
  if (threadIdx.x == 0) {
    simt::initialize_barrier(barrier(), 1);
    simt::arrive(barrier(), static_cast<int>(kBoxBytes));
    simt::copy_box(::simt::current().shared + offset, eight_lines(), 0, 0, barrier());
  }
  __syncthreads();
}
void unknown_barrier() {
  simt::arrive(barrier(), 0);
}
void phase_without_end() {
  begin_box();
  simt::wait_for_phase(barrier(), 0, Where::current());
  simt::wait_for_phase(barrier(), 1, Where::current());
}
void copy_that_outlives_its_block() {
  begin_box();
}
void misaligned_box() {
  begin_box(16);
}

// Thread i takes a number of the first line, which does not change places; correct after waiting for the phase.
template <bool kWaits>
void boxes(float* out) {
  begin_box();
  if (kWaits || threadIdx.x == 0) simt::wait_for_phase(barrier(), 0, Where::current());
  uint16_t number;
  std::memcpy(&number, ::simt::current().shared + (threadIdx.x + 32) % 64 * 2, sizeof number);
  out[threadIdx.x] = static_cast<float>(number);
}

// In how many of the four schedules the values are those of the neighbours.
template <class Kernel>
std::string schedules_passed(Kernel kernel, unsigned blocks = 1, int64_t shared_bytes = 256) {
  int passed = 0;
  for (auto schedule :
       {simt::Schedule::forward, simt::Schedule::reverse, simt::Schedule::random, simt::Schedule::warp_ahead}) {
    simt::set_schedule(schedule);
    float out[64];
    const simt::LaunchShape shape = {{blocks, 1, 1}, {64, 1, 1}, shared_bytes};
    (blocks == 1 ? simt::run : simt::run_together)(shape, [&] { kernel(out); });
    bool right = true;
    for (int i = 0; i < 64; ++i) right &= out[i] == static_cast<float>((i + 32) % 64);
    passed += right;
  }
  return std::to_string(passed);
}

std::string launch(void (*kernel)(), int64_t shared_bytes = 256) {
  simt::run({{1, 1, 1}, {64, 1, 1}, shared_bytes}, kernel);
  return "";
}

}  // namespace

int main(int, char** arguments) {
  const std::map<std::string, std::function<std::string()>> cases = {
      {"divergent_barrier", [] { return launch(divergent_barrier); }},
      {"two_barriers", [] { return launch(two_barriers); }},
      {"divergent_exchange", [] { return launch(divergent_exchange); }},
      {"writes_outside", [] { return launch(writes_outside); }},
      {"block_that_waits_alone", [] { return launch(block_that_waits_alone); }},
      {"misaligned_copy", [] { return launch(misaligned_copy); }},
      {"unknown_barrier", [] { return launch(unknown_barrier, kBoxBytes + 8); }},
      {"phase_without_end", [] { return launch(phase_without_end, kBoxBytes + 8); }},
      {"copy_that_outlives_its_block", [] { return launch(copy_that_outlives_its_block, kBoxBytes + 8); }},
      {"misaligned_box", [] { return launch(misaligned_box, kBoxBytes + 1024); }},
      {"boxes", [] { return schedules_passed(boxes<true>, 1, kBoxBytes + 8); }},
      {"boxes_without_barrier", [] { return schedules_passed(boxes<false>, 1, kBoxBytes + 8); }},
      {"copies", [] { return schedules_passed(copies<true>); }},
      {"copies_without_barrier", [] { return schedules_passed(copies<false>); }},
      {"grid", [] { return schedules_passed(blocks_of_a_grid<true>, 2); }},
      {"grid_without_barrier", [] { return schedules_passed(blocks_of_a_grid<false>, 2); }},
      {"neighbours", [] { return schedules_passed(neighbours<true>); }},
      {"neighbours_without_barrier", [] { return schedules_passed(neighbours<false>); }},
      {"rounds", [] { return schedules_passed(rounds<true>); }},
      {"rounds_without_barrier", [] { return schedules_passed(rounds<false>); }},
  };
  try {
    std::puts(cases.at(arguments[1])().c_str());
  } catch (const std::logic_error& error) {
    std::puts(error.what());
  }
}
