// Lends torch's thread pool, allocator and matmul precision to the kernels.
#include "ops/runtime.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

#include "cpu/parallel.h"

#if AT_PARALLEL_OPENMP
#include <omp.h>
#endif

namespace dlkernels::ops {
namespace {

// A forked child has no worker threads, and OpenMP would wait for the parent's forever.
std::atomic<bool> in_forked_child{false};

void run_on_torch_pool(int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (in_forked_child.load(std::memory_order_relaxed)) return body(context, 0, tasks);
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// Members wait for each other, so all of them must run: at::parallel_for does not say how many threads it has. A region
// has them all, as torch's own regions do: libgomp's pool is slow when the number changes.
void run_together_on_torch_pool(int64_t wanted, void (*body)(void*, int64_t, int64_t), void* context) {
#if AT_PARALLEL_OPENMP
  const bool alone = at::get_num_threads() == 1 || at::in_parallel_region();
  if (!alone && !in_forked_child.load(std::memory_order_relaxed)) {
#pragma omp parallel
    {
      const int64_t members = std::min<int64_t>(wanted, omp_get_num_threads());
      if (omp_get_thread_num() < members) body(context, omp_get_thread_num(), members);
    }
    return;
  }
#endif
  body(context, 0, 1);
}

void* allocate(size_t bytes) {
  return c10::GetDefaultCPUAllocator()->raw_allocate(bytes);
}

void deallocate(void* memory) noexcept {
  c10::GetDefaultCPUAllocator()->raw_deallocate(memory);
}

// torch.get_float32_matmul_precision()
int float32_planes() {
  switch (at::globalContext().float32MatmulPrecision()) {
    case at::Float32MatmulPrecision::HIGHEST:
      return 3;
    case at::Float32MatmulPrecision::HIGH:
      return 2;
    default:
      return 1;
  }
}

}  // namespace

void install_torch_runtime() {
  install_runtime({run_on_torch_pool, run_together_on_torch_pool, allocate, deallocate, float32_planes});
  pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true, std::memory_order_relaxed); });
}

}  // namespace dlkernels::ops
