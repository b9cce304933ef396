// Sums over the rows of a matrix, in parts of rows and then over the parts: the gradient of a bias. Sixteen numbers are
// added in their type, and such sums in double: nothing is lost with the number of rows.
#pragma once

#include "cuda/numbers.cuh"

namespace dlkernels::DLKERNELS_ISA {

// Element (row, column) is at row / inner * outer_stride + row % inner * row_stride + column * column_stride.
template <class Scalar>
struct Columns {
  const Scalar* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
  Divider inner = Divider(1);
  int64_t outer_stride = 0;

  __device__ __forceinline__ accumulate_t<Scalar> at(int64_t row, int64_t column) const {
    const Division division(row, inner);
    return widen(data[division.quotient * outer_stride + division.remainder * row_stride + column * column_stride]);
  }
};

inline constexpr int kSumThreads = 256, kSumWarps = kSumThreads / kWarpSize;
inline constexpr int64_t kSumPartRows = 1024;  // that a block adds

// A lane has a column, a warp every eighth row of the part.
template <class Scalar>
__global__ void __launch_bounds__(kSumThreads, 1) sum_parts(Columns<Scalar> values, double* partials) {
  constexpr int kRun = 16;
  const int64_t column_blocks = ceil_div(values.columns, kWarpSize), part = blockIdx.x / column_blocks;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t column = blockIdx.x % column_blocks * kWarpSize + lane;
  const int64_t end = (part + 1) * kSumPartRows < values.rows ? (part + 1) * kSumPartRows : values.rows;
  double sum = 0;
  if (column < values.columns) {
    int64_t row = part * kSumPartRows + warp;
    while (row < end) {
      accumulate_t<Scalar> run = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i, row += kSumWarps) run += row < end ? values.at(row, column) : 0;
      sum += run;
    }
  }
  double* sums = shared_memory<double>();
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= values.columns) return;
  for (int w = 1; w < kSumWarps; ++w) sum += sums[w * kWarpSize + lane];
  partials[part * values.columns + column] = sum;
}

template <class Store>
__global__ void __launch_bounds__(kSumThreads, 1)
    add_parts(const double* partials, int64_t parts, int64_t columns, Store store) {
  const int64_t column = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (column >= columns) return;
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += partials[part * columns + column];
  store(column, sum);
}

template <class Scalar>
struct StoreSums {
  Scalar* sums;
  __device__ void operator()(int64_t column, double sum) const {
    sums[column] = narrow<Scalar>(static_cast<accumulate_t<Scalar>>(sum));
  }
};

// store(column, sum)
template <class Scalar, class Store>
void sum_columns(const Columns<Scalar>& values, const Store& store) {
  const int64_t parts = ceil_div(values.rows, kSumPartRows);
  double* partials = workspace<double>(parts, values.columns);
  launch({parts * ceil_div(values.columns, kWarpSize), kSumThreads, kSumThreads * sizeof(double)}, sum_parts<Scalar>,
         values, partials);
  launch({ceil_div(values.columns, kSumThreads), kSumThreads}, add_parts<Store>, partials, parts, values.columns,
         store);
}

}  // namespace dlkernels::DLKERNELS_ISA
