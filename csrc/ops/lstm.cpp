// Long short-term memory for torch: one step (lstm_cell) and one layer in one direction over all steps (lstm_layer).
// Layers, directions, dropout and batch_first are composed of these in dlkernels/ops/lstm.py. Both save their inputs
// and the gates after their nonlinearity; lstm_layer saves the cells too, and a copy of its output after a projection.
#include "ops/lstm.h"

#include <ATen/ATen.h>

#include "ops/device.h"
#include "ops/linear.h"
#include "ops/second_order.h"

namespace dlkernels::ops {
namespace {

constexpr const char* kCell = "lstm_cell";
constexpr const char* kLayer = "lstm";

using CellResult = std::tuple<Tensor, Tensor, Tensor>;                         // h, c, gates
using CellGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // input, hx, cx, w_ih, w_hh, bias
using LayerResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;        // output, h_n, c_n, gates, cells
using LayerGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // those of the cell, w_hr

// ---- argument checks ---------------------------------------------------------------------------------------------

void check_shape(const char* operation, const char* name, const Tensor& tensor, at::IntArrayRef expected) {
  TORCH_CHECK(!tensor.defined() || tensor.sizes() == expected, operation, ": ", name, " has shape ",
              tensor.defined() ? tensor.sizes() : at::IntArrayRef(), ", expected ", expected);
}

// Types, devices and shapes of the parameters, given those of w_ih.
void check_parameters(const char* operation, const Tensor& input, const Tensor& w_ih, const Tensor& w_hh,
                      const Tensor& b_ih, const Tensor& b_hh, const Tensor& w_hr) {
  kernel_dtype(input, operation, "input");
  const std::pair<const char*, const Tensor*> parameters[] = {
      {"w_ih", &w_ih}, {"w_hh", &w_hh}, {"b_ih", &b_ih}, {"b_hh", &b_hh}, {"w_hr", &w_hr}};
  for (const auto& [name, tensor] : parameters) {
    check_same_device(operation, input, "input", *tensor, name);
    check_same_dtype(operation, input, "input", *tensor, name);
  }
  TORCH_CHECK(w_ih.dim() == 2 && w_ih.size(0) % 4 == 0, operation, ": w_ih has shape ", w_ih.sizes(),
              ", expected [4 * hidden_size, input_size]");
  const int64_t gates = w_ih.size(0);
  TORCH_CHECK(!w_hr.defined() || (w_hr.dim() == 2 && w_hr.size(1) == gates / 4), operation, ": w_hr has shape ",
              w_hr.defined() ? w_hr.sizes() : at::IntArrayRef(), ", expected [proj_size, ", gates / 4, "]");
  check_shape(operation, "w_hh", w_hh, {gates, w_hr.defined() ? w_hr.size(0) : gates / 4});
  check_shape(operation, "b_ih", b_ih, {gates});
  check_shape(operation, "b_hh", b_hh, {gates});
}

void check_cell(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& w_ih, const Tensor& w_hh,
                const Tensor& b_ih, const Tensor& b_hh) {
  check_parameters(kCell, input, w_ih, w_hh, b_ih, b_hh, Tensor());
  TORCH_CHECK(input.dim() == 2, "lstm_cell: input must have shape [N, input_size], got ", input.sizes());
  TORCH_CHECK(input.size(1) == w_ih.size(1), "lstm_cell: input has inconsistent input_size: got ", input.size(1),
              " expected ", w_ih.size(1));
  const std::pair<const char*, const Tensor*> states[] = {{"hidden0", &hx}, {"hidden1", &cx}};
  for (const auto& [name, state] : states) {
    check_same_device(kCell, input, "input", *state, name);
    check_same_dtype(kCell, input, "input", *state, name);
    TORCH_CHECK(state->dim() == 2, "lstm_cell: ", name, " must have shape [N, hidden_size], got ", state->sizes());
    TORCH_CHECK(state->size(0) == input.size(0), "lstm_cell: Input batch size ", input.size(0), " doesn't match ", name,
                " batch size ", state->size(0));
    TORCH_CHECK(state->size(1) == w_hh.size(1), "lstm_cell: ", name, " has inconsistent hidden_size: got ",
                state->size(1), ", expected ", w_hh.size(1));
  }
}

void check_batch_sizes(const Tensor& batch_sizes, int64_t rows, int64_t batch) {
  TORCH_CHECK(batch_sizes.dim() == 1 && batch_sizes.scalar_type() == at::kLong && batch_sizes.device().is_cpu(),
              "lstm: batch_sizes must be a 1-d int64 tensor on the CPU, got shape ", batch_sizes.sizes(), " of ",
              batch_sizes.scalar_type(), " on ", batch_sizes.device());
  TORCH_CHECK(batch_sizes.size(0) > 0, "lstm: Expected sequence length to be larger than 0 in RNN");
  int64_t total = 0, before = batch;
  for (int64_t step = 0; step < batch_sizes.size(0); ++step) {
    const int64_t size = batch_sizes.const_data_ptr<int64_t>()[step * batch_sizes.stride(0)];
    TORCH_CHECK(size > 0 && size <= before,
                "lstm: batch_sizes must be positive and never grow, beginning with at most ", batch, " sequences: got ",
                size, " after ", before);
    total += size;
    before = size;
  }
  TORCH_CHECK(total == rows, "lstm: batch_sizes add up to ", total, ", but input has ", rows, " rows");
  TORCH_CHECK(batch_sizes.const_data_ptr<int64_t>()[0] == batch, "lstm: hidden states are for ", batch,
              " sequences, but batch_sizes begins with ", batch_sizes.const_data_ptr<int64_t>()[0]);
}

void check_layer(const Tensor& input, const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                 const Tensor& b_ih, const Tensor& b_hh, const Tensor& w_hr, const Tensor& batch_sizes) {
  check_parameters(kLayer, input, w_ih, w_hh, b_ih, b_hh, w_hr);
  const bool packed = batch_sizes.defined();
  TORCH_CHECK(input.dim() == (packed ? 2 : 3), "lstm: input must have ", packed ? 2 : 3, " dimensions, got ",
              input.dim());
  TORCH_CHECK(input.size(-1) == w_ih.size(1), "lstm: input.size(-1) must be equal to input_size. Expected ",
              w_ih.size(1), ", got ", input.size(-1));
  TORCH_CHECK(packed || input.size(0) > 0, "lstm: Expected sequence length to be larger than 0 in RNN");
  const int64_t batch = packed ? (h0.dim() > 0 ? h0.size(0) : 0) : input.size(1);
  check_same_device(kLayer, input, "input", h0, "hidden[0]");
  check_same_device(kLayer, input, "input", c0, "hidden[1]");
  check_same_dtype(kLayer, input, "input", h0, "hidden[0]");
  check_same_dtype(kLayer, input, "input", c0, "hidden[1]");
  check_shape(kLayer, "hidden[0] of a layer", h0, {batch, w_hh.size(1)});
  check_shape(kLayer, "hidden[1] of a layer", c0, {batch, w_hh.size(0) / 4});
  if (packed) check_batch_sizes(batch_sizes, input.size(0), batch);
}

// ---- the kernels ----------------------------------------------------------------------------------------------------

Tensor dense(const Tensor& tensor) {
  return tensor.defined() ? tensor.contiguous() : tensor;
}

// The rows of a sequence are read where they lie when they are equally far from one another.
Tensor equally_spaced_rows(const Tensor& input) {
  const bool dense_row = input.size(-1) <= 1 || input.stride(-1) == 1;
  const bool equal = input.dim() == 2 || input.size(0) <= 1 || input.size(1) <= 1 ||
                     input.stride(0) == input.size(1) * input.stride(1);
  return dense_row && equal ? input : input.contiguous();
}
int64_t row_stride(const Tensor& input) {
  return input.dim() == 3 && input.size(1) <= 1 ? input.stride(0) : input.stride(-2);
}

// Dense operands and the layer that points at them. A cell is a layer of one step.
struct Operands {
  Tensor input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes;
  LstmLayer layer;

