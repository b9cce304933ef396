// Linear layer: what the kernels are given. A is the type sums are carried in (float, or double for double).
#pragma once

#include "types.h"

namespace dlkernels {

// product = a b^T + bias: the forward pass, and with other operands the gradients of the input and of the weight.
struct LinearProductArgs {
  DType dtype;
  int64_t rows, columns, depth;
  const void* a;  // [rows][depth], of any strides
  int64_t a_row_stride, a_column_stride;
  const void* b;  // [columns][depth], of any strides
  int64_t b_row_stride, b_column_stride;
  bool along_depth;  // few rows of a: b is read along the depth, and otherwise along the columns of the product
  const void* bias;  // [columns], or null
  void* product;     // [rows][columns], dense; aliases nothing
};

// sums[j] = sum over i of values[i][j]: the gradient of the bias.
struct LinearSumArgs {
  DType dtype;
  int64_t rows, columns;
  const void* values;  // [rows][columns], of any strides
  int64_t row_stride, column_stride;
  void* sums;  // [columns]
};

struct LinearKernels {
  void (*product)(const LinearProductArgs&);
  void (*sum)(const LinearSumArgs&);
};

#if defined(DLKERNELS_ISA)
namespace DLKERNELS_ISA {
LinearKernels linear_kernels();
}
#endif

}  // namespace dlkernels
