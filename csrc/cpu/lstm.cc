// The LSTM's kernels, and the plain product that gradients of gradients are composed of.
#include "lstm.h"

#include "gemm.h"
#include "lstm_sequence.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

void lstm_product(const LstmProductArgs& args) {
  dispatch(args.dtype, [&](auto* type) {
    using Scalar = std::remove_pointer_t<decltype(type)>;
    using T = accumulate_t<Scalar>;
    const Matrix<Scalar> a = {static_cast<const Scalar*>(args.a), args.a_row_stride, args.a_column_stride};
    const Matrix<Scalar> b = {static_cast<const Scalar*>(args.b), args.b_row_stride, args.b_column_stride};
    gemm<T>(args.rows, args.columns, args.depth, a, b.transposed(),
            [&](int64_t i, int64_t j, int64_t count, const T* values) {
              narrow_row(values, count, static_cast<Scalar*>(args.product) + i * args.columns + j);
            });
  });
}

}  // namespace

LstmKernels lstm_kernels() {
  return {lstm_forward, lstm_backward, lstm_product};
}

}  // namespace dlkernels::DLKERNELS_ISA