  Operands(const Tensor& input_, const Tensor& h0_, const Tensor& c0_, const Tensor& w_ih_, const Tensor& w_hh_,
           const OptionalTensor& b_ih_, const OptionalTensor& b_hh_, const OptionalTensor& w_hr_,
           const OptionalTensor& batch_sizes_, bool reverse)
      : input(equally_spaced_rows(input_)),
        h0(dense(h0_)),
        c0(dense(c0_)),
        w_ih(dense(w_ih_)),
        w_hh(dense(w_hh_)),
        b_ih(dense(value_or_undefined(b_ih_))),
        b_hh(dense(value_or_undefined(b_hh_))),
        w_hr(dense(value_or_undefined(w_hr_))),
        batch_sizes(dense(value_or_undefined(batch_sizes_))) {
    layer.dtype = kernel_dtype(input, kLayer, "input");
    layer.batch = h0.size(0);
    layer.steps = batch_sizes.defined() ? batch_sizes.size(0) : input.dim() == 3 ? input.size(0) : 1;
    layer.rows =
        batch_sizes.defined() ? input.size(0) : multiply_sizes("lstm: the rows of input", layer.steps, layer.batch);
    layer.input_size = w_ih.size(1);
    layer.hidden_size = w_ih.size(0) / 4;
    layer.projection_size = w_hr.defined() ? w_hr.size(0) : 0;
    layer.reverse = reverse;
    layer.batch_sizes = batch_sizes.defined() ? batch_sizes.const_data_ptr<int64_t>() : nullptr;
    layer.input = input.const_data_ptr();
    layer.input_row_stride = row_stride(input);
    layer.h0 = h0.const_data_ptr();
    layer.c0 = c0.const_data_ptr();
    layer.w_ih = w_ih.const_data_ptr();
    layer.w_hh = w_hh.const_data_ptr();
    layer.b_ih = data_or_null(b_ih);
    layer.b_hh = data_or_null(b_hh);
    layer.w_hr = data_or_null(w_hr);
  }
};

CellResult lstm_cell_kernel(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& w_ih,
                            const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh) {
  check_cell(input, hx, cx, w_ih, w_hh, value_or_undefined(b_ih), value_or_undefined(b_hh));
  const Operands operands(input, hx, cx, w_ih, w_hh, b_ih, b_hh, {}, {}, false);
  const LstmLayer& layer = operands.layer;
  const auto options = operands.input.options();
  const auto wide = options.dtype(accumulate_type(input.scalar_type()));
  Tensor h = at::empty({layer.batch, layer.hidden_size}, options);
  Tensor c = at::empty({layer.batch, layer.hidden_size}, options);
  Tensor gates = at::empty({layer.batch, 4 * layer.hidden_size}, wide);
  const bool rounds = wide.dtype() != options.dtype();  // the kernel keeps cells in the type of the sums
  const Tensor cells = rounds ? at::empty(c.sizes(), wide) : c;
  KernelsOn(input)->lstm.forward({layer, h.mutable_data_ptr(), nullptr, rounds ? c.mutable_data_ptr() : nullptr,
                                  gates.mutable_data_ptr(), cells.mutable_data_ptr()});
  return {h, c, gates};
}

LayerResult lstm_layer_kernel(const Tensor& input, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
                              const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                              const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, bool reverse) {
  check_layer(input, h0, c0, w_ih, w_hh, value_or_undefined(b_ih), value_or_undefined(b_hh), value_or_undefined(w_hr),
              value_or_undefined(batch_sizes));
  const Operands operands(input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse);
  const LstmLayer& layer = operands.layer;
  const auto options = operands.input.options();
  const auto wide = options.dtype(accumulate_type(input.scalar_type()));
  at::DimVector shape(input.sizes());
  shape.back() = w_hh.size(1);
  Tensor output = at::empty(shape, options);
  Tensor h_n = at::empty(h0.sizes(), options), c_n = at::empty(c0.sizes(), options);
  Tensor gates = at::empty({layer.rows, 4 * layer.hidden_size}, wide);
  Tensor cells = at::empty({layer.rows, layer.hidden_size}, wide);
  KernelsOn(input)->lstm.forward({layer, output.mutable_data_ptr(), h_n.mutable_data_ptr(), c_n.mutable_data_ptr(),
                                  gates.mutable_data_ptr(), cells.mutable_data_ptr()});
  return {output, h_n, c_n, gates, cells};
}

Tensor empty_when(bool wanted, const Tensor& like) {
  return wanted ? at::empty(like.sizes(), like.options()) : Tensor();
}

CellGrads lstm_cell_backward_kernel(const Tensor& grad_h, const Tensor& grad_c, const Tensor& input, const Tensor& hx,
                                    const Tensor& cx, const Tensor& w_ih, const Tensor& w_hh,
                                    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const Tensor& gates,
                                    std::array<bool, 6> output_mask) {
  const Operands operands(input, hx, cx, w_ih, w_hh, b_ih, b_hh, {}, {}, false);
  const Tensor dense_grad_h = grad_h.contiguous(), dense_grad_c = grad_c.contiguous(), dense_gates = gates.contiguous();
  check_shape(kCell, "grad_h", grad_h, hx.sizes());
  check_shape(kCell, "grad_c", grad_c, cx.sizes());
  check_shape(kCell, "gates", gates, {input.size(0), w_ih.size(0)});
  Tensor grad_input = empty_when(output_mask[0], operands.input), grad_hx = empty_when(output_mask[1], operands.h0);
  Tensor grad_cx = empty_when(output_mask[2], operands.c0), grad_w_ih = empty_when(output_mask[3], operands.w_ih);
  Tensor grad_w_hh = empty_when(output_mask[4], operands.w_hh);
  Tensor grad_bias = output_mask[5] ? at::empty({w_ih.size(0)}, w_ih.options()) : Tensor();
  KernelsOn(input)->lstm.backward({operands.layer, dense_grad_h.const_data_ptr(), nullptr,
                                   dense_grad_c.const_data_ptr(), nullptr, dense_gates.const_data_ptr(), nullptr,
                                   mutable_data_or_null(grad_input), mutable_data_or_null(grad_hx),
                                   mutable_data_or_null(grad_cx), mutable_data_or_null(grad_w_ih),
                                   mutable_data_or_null(grad_w_hh), mutable_data_or_null(grad_bias), nullptr});
  return {grad_input, grad_hx, grad_cx, grad_w_ih, grad_w_hh, grad_bias};
}

LayerGrads lstm_layer_backward_kernel(const Tensor& grad_output, const Tensor& grad_h_n, const Tensor& grad_c_n,
                                      const Tensor& input, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
                                      const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                      const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, bool reverse,
                                      const OptionalTensor& output, const Tensor& gates, const Tensor& cells,
                                      std::array<bool, 7> output_mask) {
  const Operands operands(input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse);
  const LstmLayer& layer = operands.layer;
  at::DimVector output_shape(input.sizes());
  output_shape.back() = w_hh.size(1);
  check_shape(kLayer, "grad_output", grad_output, output_shape);
  if (is_defined(w_hr)) {
    TORCH_CHECK(is_defined(output), kLayer, ": output must be given with w_hr");
    check_shape(kLayer, "output", *output, output_shape);
  }
  check_shape(kLayer, "grad_h_n", grad_h_n, h0.sizes());
  check_shape(kLayer, "grad_c_n", grad_c_n, c0.sizes());
  check_shape(kLayer, "gates", gates, {layer.rows, 4 * layer.hidden_size});
  check_shape(kLayer, "cells", cells, {layer.rows, layer.hidden_size});
  const Tensor dense_grad_output = grad_output.contiguous(), dense_grad_h_n = grad_h_n.contiguous();
  const Tensor dense_grad_c_n = grad_c_n.contiguous();
  const Tensor dense_output = is_defined(w_hr) ? output->contiguous() : Tensor();
  const Tensor dense_gates = gates.contiguous(), dense_cells = cells.contiguous();
  Tensor grad_input = empty_when(output_mask[0], operands.input), grad_h0 = empty_when(output_mask[1], operands.h0);
  Tensor grad_c0 = empty_when(output_mask[2], operands.c0), grad_w_ih = empty_when(output_mask[3], operands.w_ih);
  Tensor grad_w_hh = empty_when(output_mask[4], operands.w_hh);
  Tensor grad_bias = output_mask[5] ? at::empty({w_ih.size(0)}, w_ih.options()) : Tensor();
  Tensor grad_w_hr = empty_when(output_mask[6] && operands.w_hr.defined(), operands.w_hr);
  KernelsOn(input)->lstm.backward(
      {layer, dense_grad_output.const_data_ptr(), dense_grad_h_n.const_data_ptr(), dense_grad_c_n.const_data_ptr(),
       data_or_null(dense_output), dense_gates.const_data_ptr(), dense_cells.const_data_ptr(),
       mutable_data_or_null(grad_input), mutable_data_or_null(grad_h0), mutable_data_or_null(grad_c0),
       mutable_data_or_null(grad_w_ih), mutable_data_or_null(grad_w_hh), mutable_data_or_null(grad_bias),
       mutable_data_or_null(grad_w_hr)});
  return {grad_input, grad_h0, grad_c0, grad_w_ih, grad_w_hh, grad_bias, grad_w_hr};
}

// ---- through the dispatcher ----------------------------------------------------------------------------------------

CellGrads lstm_cell_backward(const Tensor& grad_h, const Tensor& grad_c, const Tensor& input, const Tensor& hx,
                             const Tensor& cx, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                             const OptionalTensor& b_hh, const Tensor& gates, std::array<bool, 6> output_mask) {
  static const auto op = find_operator<decltype(lstm_cell_backward_kernel)>("dlkernels::lstm_cell_backward");
  return op.call(grad_h, grad_c, input, hx, cx, w_ih, w_hh, b_ih, b_hh, gates, output_mask);
}

LayerGrads lstm_layer_backward(const Tensor& grad_output, const Tensor& grad_h_n, const Tensor& grad_c_n,
                               const Tensor& input, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
                               const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                               const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, bool reverse,
                               const OptionalTensor& output, const Tensor& gates, const Tensor& cells,
                               std::array<bool, 7> output_mask) {
  static const auto op = find_operator<decltype(lstm_layer_backward_kernel)>("dlkernels::lstm_layer_backward");
  return op.call(grad_output, grad_h_n, grad_c_n, input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse,
                 output, gates, cells, output_mask);
}

// ---- composed of differentiable operators, for gradients of gradients --------------------------------------------

struct State {
  Tensor h, c;
};

// `bias`, `w_hr` may be undefined.
State composed_cell(const Tensor& input, const State& before, const Tensor& w_ih, const Tensor& w_hh,
                    const Tensor& bias, const Tensor& w_hr) {
  const Tensor a = ops::linear(input, w_ih, optional_of(bias)) + ops::linear(before.h, w_hh, std::nullopt);
  const auto gates = a.chunk(4, 1);
  const Tensor c = gates[1].sigmoid() * before.c + gates[0].sigmoid() * gates[2].tanh();
  const Tensor h = gates[3].sigmoid() * c.tanh();
  return {w_hr.defined() ? ops::linear(h, w_hr, std::nullopt) : h, c};
}

// A packed batch as a dense one: padded[t][n] is row places[t][n] of the packed rows, and of a row of zeros after them
// where sequence n has ended.
struct Padding {
  Tensor places;   // [steps, batch]
  Tensor running;  // [steps, batch, 1]: whether sequence n has a step t

