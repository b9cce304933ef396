// The parts of attention that have files of their own: forward, and a gradient each.
#pragma once

#include "cpu/attention.h"

namespace dlkernels::DLKERNELS_ISA {

void attention_forward(const AttentionForwardArgs& args);
void attention_backward(const AttentionBackwardArgs& args);  // by the next for some of the gradients

template <class Scalar>
struct AttentionArgs;
template <class Scalar>
void attention_key_gradient(const AttentionArgs<Scalar>& args, const AttentionTensor<void*>& gradient);
template <class Scalar>
void attention_value_gradient(const AttentionArgs<Scalar>& args, const AttentionTensor<void*>& gradient);
template <class Scalar>
void attention_mask_gradient(const AttentionArgs<Scalar>& args, const AttentionMask<void*>& gradient);

}  // namespace dlkernels::DLKERNELS_ISA
