#pragma once

#include "ops/common.h"

namespace dlkernels::ops {

// dlkernels::cross_entropy through the dispatcher; reduction is 0 none, 1 mean, 2 sum.
std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                                 double label_smoothing);

}  // namespace dlkernels::ops