  Padding(const Tensor& batch_sizes, const c10::SymInt& rows, const c10::SymInt& batch) {
    const Tensor sequences = at::arange(c10::Scalar(batch), batch_sizes.options());
    const Tensor first = (batch_sizes.cumsum(0) - batch_sizes).unsqueeze(1);
    const Tensor running_ = sequences < batch_sizes.unsqueeze(1);
    places = at::where(running_, first + sequences, at::scalar_tensor(c10::Scalar(rows), batch_sizes.options()));
    running = running_.unsqueeze(2);
  }
  Tensor padded(const Tensor& rows) const {
    const Tensor ended = at::zeros_symint({1, rows.sym_size(1)}, rows.options());
    return at::cat({rows, ended}).index({places});
  }
  Tensor packed(const Tensor& padded, const c10::SymInt& rows) const {
    Tensor all = at::zeros_symint({rows + 1, padded.sym_size(2)}, padded.options());
    return all.index_put({places}, padded).narrow_symint(0, 0, rows);
  }
};

// inputs: input, h0, c0, w_ih, w_hh, bias, w_hr; returns output, h_n, c_n. A packed batch is padded: which of its
// sequences run is data, and a graph that is traced cannot depend on it.
variable_list composed_layer(const variable_list& inputs, const Tensor& batch_sizes, bool reverse) {
  std::optional<Padding> padding;
  if (batch_sizes.defined()) padding.emplace(batch_sizes, inputs[0].sym_size(0), inputs[1].sym_size(0));
  const Tensor input = padding ? padding->padded(inputs[0]) : inputs[0];
  const int64_t steps = input.size(0);
  State state = {inputs[1], inputs[2]};
  std::vector<Tensor> outputs(steps);
  for (int64_t turn = 0; turn < steps; ++turn) {
    const int64_t step = reverse ? steps - 1 - turn : turn;
    State updated = composed_cell(input.select(0, step), state, inputs[3], inputs[4], inputs[5], inputs[6]);
    outputs[step] = updated.h;
    if (padding) {
      const Tensor running = padding->running.select(0, step);
      updated = {at::where(running, updated.h, state.h), at::where(running, updated.c, state.c)};
    }
    state = updated;
  }
  const Tensor output = at::stack(outputs);
  return {padding ? padding->packed(output, inputs[0].sym_size(0)) : output, state.h, state.c};
}

// b_ih + b_hh as one variable: their gradients are the same.
Tensor sum_of_biases(const Tensor& b_ih, const Tensor& b_hh) {
  at::AutoGradMode enable(true);
  if (!b_ih.defined() || !b_hh.defined()) return b_ih.defined() ? b_ih : b_hh;
  return b_ih + b_hh;
}

// ---- autograd ----------------------------------------------------------------------------------------------------

// Answers, argument by argument, whether an input wants its gradient: absent optional arguments have no edge.
class WantedGrads {
 public:
  explicit WantedGrads(AutogradContext* ctx) : ctx_(ctx) {}
  bool next(const Tensor& argument) { return argument.defined() && ctx_->needs_input_grad(edge_++); }

