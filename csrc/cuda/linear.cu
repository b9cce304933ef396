// Linear layer: y = x W^T + b, and its gradients dx = dy W and dW = dy^T x, which are the same product of other
// operands (product.cuh); db is the sum of dy over its rows.
//
// Operands are read where they lie if their lines begin at multiples of 16 bytes; any others are laid out like that.
#include "cpu/linear.h"
#include "cuda/column_sums.cuh"
#include "cuda/lay_out.cuh"
#include "cuda/multiply.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// ---- the product ---------------------------------------------------------------------------------------------------

// A matrix of any strides, as it was given.
template <class Scalar>
struct Matrix {
  const Scalar* data;
  int64_t rows, depth, row_stride, depth_stride;

  bool lies_along_depth() const { return depth_stride == 1 || depth <= 1; }

  // Lines along the depth, or along the rows, in a workspace where the matrix has none at aligned addresses.
  template <bool kAlongDepth>
  MatrixLines<Scalar, kAlongDepth> lines() const {
    const int64_t count = kAlongDepth ? rows : depth, length = kAlongDepth ? depth : rows;
    const int64_t line_stride = kAlongDepth ? row_stride : depth_stride, step = kAlongDepth ? depth_stride : row_stride;
    const Lines<Scalar> laid(data, count, length, line_stride, step);
    return {laid.data, count, length, laid.stride};
  }
};

template <class Scalar>
void product_typed(const LinearProductArgs& args) {
  const Matrix<Scalar> a = {static_cast<const Scalar*>(args.a), args.rows, args.depth, args.a_row_stride,
                            args.a_column_stride};
  const Matrix<Scalar> b = {static_cast<const Scalar*>(args.b), args.columns, args.depth, args.b_row_stride,
                            args.b_column_stride};
  const StoreRows<Scalar> sink = {static_cast<Scalar*>(args.product), args.columns,
                                  static_cast<const Scalar*>(args.bias)};
  auto run = [&](const auto& left, const auto& right) {
    multiply(args.rows, args.columns, args.depth, 1, left, right, sink);
  };
  if (b.lies_along_depth()) {
    run(a.template lines<true>(), b.template lines<true>());
  } else if (a.lies_along_depth()) {
    run(a.template lines<true>(), b.template lines<false>());
  } else {
    run(a.template lines<false>(), b.template lines<false>());
  }
}

// ---- sums over rows ------------------------------------------------------------------------------------------------

template <class Scalar>
void sum_typed(const LinearSumArgs& args) {
  sum_columns(Columns<Scalar>{static_cast<const Scalar*>(args.values), args.rows, args.columns, args.row_stride,
                              args.column_stride, Divider(args.rows > 0 ? args.rows : 1)},
              StoreSums<Scalar>{static_cast<Scalar*>(args.sums)});
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
