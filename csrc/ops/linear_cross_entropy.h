#pragma once

#include "ops/common.h"

namespace dlkernels::ops {

// dlkernels::linear_cross_entropy through the dispatcher; reduction is 0 none, 1 mean, 2 sum.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& input, const Tensor& linear_weight,
                                                        const OptionalTensor& linear_bias, const Tensor& target,
                                                        const OptionalTensor& weight, int64_t reduction,
                                                        int64_t ignore_index, double label_smoothing, bool wide_loss);

// The loss alone, for class probabilities and weights of any types that torch promotes.
Tensor linear_cross_entropy_functional(const Tensor& input, const Tensor& linear_weight,
                                       const OptionalTensor& linear_bias, const Tensor& target,
                                       const OptionalTensor& weight, Int reduction, Int ignore_index,
                                       double label_smoothing);

}  // namespace dlkernels::ops
