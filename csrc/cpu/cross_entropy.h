// Softmax cross-entropy: what the kernels are given. Arrays are dense unless a stride is named; T is the element type
// of the logits, A the type sums are carried in (float, or double for double).
#pragma once

#include "types.h"

namespace dlkernels {

struct CrossEntropyShape {
  DType dtype;                       // of logits, target_probabilities, loss and gradients
  int64_t outer, classes, inner;     // logits are [outer][classes][inner]; a row is one (outer, inner) pair
  const void* logits;                // T; dense but for the stride between outer indices
  int64_t logits_outer_stride;       // may be 0
  const int64_t* target;             // [outer][inner], or null when target_probabilities is given
  const void* target_probabilities;  // T, dense, or null
  const void* weight;                // A [classes], or null for all ones
  int64_t ignore_index;              // rows with this target count for nothing; unused with target_probabilities
  double label_smoothing;            // in [0, 1]: mixes the target with the uniform distribution
};

enum class LossReduction : int32_t { none, mean, sum };

struct CrossEntropyForwardArgs {
  CrossEntropyShape shape;
  LossReduction reduction;
  void* loss;        // T [rows] with LossReduction::none, else T [1]
  void* statistics;  // A [2][rows]: the row's maximum, and log(sum(exp(x - maximum)))
  double* divisor;   // [1]: what the sum of the losses was divided by: the sum of the rows' weights for a mean, else 1
};

struct CrossEntropyBackwardArgs {
  CrossEntropyShape shape;
  const void* statistics;    // as forward left it
  const void* grad_loss;     // T [rows] or T [1]
  int64_t grad_loss_stride;  // 1 or 0
  const double* divisor;     // [1], as forward left it
  void* grad_logits;         // T [outer][classes][inner], or null
  void* grad_target;         // T [outer][classes][inner], or null
};

struct CrossEntropyKernels {
  void (*forward)(const CrossEntropyForwardArgs&);
  void (*backward)(const CrossEntropyBackwardArgs&);
};

#if defined(DLKERNELS_ISA)
namespace DLKERNELS_ISA {
CrossEntropyKernels cross_entropy_kernels();
}
#endif

}  // namespace dlkernels
