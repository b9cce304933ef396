// Linear layer: y = x W^T + b, and its gradients dx = dy W and dW = dy^T x, which are the same product of other
// operands (product.cuh); db is the sum of dy over its rows.
//
// Operands whose lines begin at multiples of 16 bytes are copied in chunks, any others element by element.
#include "cpu/linear.h"
#include "cuda/column_sums.cuh"
#include "cuda/product.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// ---- the product ---------------------------------------------------------------------------------------------------

template <class Scalar>
struct AddBias {
  const Scalar* bias;
  Scalar* product;
  int64_t columns;

  template <class T>
  __device__ __forceinline__ void operator()(int64_t, int64_t row, int64_t column, const T (&values)[2],
                                             int count) const {
    Scalar* out = product + row * columns + column;
    Scalar results[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool has_bias = bias != nullptr && i < count;
      results[i] = narrow<Scalar>(has_bias ? values[i] + widen(bias[column + i]) : values[i]);
    }
    store_pair(out, results, count);
  }
};

// A matrix of any strides, as it was given.
template <class Scalar>
struct Matrix {
  const Scalar* data;
  int64_t rows, depth, row_stride, depth_stride;

  bool lies_along_depth() const { return depth_stride == 1 || depth <= 1; }
  bool lies_along_rows() const { return row_stride == 1 || rows <= 1; }
  bool has_aligned_lines(int64_t line_stride) const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && line_stride * static_cast<int64_t>(sizeof(Scalar)) % 16 == 0;
  }
  bool in_chunks(bool along_depth) const {
    return along_depth ? lies_along_depth() && has_aligned_lines(row_stride)
                       : lies_along_rows() && has_aligned_lines(depth_stride);
  }
  template <bool kAlongDepth>
  MatrixLines<Scalar, kAlongDepth> chunks() const {
    if constexpr (kAlongDepth) return {data, rows, depth, row_stride};
    return {data, depth, rows, depth_stride};
  }
  MatrixElements<Scalar> elements() const { return {data, rows, depth, row_stride, depth_stride, lies_along_depth()}; }
};

template <class Scalar>
void product_typed(const LinearProductArgs& args) {
  const Matrix<Scalar> a = {static_cast<const Scalar*>(args.a), args.rows, args.depth, args.a_row_stride,
                            args.a_column_stride};
  const Matrix<Scalar> b = {static_cast<const Scalar*>(args.b), args.columns, args.depth, args.b_row_stride,
                            args.b_column_stride};
  const AddBias<Scalar> sink = {static_cast<const Scalar*>(args.bias), static_cast<Scalar*>(args.product),
                                args.columns};
  auto run = [&](const auto& left, const auto& right) {
    multiply(args.rows, args.columns, args.depth, 1, left, right, sink);
  };
  if (a.in_chunks(true) && b.in_chunks(true)) return run(a.template chunks<true>(), b.template chunks<true>());
  if (a.in_chunks(true) && b.in_chunks(false)) return run(a.template chunks<true>(), b.template chunks<false>());
  if (a.in_chunks(false) && b.in_chunks(false)) return run(a.template chunks<false>(), b.template chunks<false>());
  run(a.elements(), b.elements());
}

// ---- sums over rows ------------------------------------------------------------------------------------------------

template <class Scalar>
struct StoreSum {
  Scalar* sums;
  __device__ void operator()(int64_t column, Scalar sum) const { sums[column] = sum; }
};

template <class Scalar>
void sum_typed(const LinearSumArgs& args) {
  sum_columns(Columns<Scalar>{static_cast<const Scalar*>(args.values), args.rows, args.columns, args.row_stride,
                              args.column_stride, Divider(args.rows > 0 ? args.rows : 1)},
              StoreSum<Scalar>{static_cast<Scalar*>(args.sums)});
}

void product(const LinearProductArgs& args) {
  dispatch(args.dtype, [&](auto* type) { product_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

void sum(const LinearSumArgs& args) {
  dispatch(args.dtype, [&](auto* type) { sum_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace

LinearKernels linear_kernels() {
  return {product, sum};
}

}  // namespace dlkernels::DLKERNELS_ISA
