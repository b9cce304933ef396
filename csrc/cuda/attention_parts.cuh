// The parts of attention that have files of their own (attention_forward.cu, attention_backward.cu,
// attention_mask_gradient.cu).
#pragma once

#include "cpu/attention.h"

namespace dlkernels::DLKERNELS_ISA {

void attention_forward(const AttentionForwardArgs& args);
void attention_backward(const AttentionBackwardArgs& args);  // the mask's gradient by the next

template <class Scalar>
struct AttentionArgs;
template <class Scalar>
void attention_mask_gradient(const AttentionArgs<Scalar>& args, const AttentionMask<void*>& gradient);

}  // namespace dlkernels::DLKERNELS_ISA
