// Long short-term memory on a device: see lstm_forward.cu, lstm_backward.cu, and lstm_sequence.cuh for what they share.
#include "cuda/lstm_parts.cuh"

namespace dlkernels::DLKERNELS_ISA {

LstmKernels lstm_kernels() {
  return {lstm_forward, lstm_backward};
}

}  // namespace dlkernels::DLKERNELS_ISA
