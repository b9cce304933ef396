// Independent chains of multiply-adds in registers: as many as hide the latency of one, twice over.
#include "arithmetic_rate.h"

#include "parallel.h"
#include "simd.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int kChains = 12;
constexpr int64_t kTasks = 64;  // more than threads, so that every thread has the same share

template <class T>
T run_chains(int64_t task, int64_t repetitions) {
  Vec<T> sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = T(task + c);  // no two tasks alike, or one would be run for all
  const Vec<T> half = T(0.5), one = T(1);
  for (int64_t r = 0; r < repetitions; ++r) {
    for (auto& sum : sums) sum = fma(sum, half, one);
  }
  for (int c = 1; c < kChains; ++c) sums[0] += sums[c];
  return reduce_add(sums[0]);
}

double multiply_add(DType dtype, int64_t repetitions) {
  double operations = 0;
  dispatch(dtype, [&](auto* type) {
    using T = accumulate_t<std::remove_pointer_t<decltype(type)>>;
    Scratch<T> results(kTasks);  // used, so that the chains are not left out
    parallel_for(kTasks, 1, [&](int64_t task) { results[task] = run_chains<T>(task, repetitions); });
    operations = 2.0 * kTasks * kChains * Vec<T>::size * static_cast<double>(repetitions);
  });
  return operations;
}

}  // namespace

ArithmeticRateKernels arithmetic_rate_kernels() {
  return {multiply_add};
}

}  // namespace dlkernels::DLKERNELS_ISA
