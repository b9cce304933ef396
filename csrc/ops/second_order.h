// Second-order gradients. A backward kernel has no derivative kernel of its own: the operation is written once more as
// a composition of differentiable operators, and that composition is differentiated twice.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd.h>

#include <array>
#include <vector>

#include "ops/common.h"

namespace dlkernels::ops {

// A recorded node cannot return an undefined tensor: gradients that were not asked for leave it as empty ones, and the
// caller takes them out again.
inline variable_list with_placeholders(variable_list grads, const Tensor& like) {
  for (Tensor& grad : grads) {
    if (!grad.defined()) grad = at::empty({0}, like.options());
  }
  return grads;
}
template <size_t count>
variable_list without_placeholders(variable_list grads, const std::array<bool, count>& output_mask) {
  for (size_t i = 0; i < count; ++i) {
    if (!output_mask[i]) grads[i] = Tensor();
  }
  return grads;
}

// For backward: (inputs, grad_outputs) -> grad_inputs, given gradients of grad_inputs (undefined where there is none),
// returns those of the inputs followed by those of grad_outputs. `forward` maps the inputs to the outputs.
template <class Forward>
variable_list differentiate_twice(Forward&& forward, const variable_list& inputs, const variable_list& grad_outputs,
                                  const variable_list& grad_of_grad_inputs) {
  const bool create_graph = c10::GradMode::is_enabled();
  at::AutoGradMode enable(true);
  // Views, so that one tensor passed as two arguments stays two variables. Contiguous ones: torch adds in another order
  // where strides differ.
  auto separate = [](const variable_list& tensors) {
    variable_list views;
    for (const Tensor& t : tensors) views.push_back(t.defined() ? t.view_as(t).contiguous() : t);
    return views;
  };
  const variable_list xs = separate(inputs), gs = separate(grad_outputs);
  const size_t count = xs.size() + gs.size();
  variable_list result(count);

  const variable_list outputs = forward(xs);
  variable_list used_outputs, used_grads, first_variables, seeds;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (gs[i].defined() && outputs[i].defined() && outputs[i].requires_grad()) {
      used_outputs.push_back(outputs[i]);
      used_grads.push_back(gs[i]);
    }
  }
  for (size_t i = 0; i < xs.size(); ++i) {
    if (grad_of_grad_inputs[i].defined() && xs[i].requires_grad()) {
      first_variables.push_back(xs[i]);
      seeds.push_back(grad_of_grad_inputs[i].contiguous());
    }
  }
  if (used_outputs.empty() || first_variables.empty()) return result;
  const variable_list first = torch::autograd::grad(used_outputs, first_variables, used_grads, /*retain_graph=*/true,
                                                    /*create_graph=*/true, /*allow_unused=*/true);
  variable_list second_outputs, second_seeds, second_variables;
  for (size_t i = 0; i < first.size(); ++i) {
    if (first[i].defined() && first[i].requires_grad()) {
      second_outputs.push_back(first[i]);
      second_seeds.push_back(seeds[i]);
    }
  }
  std::vector<size_t> positions;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& variable = i < xs.size() ? xs[i] : gs[i - xs.size()];
    if (variable.defined() && variable.requires_grad()) {
      second_variables.push_back(variable);
      positions.push_back(i);
    }
  }
  if (second_outputs.empty() || second_variables.empty()) return result;
  const variable_list second = torch::autograd::grad(second_outputs, second_variables, second_seeds,
                                                     /*retain_graph=*/create_graph, create_graph,
                                                     /*allow_unused=*/true);
  for (size_t i = 0; i < second.size(); ++i) result[positions[i]] = second[i];
  return result;
}

}  // namespace dlkernels::ops
