// The gradient of attention's keys (attention_backward.cu).
#include "cuda/attention_gradient.cuh"
#include "cuda/attention_parts.cuh"

namespace dlkernels::DLKERNELS_ISA {

template <class Scalar>
void attention_key_gradient(const AttentionArgs<Scalar>& args, const AttentionTensor<void*>& gradient) {
  launch_gradient<AttentionPass::key>(args, gradient);
}

template void attention_key_gradient(const AttentionArgs<float>&, const AttentionTensor<void*>&);
template void attention_key_gradient(const AttentionArgs<double>&, const AttentionTensor<void*>&);
template void attention_key_gradient(const AttentionArgs<bfloat16>&, const AttentionTensor<void*>&);
template void attention_key_gradient(const AttentionArgs<float16>&, const AttentionTensor<void*>&);

}  // namespace dlkernels::DLKERNELS_ISA
