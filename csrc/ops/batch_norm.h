#pragma once

#include <optional>
#include <string_view>

#include "ops/common.h"

namespace dlkernels::ops {

using OptionalName = std::optional<std::string_view>;

// Normalises over every dimension but the second and, when training, moves the running statistics (may be null) by
// `momentum`. The activation, "relu" or "relu6", is applied after `residual` (may be null) is added.
Tensor batch_norm_with_update(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& residual, const OptionalTensor& running_mean,
                              const OptionalTensor& running_var, bool training, double momentum, double eps,
                              OptionalName activation);

}  // namespace dlkernels::ops
