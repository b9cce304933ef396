#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

namespace dlkernels {

// The last to arrive opens the next round. The others watch for a while, because the rest of a phase is short against a
// sleep; then they give way, and at last they sleep, because the member they wait for may need their processor.
class Team {
 public:
  void meet(int64_t members) {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      round_.notify_all();
      return;
    }
    for (int turn = 0; turn < kWatches + kYields; ++turn) {
      if (round_.load(std::memory_order_acquire) != round) return;
      turn < kWatches ? pause() : std::this_thread::yield();
    }
    round_.wait(round, std::memory_order_acquire);
  }

 private:
  static constexpr int kWatches = 2000;  // of some 20 ns each
  static constexpr int kYields = 100;
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

namespace {

void run_serially(int64_t tasks, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  body(context, 0, tasks);
}

void run_alone(int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  body(context, 0, 1);
}

void* allocate_aligned(size_t bytes) {
  void* memory = std::aligned_alloc(64, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void free_aligned(void* memory) noexcept {
  std::free(memory);
}

int all_planes() {
  return 3;
}

Runtime active = {run_serially, run_alone, allocate_aligned, free_aligned, all_planes};

// Every block starts with its own size, in a line of its own so that the payload stays aligned.
constexpr size_t kHeader = 64;
constexpr size_t kSmallest = 4096;

size_t& size_of(void* payload) {
  return *reinterpret_cast<size_t*>(static_cast<char*>(payload) - kHeader);
}

// AddressSanitizer sees a byte beyond a block only where every block is its own.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kPoolsScratch = false;
#else
constexpr bool kPoolsScratch = true;
#endif

// A thread's idle blocks. Sizes are rounded up to an eighth of a power of two, so that near misses are hits.
class ScratchPool {
 public:
  ~ScratchPool() {
    for (void* payload : idle_) active.deallocate(static_cast<char*>(payload) - kHeader);
  }

  void* acquire(size_t bytes) {
    size_t best = idle_.size();
    for (size_t i = 0; i < idle_.size(); ++i) {
      const size_t size = size_of(idle_[i]);
      if (size >= bytes && size <= 4 * bytes + kSmallest && (best == idle_.size() || size < size_of(idle_[best])))
        best = i;
    }
    if (best < idle_.size()) {
      void* payload = idle_[best];
      idle_[best] = idle_.back();
      idle_.pop_back();
      idle_bytes_ -= size_of(payload);
      return payload;
    }
    size_t step = kSmallest;
    while (step * 16 <= bytes) step *= 2;
    const size_t rounded = kPoolsScratch ? (bytes + step - 1) / step * step : bytes;
    char* block = static_cast<char*>(active.allocate(rounded + kHeader));
    void* payload = block + kHeader;
    size_of(payload) = rounded;
    return payload;
  }

  void release(void* payload) noexcept {
    if (kPoolsScratch && idle_.size() < kMostBlocks && idle_bytes_ + size_of(payload) <= kMostBytes) {
      idle_bytes_ += size_of(payload);
      idle_.push_back(payload);  // never reallocates: the constructor reserves
      return;
    }
    active.deallocate(static_cast<char*>(payload) - kHeader);
  }

  ScratchPool() { idle_.reserve(kMostBlocks); }

 private:
  static constexpr size_t kMostBlocks = 16;
  static constexpr size_t kMostBytes = size_t{64} << 20;
  std::vector<void*> idle_;
  size_t idle_bytes_ = 0;
};

ScratchPool& pool() {
  thread_local ScratchPool instance;
  return instance;
}

}  // namespace

void run_tasks(int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (tasks <= 0) return;
  if (tasks <= grain || tasks == 1) return body(context, 0, tasks);
  active.run(tasks, grain, body, context);
}

void run_team(int64_t wanted, void (*body)(void*, Team&, int64_t, int64_t), void* context) {
  Team team;
  if (wanted <= 1) return body(context, team, 0, 1);
  struct Call {
    Team& team;
    void (*body)(void*, Team&, int64_t, int64_t);
    void* context;
    static void run(void* call, int64_t member, int64_t members) {
      const Call& self = *static_cast<Call*>(call);
      self.body(self.context, self.team, member, members);
    }
  };
  Call call{team, body, context};
  active.run_together(wanted, &Call::run, &call);
}

void meet_team(Team& team, int64_t members) {
  team.meet(members);
}

void* acquire_scratch(size_t bytes) {
  return pool().acquire(bytes);
}

void release_scratch(void* memory) noexcept {
  pool().release(memory);
}

int float32_planes() {
  return active.float32_planes();
}

void install_runtime(const Runtime& runtime) {
  active = runtime;
}

}  // namespace dlkernels
