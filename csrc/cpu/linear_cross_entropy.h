// Softmax cross-entropy of a linear layer: what the kernels are given. Arrays are dense unless a stride is named; T is
// the element type of the layer, A the type sums are carried in (float, or double for double).
#pragma once

#include "cross_entropy.h"

namespace dlkernels {

struct LinearCrossEntropyShape {
  DType dtype;         // of input, linear_weight, linear_bias and their gradients
  DType target_dtype;  // of target_probabilities and its gradient: accumulates in the same type as dtype
  int64_t rows, features, classes;
  const void* input;  // T [rows][features], dense but for the stride between rows
  int64_t input_row_stride;
  const void* linear_weight;  // T [classes][features], dense but for the stride between rows
  int64_t linear_weight_row_stride;
  const void* linear_bias;           // T [classes], or null
  const int64_t* target;             // [rows], or null when target_probabilities is given
  const void* target_probabilities;  // target_dtype [rows][classes], or null
  const void* weight;                // A [classes], or null for all ones
  int64_t ignore_index;              // rows with this target count for nothing; unused with target_probabilities
  double label_smoothing;            // in [0, 1]: mixes the target with the uniform distribution
};

struct LinearCrossEntropyForwardArgs {
  LinearCrossEntropyShape shape;
  LossReduction reduction;
  void* loss;        // A [rows] with LossReduction::none, else A [1]
  void* statistics;  // A [3][rows]: the row's largest logit, log(sum(exp(x - maximum))), and the mass of its target
  double* divisor;   // [1]: what the sum of the losses was divided by: the sum of the rows' weights for a mean, else 1
};

struct LinearCrossEntropyBackwardArgs {
  LinearCrossEntropyShape shape;
  const void* statistics;    // as forward left it
  const void* grad_loss;     // A [rows] or A [1]
  int64_t grad_loss_stride;  // 1 or 0
  const double* divisor;     // [1], as forward left it
  void* grad_input;          // T [rows][features], or null
  void* grad_linear_weight;  // T [classes][features], or null
  void* grad_linear_bias;    // T [classes], or null
  void* grad_target;         // target_dtype [rows][classes], or null
};

struct LinearCrossEntropyKernels {
  void (*forward)(const LinearCrossEntropyForwardArgs&);
  void (*backward)(const LinearCrossEntropyBackwardArgs&);
};

#if defined(DLKERNELS_ISA)
namespace DLKERNELS_ISA {
LinearCrossEntropyKernels linear_cross_entropy_kernels();
}
#endif

}  // namespace dlkernels