 private:
  AutogradContext* ctx_;
  size_t edge_ = 0;
};

struct CellBackwardNode : torch::autograd::Function<CellBackwardNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_h, const Tensor& grad_c, const Tensor& input,
                               const Tensor& hx, const Tensor& cx, const Tensor& w_ih, const Tensor& w_hh,
                               const OptionalTensor& b_ih, const OptionalTensor& b_hh, const Tensor& gates,
                               std::array<bool, 6> output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward(
        {grad_h, grad_c, input, hx, cx, w_ih, w_hh, value_or_undefined(b_ih), value_or_undefined(b_hh)});
    ctx->set_materialize_grads(false);
    auto [grad_input, grad_hx, grad_cx, grad_w_ih, grad_w_hh, grad_bias] =
        lstm_cell_backward(grad_h, grad_c, input, hx, cx, w_ih, w_hh, b_ih, b_hh, gates, output_mask);
    return with_placeholders({grad_input, grad_hx, grad_cx, grad_w_ih, grad_w_hh, grad_bias}, input);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &b_ih = saved[7], &b_hh = saved[8];
    auto cell = [](const variable_list& inputs) -> variable_list {
      const State state = composed_cell(inputs[0], {inputs[1], inputs[2]}, inputs[3], inputs[4], inputs[5], Tensor());
      return {state.h, state.c};
    };
    const variable_list inputs = {saved[2], saved[3], saved[4], saved[5], saved[6], sum_of_biases(b_ih, b_hh)};
    const variable_list second = differentiate_twice(cell, inputs, {saved[0], saved[1]}, grads);
    return {second[6],
            second[7],
            second[0],
            second[1],
            second[2],
            second[3],
            second[4],
            b_ih.defined() ? second[5] : Tensor(),
            b_hh.defined() ? second[5] : Tensor(),
            Tensor(),
            Tensor()};
  }
};

