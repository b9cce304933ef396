// What the kernels need of their host: work sharing, scratch memory and one setting. They see plain functions, so that
// neither torch nor the standard library is compiled into the instruction-set objects; the extension routes them to
// torch's thread pool, allocator and settings.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sizes.h"

namespace dlkernels {

// Calls body(context, begin, end) for disjoint ranges that cover [0, tasks), from up to the pool's number of threads.
// Which thread runs a task, and how tasks are grouped, is not fixed: results may depend on the task index alone.
void run_tasks(int64_t tasks, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);

// A team: threads that run body(context, team, member, members) at the same time, one for each member, and may meet.
// It has `wanted` members or as many as the pool has threads to give, down to one. The body does not throw.
class Team;
void run_team(int64_t wanted, void (*body)(void* context, Team& team, int64_t member, int64_t members), void* context);
void meet_team(Team& team, int64_t members);

// Uninitialised memory, aligned to 64 bytes; throws what the installed allocator throws. Blocks are kept for reuse.
void* acquire_scratch(size_t bytes);
void release_scratch(void* memory) noexcept;

// How many bfloat16 a float32 is split into for products on matrix units: 3 keep float32's accuracy, see split.h.
int float32_planes();

// The host's pool, allocator and setting; by default one thread, aligned_alloc and 3.
struct Runtime {
  void (*run)(int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
  void (*run_together)(int64_t wanted, void (*body)(void*, int64_t member, int64_t members), void* context);
  void* (*allocate)(size_t bytes);
  void (*deallocate)(void* memory) noexcept;
  int (*float32_planes)();
};
void install_runtime(const Runtime& runtime);

}  // namespace dlkernels

#if defined(DLKERNELS_ISA)
namespace dlkernels::DLKERNELS_ISA {

// for each task in [0, tasks): body(task). `grain` tasks or fewer stay on one thread.
template <class Body>
inline void parallel_for(int64_t tasks, int64_t grain, Body&& body) {
  struct Call {
    Body& body;
    static void run(void* context, int64_t begin, int64_t end) {
      Body& body = static_cast<Call*>(context)->body;
      for (int64_t task = begin; task < end; ++task) body(task);
    }
  };
  Call call{body};
  run_tasks(tasks, grain, &Call::run, &call);
}

// One member of a team. Results may depend neither on how many there are nor on which of them does what.
class Member {
 public:
  struct Range {
    int64_t begin, end;
  };
  Member(Team& team, int64_t index, int64_t count) : team_(team), index_(index), count_(count) {}

  // Returns when every member has called it; what they wrote before, all of them see after.
  void meet() const {
    if (count_ > 1) meet_team(team_, count_);
  }
  // This member's part of [0, tasks): the same tasks each time, so that what they read stays in its caches.
  Range share(int64_t tasks) const { return {tasks * index_ / count_, tasks * (index_ + 1) / count_}; }
  // for each task in this member's share: body(task).
  template <class Body>
  void for_share(int64_t tasks, Body&& body) const {
    const Range range = share(tasks);
    for (int64_t task = range.begin; task < range.end; ++task) body(task);
  }

 private:
  Team& team_;
  int64_t index_, count_;
};

// body(member) by every member of a team: one parallel region for work in phases, where a loop of parallel_for would
// begin and end a region for each.
template <class Body>
inline void run_members(int64_t wanted, Body&& body) {
  struct Call {
    Body& body;
    static void run(void* context, Team& team, int64_t member, int64_t members) {
      static_cast<Call*>(context)->body(Member(team, member, members));
    }
  };
  Call call{body};
  run_team(wanted, &Call::run, &call);
}

// An array of T that goes back to the pool at the end of its scope: as many as the product of the sizes says, which is
// taken here so that it cannot overflow unseen. Null where there are none.
template <class T>
class Scratch {
 public:
  template <class... Sizes>
  explicit Scratch(Sizes... sizes) {
    const int64_t bytes = multiply_sizes("dlkernels: the memory that this call needs", sizes..., sizeof(T));
    data_ = bytes > 0 ? static_cast<T*>(acquire_scratch(static_cast<size_t>(bytes))) : nullptr;
  }
  ~Scratch() {
    if (data_ != nullptr) release_scratch(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

inline int64_t min_of(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t max_of(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace dlkernels::DLKERNELS_ISA
#endif
