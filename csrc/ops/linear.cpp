// Linear layer for torch. Saves input and weight. Rows are read where they lie; the results are dense.
#include "ops/linear.h"

#include <ATen/ATen.h>

#include "ops/device.h"
#include "ops/second_order.h"

namespace dlkernels::ops {
namespace {

constexpr const char* kName = "linear";

using Mask = std::array<bool, 3>;                           // input, weight, bias
using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;  // grad_input, grad_weight, grad_bias

// ---- argument checks ---------------------------------------------------------------------------------------------

void check_arguments(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  for (const auto& [tensor, name] : {std::pair(&weight, "weight"), std::pair(&bias, "bias")}) {
    check_same_device(kName, input, "input", *tensor, name);
    check_same_dtype(kName, input, "input", *tensor, name);
  }
  TORCH_CHECK(input.dim() > 0, "linear: both arguments to linear need to be at least 1D, but input is 0D");
  TORCH_CHECK(weight.dim() == 2, "linear: weight must have shape [out_features, in_features], got ", weight.sizes());
  const int64_t features = input.size(-1),
                rows = count_of("linear: the rows of input", input.sizes().slice(0, input.dim() - 1));
  TORCH_CHECK(features == weight.size(1), "linear: mat1 and mat2 shapes cannot be multiplied (", rows, "x", features,
              " and ", weight.size(1), "x", weight.size(0), "): input has shape ", input.sizes(), ", weight ",
              weight.sizes());
  TORCH_CHECK(!bias.defined() || (bias.dim() == 1 && bias.size(0) == weight.size(0)), "linear: bias must have shape [",
              weight.size(0), "], got ", bias.defined() ? bias.sizes() : at::IntArrayRef());
}

void check_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
  check_arguments(input, weight, Tensor());
  check_same_device(kName, input, "input", grad_output, "grad_output");
  check_same_dtype(kName, input, "input", grad_output, "grad_output");
  at::DimVector expected(input.sizes());
  expected.back() = weight.size(0);
  TORCH_CHECK(grad_output.sizes() == expected, "linear: grad_output has shape ", grad_output.sizes(), ", expected ",
              at::IntArrayRef(expected));
}

// ---- the kernels -------------------------------------------------------------------------------------------------

// [rows, features]: a view where the strides allow it.
Tensor as_rows(const Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  const int64_t rows = count_of("linear: the rows of input", tensor.sizes().slice(0, tensor.dim() - 1));
  return tensor.reshape({rows, tensor.size(-1)});
}

// product = a b^T + bias.
void multiply(const Tensor& a, const Tensor& b, bool along_depth, const Tensor& bias, const Tensor& product) {
  KernelsOn(a)->linear.product({kernel_dtype(a, kName, "input"), a.size(0), b.size(0), a.size(1), a.const_data_ptr(),
                                a.stride(0), a.stride(1), b.const_data_ptr(), b.stride(0), b.stride(1), along_depth,
                                data_or_null(bias), product.mutable_data_ptr()});
}

Tensor linear_kernel(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  kernel_dtype(input, kName, "input");
  const Tensor plain_bias = value_or_undefined(bias);
  check_arguments(input, weight, plain_bias);
  at::DimVector shape(input.sizes());
  shape.back() = weight.size(0);
  Tensor output = at::empty(shape, input.options());
  multiply(as_rows(input), weight, /*along_depth=*/true, plain_bias.defined() ? plain_bias.contiguous() : plain_bias,
           output);
  return output;
}

BackwardResult linear_backward_kernel(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                      Mask output_mask) {
  const DType dtype = kernel_dtype(input, kName, "input");
  check_backward(grad_output, input, weight);
  const Tensor grad_rows = as_rows(grad_output);
  Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) {
    grad_input = at::empty(input.sizes(), input.options());
    multiply(grad_rows, weight.t(), /*along_depth=*/false, Tensor(), grad_input);
  }
  if (output_mask[1]) {
    grad_weight = at::empty(weight.sizes(), weight.options());
    multiply(grad_rows.t(), as_rows(input).t(), /*along_depth=*/false, Tensor(), grad_weight);
  }
  if (output_mask[2]) {
    grad_bias = at::empty({weight.size(0)}, weight.options());
    KernelsOn(input)->linear.sum({dtype, grad_rows.size(0), grad_rows.size(1), grad_rows.const_data_ptr(),
                                  grad_rows.stride(0), grad_rows.stride(1), grad_bias.mutable_data_ptr()});
  }
  return {grad_input, grad_weight, grad_bias};
}

// ---- autograd ----------------------------------------------------------------------------------------------------

