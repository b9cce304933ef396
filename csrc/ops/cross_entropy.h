#pragma once

#include "ops/common.h"

namespace dlkernels::ops {

// dlkernels::cross_entropy through the dispatcher; reduction is 0 none, 1 mean, 2 sum.
std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                                 double label_smoothing);

// The loss alone, for class probabilities and weights of any types that torch promotes.
Tensor cross_entropy_functional(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, Int reduction,
                                Int ignore_index, double label_smoothing);

// ---- shared with the other cross-entropies -------------------------------------------------------------------------

inline constexpr int64_t kNone = 0, kMean = 1, kSum = 2;

struct LossArguments {
  int64_t reduction, ignore_index;
  double label_smoothing;
};

bool has_class_probabilities(const Tensor& target);

// The type of a loss: that of the logits, promoted as torch does by class probabilities and the weights beside them.
at::ScalarType loss_type(at::ScalarType logits, const Tensor& target, const OptionalTensor& weight);

// An optional tensor in a type.
inline OptionalTensor in_type(at::ScalarType type, const OptionalTensor& tensor) {
  return is_defined(tensor) ? OptionalTensor(tensor->to(type)) : tensor;
}

// Everything about target, weight and the loss's arguments that does not need the target's values: as torch, a target
// with the logits' shape holds class probabilities (of `target_type`), any other class indices.
void check_targets(const char* name, at::IntArrayRef logits, const Tensor& target, at::ScalarType target_type,
                   const Tensor& weight, const LossArguments& loss);

// IndexError unless every element of a dense int64 target is a class or ignored.
void check_target_range(const char* name, const Tensor& target, int64_t classes, int64_t ignore_index);

// The divided loss from differentiable operators; `divisor` is a constant of the target and the weights.
Tensor composed_loss(const Tensor& logits, const Tensor& target, const Tensor& weight, const Tensor& divisor,
                     int64_t ignore_index, double label_smoothing, bool per_row);

}  // namespace dlkernels::ops
