#pragma once

#include <array>
#include <string>
#include <variant>

#include "ops/common.h"

namespace dlkernels::ops {

// Whole numbers given as one for all dimensions or one for each.
using IntOrInts = c10::SmallVector<int64_t, 4>;
// A number of zeros, or "valid" or "same".
using Padding = std::variant<IntOrInts, std::string>;

// dlkernels::conv2d through the dispatcher. padding is top, bottom, left, right.
Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::SymIntArrayRef stride,
              c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, c10::SymInt groups);

// The same with the arguments of torch.nn.functional.conv2d.
Tensor conv2d_functional(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const IntOrInts& stride,
                         const Padding& padding, const IntOrInts& dilation, Int groups);

}  // namespace dlkernels::ops
