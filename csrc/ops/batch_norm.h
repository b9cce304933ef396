#pragma once

#include "ops/common.h"

namespace dlkernels::ops {

// Normalises over every dimension but the second and, when training, moves the running statistics (may be null) by
// `momentum`. With relu, the result is max(0, .) after `residual` (may be null) is added.
Tensor batch_norm_with_update(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& residual, const OptionalTensor& running_mean,
                              const OptionalTensor& running_var, bool training, double momentum, double eps, bool relu);

}  // namespace dlkernels::ops
