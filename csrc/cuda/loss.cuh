// What the losses of rows become: one loss each, their sum, or their mean over the rows' weights.
#pragma once

#include "cpu/cross_entropy.h"
#include "cuda/numbers.cuh"
#include "cuda/reduce.cuh"

namespace dlkernels::DLKERNELS_ISA {

// Classes of a loss: targets, weights and smoothing as torch has them; T is the type of the sums.
template <class T>
struct Targets {
  const int64_t* target;  // null where there are probabilities
  const T* weight;        // of a class, or null
  int64_t classes, ignore_index;
  T smoothing, uniform;  // uniform: what smoothing gives to every class

  __device__ bool has_probabilities() const { return target == nullptr; }
  __device__ bool ignored(int64_t row) const { return target != nullptr && target[row] == ignore_index; }
  // A target that is no class gives NaN: there is no way to raise from here.
  __device__ bool valid(int64_t row) const { return target == nullptr || (target[row] >= 0 && target[row] < classes); }
  __device__ T class_weight(int64_t c) const { return weight == nullptr ? T(1) : weight[c]; }
  // w_c ((1 - eps) q_c + eps / C) for a target that is probabilities, q_c 0 for the rest of a smoothed one-hot one.
  __device__ T share(T q, int64_t c) const { return ((T(1) - smoothing) * q + uniform) * class_weight(c); }
  __device__ T row_weight(int64_t row) const {
    if (has_probabilities()) return T(1);
    return ignored(row) || !valid(row) ? T(0) : class_weight(target[row]);
  }
};

template <class T>
__device__ T not_a_number() {
  return static_cast<T>(NAN);
}

// ---- totals: per block of rows, and then of all --------------------------------------------------------------------

inline constexpr int kLossThreads = 256;
inline constexpr int64_t kRowsPerPartial = 8192;  // rows of a block's part of the totals

struct Totals {
  double loss, weight;
};

__device__ inline Totals reduce_totals(Totals mine) {
  using Block = Team<kLossThreads / kWarpSize>;
  double* exchange = shared_memory<double>();
  return {Block::reduce(mine.loss, Add(), exchange), Block::reduce(mine.weight, Add(), exchange)};
}

template <class T>
__global__ void __launch_bounds__(kLossThreads, 1)
    sum_rows(Targets<T> targets, const T* losses, int64_t rows, Totals* partials) {
  const int64_t begin = blockIdx.x * kRowsPerPartial;
  const int64_t end = begin + kRowsPerPartial < rows ? begin + kRowsPerPartial : rows;
  Totals totals = {0, 0};
  for (int64_t row = begin + threadIdx.x; row < end; row += kLossThreads) {
    totals.loss += losses[row];
    totals.weight += targets.row_weight(row);
  }
  totals = reduce_totals(totals);
  if (threadIdx.x == 0) partials[blockIdx.x] = totals;
}

template <class Out>
__global__ void __launch_bounds__(kLossThreads, 1)
    finish_totals(const Totals* partials, int64_t count, bool is_mean, Out* loss, double* divisor) {
  Totals totals = {0, 0};
  for (int64_t i = threadIdx.x; i < count; i += kLossThreads) {
    totals.loss += partials[i].loss;
    totals.weight += partials[i].weight;
  }
  totals = reduce_totals(totals);
  if (threadIdx.x != 0) return;
  *divisor = is_mean ? totals.weight : 1.0;
  if (loss != nullptr) *loss = narrow<Out>(static_cast<accumulate_t<Out>>(totals.loss / *divisor));
}

template <class Out>
__global__ void __launch_bounds__(kLossThreads, 1)
    narrow_losses(const accumulate_t<Out>* losses, int64_t rows, Out* out) {
  const int64_t row = int64_t{blockIdx.x} * kLossThreads + threadIdx.x;
  if (row < rows) out[row] = narrow<Out>(losses[row]);
}

// loss: [rows], or [1]; divisor: what a sum over the rows is divided by.
template <class Out, class T = accumulate_t<Out>>
void reduce_losses(const Targets<T>& targets, const T* losses, int64_t rows, LossReduction reduction, Out* loss,
                   double* divisor) {
  const bool per_row = reduction == LossReduction::none;
  if (per_row) launch({ceil_div(rows, kLossThreads), kLossThreads}, narrow_losses<Out>, losses, rows, loss);
  const int64_t count = ceil_div(rows, kRowsPerPartial), exchange = kLossThreads / kWarpSize * sizeof(double);
  Totals* partials = workspace<Totals>(count);
  launch({count, kLossThreads, exchange}, sum_rows<T>, targets, losses, rows, partials);
  launch({1, kLossThreads, exchange}, finish_totals<Out>, partials, count, reduction == LossReduction::mean,
         per_row ? nullptr : loss, divisor);
}

}  // namespace dlkernels::DLKERNELS_ISA
