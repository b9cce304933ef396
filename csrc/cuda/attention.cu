// Scaled dot-product attention on a device: see cpu/attention.h for the idea, attention_pass.cuh for the kernels.
#include "cuda/attention_parts.cuh"

namespace dlkernels::DLKERNELS_ISA {

AttentionKernels attention_kernels() {
  return {attention_forward, attention_backward};
}

}  // namespace dlkernels::DLKERNELS_ISA