CellGrads lstm_cell_backward_autograd(const Tensor& grad_h, const Tensor& grad_c, const Tensor& input, const Tensor& hx,
                                      const Tensor& cx, const Tensor& w_ih, const Tensor& w_hh,
                                      const OptionalTensor& b_ih, const OptionalTensor& b_hh, const Tensor& gates,
                                      std::array<bool, 6> output_mask) {
  if (!must_record(grad_h, grad_c, input, hx, cx, w_ih, w_hh, b_ih, b_hh)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return lstm_cell_backward(grad_h, grad_c, input, hx, cx, w_ih, w_hh, b_ih, b_hh, gates, output_mask);
  }
  const variable_list g = without_placeholders(
      CellBackwardNode::apply(grad_h, grad_c, input, hx, cx, w_ih, w_hh, b_ih, b_hh, gates, output_mask), output_mask);
  return {g[0], g[1], g[2], g[3], g[4], g[5]};
}

struct CellNode : torch::autograd::Function<CellNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& hx, const Tensor& cx,
                               const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                               const OptionalTensor& b_hh, Tensor* gates) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor h, c;
    std::tie(h, c, *gates) = lstm_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh);
    ctx->save_for_backward({input, hx, cx, w_ih, w_hh, value_or_undefined(b_ih), value_or_undefined(b_hh), *gates});
    return {h, c};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    WantedGrads wanted(ctx);
    std::array<bool, 7> wants;
    for (size_t i = 0; i < wants.size(); ++i) wants[i] = wanted.next(saved[i]);
    auto [grad_input, grad_hx, grad_cx, grad_w_ih, grad_w_hh, grad_bias] = lstm_cell_backward(
        grads[0], grads[1], saved[0], saved[1], saved[2], saved[3], saved[4], optional_of(saved[5]),
        optional_of(saved[6]), saved[7], {wants[0], wants[1], wants[2], wants[3], wants[4], wants[5] || wants[6]});
    return {grad_input,
            grad_hx,
            grad_cx,
            grad_w_ih,
            grad_w_hh,
            wants[5] ? grad_bias : Tensor(),
            wants[6] ? grad_bias : Tensor(),
            Tensor()};
  }
};

