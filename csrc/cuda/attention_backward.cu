// Attention backward, for query, key and value: see cpu/attention.h for the idea, attention_pass.cuh for the passes.
//
// Each gradient is a pass of its own, which computes the scores again: seven products more than four, and in return no
// sum that blocks add to, and no memory but D.
#include "cuda/attention_gradient.cuh"
#include "cuda/attention_parts.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

template <class Scalar>
void backward_typed(const AttentionBackwardArgs& given) {
  const AttentionArgs<Scalar> args = gradient_args<Scalar>(given);
  launch_gradient<AttentionPass::query>(args, given.grad_query);
  attention_key_gradient(args, given.grad_key);
  attention_value_gradient(args, given.grad_value);
  if (given.grad_mask.type != AttentionMaskType::none) attention_mask_gradient(args, given.grad_mask);
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& args) {
  dispatch(args.dtype, [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace dlkernels::DLKERNELS_ISA
