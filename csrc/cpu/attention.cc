#include "attention.h"

#include "isa.h"

namespace dlkernels::DLKERNELS_ISA {

AttentionKernels attention_kernels() {
  return {attention_forward, [](const AttentionBackwardArgs& args) {
            if (args.grad_query.data || args.grad_key.data || args.grad_value.data) attention_backward(args);
            if (args.grad_mask.type != AttentionMaskType::none) attention_mask_gradient(args);
          }};
}

}  // namespace dlkernels::DLKERNELS_ISA