BackwardResult linear_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, Mask output_mask) {
  static const auto op = find_operator<decltype(linear_backward_kernel)>("dlkernels::linear_backward");
  return op.call(grad_output, input, weight, output_mask);
}

// Backward is linear in each argument, so its gradients are products again: with u, v, b the gradients that arrive for
// grad_input, grad_weight and grad_bias,
//   grad of grad_output = u weight^T + input v^T + b,   grad of input = grad_output v,   grad of weight = grad_output^T
//   u
struct LinearBackwardNode : torch::autograd::Function<LinearBackwardNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const Tensor& weight, Mask output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad_output, input, weight});
    ctx->saved_data["output_mask"] = std::vector<bool>(output_mask.begin(), output_mask.end());
    ctx->set_materialize_grads(false);
    auto [grad_input, grad_weight, grad_bias] = ops::linear_backward(grad_output, input, weight, output_mask);
    return with_placeholders({grad_input, grad_weight, grad_bias}, input);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &input = saved[1], &weight = saved[2];
    const auto mask = ctx->saved_data["output_mask"].toBoolList();
    const Tensor u = mask[0] ? grads[0] : Tensor(), v = mask[1] ? grads[1] : Tensor(),
                 b = mask[2] ? grads[2] : Tensor();
    Tensor grad_grad_output, grad_input, grad_weight;
    if (ctx->needs_input_grad(0)) {
      if (u.defined()) grad_grad_output = ops::linear(u, weight, optional_of(b));
      if (v.defined()) {
        const Tensor term = ops::linear(input, v, u.defined() ? std::nullopt : optional_of(b));
        grad_grad_output = u.defined() ? grad_grad_output + term : term;
      }
      if (!u.defined() && !v.defined() && b.defined()) grad_grad_output = b.expand_symint(grad_output.sym_sizes());
    }
    if (ctx->needs_input_grad(1) && v.defined()) {
      grad_input = std::get<0>(ops::linear_backward(grad_output, input, v, {true, false, false}));
    }
    if (ctx->needs_input_grad(2) && u.defined()) {
      grad_weight = std::get<1>(ops::linear_backward(grad_output, u, weight, {false, true, false}));
    }
    return {grad_grad_output, grad_input, grad_weight, Tensor()};
  }
};

BackwardResult linear_backward_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                        Mask output_mask) {
  if (!must_record(grad_output, input, weight)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::linear_backward(grad_output, input, weight, output_mask);
  }
  const variable_list grads =
      without_placeholders(LinearBackwardNode::apply(grad_output, input, weight, output_mask), output_mask);
  return {grads[0], grads[1], grads[2]};
}

struct LinearNode : torch::autograd::Function<LinearNode> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({input, weight});
    ctx->saved_data["has_bias"] = is_defined(bias);
    return ops::linear(input, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool bias_wanted = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2);
    auto [grad_input, grad_weight, grad_bias] = ops::linear_backward(
        grads[0], saved[0], saved[1], {ctx->needs_input_grad(0), ctx->needs_input_grad(1), bias_wanted});
    return {grad_input, grad_weight, grad_bias};
  }
};

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  if (must_record(input, weight, bias)) return LinearNode::apply(input, weight, bias);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::linear(input, weight, bias);
}

// ---- autocast: products run in the lower precision -----------------------------------------------------------------

template <c10::DispatchKey key, c10::DeviceType device>
Tensor linear_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const Autocast cast{at::autocast::get_autocast_dtype(device), device};
  return ops::linear(cast(input), cast(weight), cast(bias));
}

}  // namespace

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  static const auto op = find_operator<decltype(linear_kernel)>("dlkernels::linear");
  return op.call(input, weight, bias);
}

Tensor linear_functional(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const bool vector = weight.dim() == 1;
  const Tensor matrix = vector ? weight.unsqueeze(0) : weight;
  OptionalTensor every = bias;
  if (is_defined(bias) && matrix.dim() == 2 && (bias->dim() == 0 || (bias->dim() == 1 && bias->size(0) == 1))) {
    every = bias->expand_symint({matrix.sym_size(0)});
  }
  const Tensor output = ops::linear(input, matrix, every);
  return vector ? output.squeeze(-1) : output;
}

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("linear", &linear_kernel);
  m.impl("linear_backward", &linear_backward_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("linear", &linear_kernel);
  m.impl("linear_backward", &linear_backward_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) {
  m.impl("linear", &linear_autograd);
  m.impl("linear_backward", &linear_backward_autograd);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCPU, m) {
  m.impl("linear", &linear_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCUDA, m) {
  m.impl("linear", &linear_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace dlkernels::ops