CellResult lstm_cell_autograd(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& w_ih,
                              const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh) {
  if (!must_record(input, hx, cx, w_ih, w_hh, b_ih, b_hh)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return lstm_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh);
  }
  Tensor gates;
  const variable_list outputs = CellNode::apply(input, hx, cx, w_ih, w_hh, b_ih, b_hh, &gates);
  return {outputs[0], outputs[1], gates};
}

struct LayerBackwardNode : torch::autograd::Function<LayerBackwardNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& grad_h_n,
                               const Tensor& grad_c_n, const Tensor& input, const Tensor& h0, const Tensor& c0,
                               const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                               const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                               const OptionalTensor& batch_sizes, bool reverse, const OptionalTensor& output,
                               const Tensor& gates, const Tensor& cells, std::array<bool, 7> output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad_output, grad_h_n, grad_c_n, input, h0, c0, w_ih, w_hh, value_or_undefined(b_ih),
                            value_or_undefined(b_hh), value_or_undefined(w_hr), value_or_undefined(batch_sizes)});
    ctx->saved_data["reverse"] = reverse;
    ctx->set_materialize_grads(false);
    auto [grad_input, grad_h0, grad_c0, grad_w_ih, grad_w_hh, grad_bias, grad_w_hr] =
        lstm_layer_backward(grad_output, grad_h_n, grad_c_n, input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes,
                            reverse, output, gates, cells, output_mask);
    return with_placeholders({grad_input, grad_h0, grad_c0, grad_w_ih, grad_w_hh, grad_bias, grad_w_hr}, input);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &b_ih = saved[8], &b_hh = saved[9], &w_hr = saved[10], &batch_sizes = saved[11];
    const bool reverse = ctx->saved_data["reverse"].toBool();
    auto layer = [&](const variable_list& inputs) { return composed_layer(inputs, batch_sizes, reverse); };
    const variable_list inputs = {saved[3], saved[4], saved[5], saved[6], saved[7], sum_of_biases(b_ih, b_hh), w_hr};
    const variable_list second = differentiate_twice(layer, inputs, {saved[0], saved[1], saved[2]}, grads);
    variable_list result = {second[7],
                            second[8],
                            second[9],
                            second[0],
                            second[1],
                            second[2],
                            second[3],
                            second[4],
                            b_ih.defined() ? second[5] : Tensor(),
                            b_hh.defined() ? second[5] : Tensor(),
                            second[6]};
    result.resize(17);  // batch_sizes, reverse, output, gates, cells, output_mask
    return result;
  }
};

