// The two directions of an LSTM, in lstm_forward.cu and lstm_backward.cu.
#pragma once

#include "cpu/lstm.h"

namespace dlkernels::DLKERNELS_ISA {

void lstm_forward(const LstmForwardArgs& args);
void lstm_backward(const LstmBackwardArgs& args);

}  // namespace dlkernels::DLKERNELS_ISA
