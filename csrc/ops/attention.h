#pragma once

#include "ops/common.h"

namespace dlkernels::ops {

// dlkernels::attention through the dispatcher: output; the same in float32 where it is a half type (else
// empty); statistics [2, ..., heads, L] of the rows (largest score, sum of exponentials below it); the seed of
// dropout.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                                     std::optional<double> scale, bool enable_gqa);

}  // namespace dlkernels::ops