LayerGrads lstm_layer_backward_autograd(const Tensor& grad_output, const Tensor& grad_h_n, const Tensor& grad_c_n,
                                        const Tensor& input, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
                                        const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                        const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, bool reverse,
                                        const OptionalTensor& output, const Tensor& gates, const Tensor& cells,
                                        std::array<bool, 7> output_mask) {
  if (!must_record(grad_output, grad_h_n, grad_c_n, input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return lstm_layer_backward(grad_output, grad_h_n, grad_c_n, input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr,
                               batch_sizes, reverse, output, gates, cells, output_mask);
  }
  const variable_list g = without_placeholders(
      LayerBackwardNode::apply(grad_output, grad_h_n, grad_c_n, input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr,
                               batch_sizes, reverse, output, gates, cells, output_mask),
      output_mask);
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6]};
}

// Gates and cells have no history; they reach the caller through `saved_outputs`.
struct LayerNode : torch::autograd::Function<LayerNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& h0, const Tensor& c0,
                               const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                               const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                               const OptionalTensor& batch_sizes, bool reverse, LayerResult* saved_outputs) {
    at::AutoDispatchBelowADInplaceOrView guard;
    *saved_outputs = lstm_layer(input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse);
    const auto& [output, h_n, c_n, gates, cells] = *saved_outputs;
    // The output is the caller's to change in place, as torch's is: it follows from the gates and cells, or is copied
    // where a projection came after these.
    ctx->save_for_backward({input, h0, c0, w_ih, w_hh, value_or_undefined(b_ih), value_or_undefined(b_hh),
                            value_or_undefined(w_hr), value_or_undefined(batch_sizes),
                            is_defined(w_hr) ? output.clone() : Tensor(), gates, cells});
    ctx->saved_data["reverse"] = reverse;
    return {output, h_n, c_n};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    WantedGrads wanted(ctx);
    std::array<bool, 8> wants;
    for (size_t i = 0; i < wants.size(); ++i) wants[i] = wanted.next(saved[i]);
    auto [grad_input, grad_h0, grad_c0, grad_w_ih, grad_w_hh, grad_bias, grad_w_hr] =
        lstm_layer_backward(grads[0], grads[1], grads[2], saved[0], saved[1], saved[2], saved[3], saved[4],
                            optional_of(saved[5]), optional_of(saved[6]), optional_of(saved[7]), optional_of(saved[8]),
                            ctx->saved_data["reverse"].toBool(), optional_of(saved[9]), saved[10], saved[11],
                            {wants[0], wants[1], wants[2], wants[3], wants[4], wants[5] || wants[6], wants[7]});
    return {grad_input,
            grad_h0,
            grad_c0,
            grad_w_ih,
            grad_w_hh,
            wants[5] ? grad_bias : Tensor(),
            wants[6] ? grad_bias : Tensor(),
            grad_w_hr,
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

LayerResult lstm_layer_autograd(const Tensor& input, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
                                const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, bool reverse) {
  if (!must_record(input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return lstm_layer(input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse);
  }
  LayerResult saved;
  const variable_list outputs =
      LayerNode::apply(input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse, &saved);
  return {outputs[0], outputs[1], outputs[2], std::get<3>(saved), std::get<4>(saved)};
}

// ---- autocast ------------------------------------------------------------------------------------------------------

// A cell state that the caller keeps in float32 stays in float32, and so does the step.
template <c10::DispatchKey key, c10::DeviceType device>
CellResult lstm_cell_autocast(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& w_ih,
                              const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const bool wide = cx.defined() && cx.scalar_type() == at::kFloat;
  const Autocast cast{wide ? at::kFloat : at::autocast::get_autocast_dtype(device), device};
  return lstm_cell(cast(input), cast(hx), cast(cx), cast(w_ih), cast(w_hh), cast(b_ih), cast(b_hh));
}

// As torch has it: dense batches without projections are in the lower type throughout; packed ones and projections keep
// to the rule of the cell, but what was projected leaves in the lower type.
template <c10::DispatchKey key, c10::DeviceType device>
LayerResult lstm_layer_autocast(const Tensor& input, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
                                const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, bool reverse) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const Autocast narrow{at::autocast::get_autocast_dtype(device), device};
  const bool wide = c0.scalar_type() == at::kFloat && (is_defined(w_hr) || is_defined(batch_sizes));
  const Autocast cast = wide ? Autocast{at::kFloat, device} : narrow;
  LayerResult result = lstm_layer(cast(input), cast(h0), cast(c0), cast(w_ih), cast(w_hh), cast(b_ih), cast(b_hh),
                                  cast(w_hr), batch_sizes, reverse);
  if (wide && is_defined(w_hr)) {
    std::get<0>(result) = narrow(std::get<0>(result));
    std::get<1>(result) = narrow(std::get<1>(result));
  }
  return result;
}

}  // namespace

CellResult lstm_cell(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& w_ih, const Tensor& w_hh,
                     const OptionalTensor& b_ih, const OptionalTensor& b_hh) {
  static const auto op = find_operator<decltype(lstm_cell_kernel)>("dlkernels::lstm_cell");
  return op.call(input, hx, cx, w_ih, w_hh, b_ih, b_hh);
}

LayerResult lstm_layer(const Tensor& input, const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                       const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                       const OptionalTensor& batch_sizes, bool reverse) {
  static const auto op = find_operator<decltype(lstm_layer_kernel)>("dlkernels::lstm_layer");
  return op.call(input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse);
}

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("lstm_cell", &lstm_cell_kernel);
  m.impl("lstm_cell_backward", &lstm_cell_backward_kernel);
  m.impl("lstm_layer", &lstm_layer_kernel);
  m.impl("lstm_layer_backward", &lstm_layer_backward_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("lstm_cell", &lstm_cell_kernel);
  m.impl("lstm_cell_backward", &lstm_cell_backward_kernel);
  m.impl("lstm_layer", &lstm_layer_kernel);
  m.impl("lstm_layer_backward", &lstm_layer_backward_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) {
  m.impl("lstm_cell", &lstm_cell_autograd);
  m.impl("lstm_cell_backward", &lstm_cell_backward_autograd);
  m.impl("lstm_layer", &lstm_layer_autograd);
  m.impl("lstm_layer_backward", &lstm_layer_backward_autograd);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCPU, m) {
  m.impl("lstm_cell", &lstm_cell_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
  m.impl("lstm_layer", &lstm_layer_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCUDA, m) {
  m.impl("lstm_cell", &lstm_cell_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
  m.impl("lstm_layer", &lstm_layer_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace dlkernels::ops
