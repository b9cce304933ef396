// The LSTM's kernels: lstm_forward.cc and lstm_backward.cc.
#include "lstm.h"

#include "lstm_sequence.h"

namespace dlkernels::DLKERNELS_ISA {

LstmKernels lstm_kernels() {
  return {lstm_forward, lstm_backward};
}

}  // namespace dlkernels::DLKERNELS_ISA
