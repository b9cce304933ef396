#pragma once

#include "ops/common.h"

namespace dlkernels::ops {

// dlkernels::linear through the dispatcher: input [..., in] times weight [out, in] transposed, plus bias [out].
Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

// The same with the arguments of torch.nn.functional.linear: a weight of one dimension gives one feature without a
// dimension, and a bias of one number is that of every feature.
Tensor linear_functional(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

}  // namespace dlkernels::ops
