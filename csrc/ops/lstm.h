#pragma once

#include "ops/common.h"

namespace dlkernels::ops {

// dlkernels::lstm_cell through the dispatcher: h, c and the gates that backward reads.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                             const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                                             const OptionalTensor& b_hh);

// dlkernels::lstm_layer through the dispatcher, one layer in one direction: output, h_n, c_n, and the gates and cells
// that backward reads. Input is [T, N, input_size], or the data of a packed sequence when batch_sizes is given.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer(const Tensor& input, const Tensor& h0, const Tensor& c0,
                                                              const Tensor& w_ih, const Tensor& w_hh,
                                                              const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                                              const OptionalTensor& w_hr,
                                                              const OptionalTensor& batch_sizes, bool reverse);

}  // namespace dlkernels::ops
