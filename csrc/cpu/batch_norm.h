// Batch normalisation: what the kernels are given. T is the element type of the input, A the type sums are carried in
// (float, or double for double). Arrays are dense.
#pragma once

#include "types.h"

namespace dlkernels {

// Applied after the residual is added: y = max(0, .), or that no greater than 6.
enum class Activation : int32_t { none, relu, relu6 };

// ReLU6 lets gradients pass where its argument, once rounded to Scalar, lies between 0 and 6. The largest argument that
// rounds to 0, and the smallest that rounds to 6: ties go to these two, which are even.
template <class Scalar>
struct Relu6Range {
  static constexpr double low = 0, high = 6;
};
template <>
struct Relu6Range<bfloat16> {
  static constexpr double low = 0x1p-134, high = 6 - 0x1p-6;
};
template <>
struct Relu6Range<float16> {
  static constexpr double low = 0x1p-25, high = 6 - 0x1p-9;
};

struct BatchNormShape {
  DType dtype;                     // of input, residual, output and their gradients
  int64_t batch, channels, inner;  // [batch][channels][inner], or [batch][inner][channels] when channels_last
  bool channels_last;
  Activation activation;
  bool training;  // statistics of this batch, which depend on the input; else given constants
};

struct BatchNormForwardArgs {
  BatchNormShape shape;
  const void* input;     // T
  const void* residual;  // T like input, added after the affine map; or null
  const void* weight;    // A [channels], or null for ones
  const void* bias;      // A [channels], or null for zeros
  double eps;
  double* mean;      // [channels]; written when training, read otherwise
  double* variance;  // [channels], biased; written when training, read otherwise
  void* output;      // T like input; may not alias it
};

struct BatchNormBackwardArgs {
  BatchNormShape shape;
  const void* grad_output;  // T like input
  const void* input;        // T
  const void* output;       // T, what forward wrote; read only with ReLU
  const void* weight;       // A [channels], or null
  const void* bias;         // A [channels], or null; read only with ReLU6, whose argument (no residual) is found again
  const double* mean;       // [channels]
  const double* variance;   // [channels]
  double eps;
  void* grad_input;     // T like input, or null
  void* grad_residual;  // T like input, or null
  void* grad_weight;    // A [channels], or null
  void* grad_bias;      // A [channels], or null
};

struct BatchNormKernels {
  void (*forward)(const BatchNormForwardArgs&);
  void (*backward)(const BatchNormBackwardArgs&);
};

#if defined(DLKERNELS_ISA)
namespace DLKERNELS_ISA {
BatchNormKernels batch_norm_kernels();
}
#endif

}  // namespace dlkernels
