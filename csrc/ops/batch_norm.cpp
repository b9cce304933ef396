// Batch normalisation for torch: [N, C] to [N, C, D, H, W], contiguous or channels last, parameters in the input's type
// or in float32 for half inputs, fused residual and ReLU. Saves the input, the mean and the variance of each channel,
// with ReLU the output, and with ReLU6 the bias, or after a residual a mask: what torch's layers let a program change
// in place may be changed here. Running statistics are moved by an operator of their own, so that this one changes
// nothing.
#include "ops/batch_norm.h"

#include <ATen/ATen.h>

#include "ops/device.h"
#include "ops/second_order.h"

namespace dlkernels::ops {
namespace {

constexpr const char* kName = "batch_norm";

using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;           // output, mean, variance
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // grad_input, grad_weight, grad_bias, grad_residual
using OptionalType = std::optional<at::ScalarType>;

// ---- argument checks ---------------------------------------------------------------------------------------------

void check_parameter(const Tensor& input, const OptionalTensor& parameter, const char* name) {
  if (!is_defined(parameter)) return;
  check_same_device(kName, input, "input", *parameter, name);
  TORCH_CHECK(parameter->dim() == 1 && parameter->size(0) == input.size(1), kName, ": ", name, " should contain ",
              input.size(1), " elements not ", parameter->numel());
  const bool half = input.scalar_type() == at::kBFloat16 || input.scalar_type() == at::kHalf;
  TORCH_CHECK(parameter->scalar_type() == input.scalar_type() || (half && parameter->scalar_type() == at::kFloat),
              "batch_norm: mixed dtype: ", name, " is ", parameter->scalar_type(), ", expected ", input.scalar_type(),
              half ? " or Float" : "");
}

void check_arguments(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, const OptionalTensor& running_mean,
                     const OptionalTensor& running_var, bool training, double eps) {
  kernel_dtype(input, kName, "input");
  if (input.numel() == 0 && input.dim() < 2) return;  // as torch: nothing to normalise, whatever the parameters
  TORCH_CHECK(input.dim() >= 2, "batch_norm: input must have shape [N, C, ...], got ", input.sizes());
  check_parameter(input, running_mean, "running_mean");
  check_parameter(input, running_var, "running_var");
  check_parameter(input, weight, "weight");
  check_parameter(input, bias, "bias");
  if (!training) {
    TORCH_CHECK(is_defined(running_mean), "batch_norm: running_mean must be defined in evaluation mode");
    TORCH_CHECK(is_defined(running_var), "batch_norm: running_var must be defined in evaluation mode");
  }
  TORCH_CHECK_VALUE(!training || eps > 0, "batch_norm eps must be positive during training, but got ", eps);
  if (is_defined(residual)) {
    check_same_device(kName, input, "input", *residual, "residual");
    check_same_dtype(kName, input, "input", *residual, "residual");
    TORCH_CHECK(residual->sizes() == input.sizes(), "batch_norm: residual must have the shape of input, ",
                input.sizes(), ", got ", residual->sizes());
  }
  if (training && input.numel() > 0) {
    TORCH_CHECK_VALUE(input.numel() > input.size(1),
                      "batch_norm: Expected more than 1 value per channel when training, got input size torch.Size(",
                      input.sizes(), ")");
  }
}

// ---- the kernels -------------------------------------------------------------------------------------------------

int64_t channels_of(const Tensor& input) {
  return input.dim() >= 2 ? input.size(1) : 0;
}

at::MemoryFormat dense_format(const Tensor& input) {
  if (input.is_contiguous()) return at::MemoryFormat::Contiguous;
  if (input.dim() == 4 && input.is_contiguous(at::MemoryFormat::ChannelsLast)) return at::MemoryFormat::ChannelsLast;
  if (input.dim() == 5 && input.is_contiguous(at::MemoryFormat::ChannelsLast3d)) {
    return at::MemoryFormat::ChannelsLast3d;
  }
  return input.suggest_memory_format();
}

// As Python names them.
constexpr std::array<std::pair<std::string_view, Activation>, 2> kActivations = {
    {{"relu", Activation::relu}, {"relu6", Activation::relu6}}};

Activation activation_of(OptionalName name) {
  if (!name) return Activation::none;
  for (const auto& [known, activation] : kActivations) {
    if (known == *name) return activation;
  }
  TORCH_CHECK_VALUE(false, "batch_norm: activation must be None, 'relu' or 'relu6', got '", *name, "'");
}

OptionalName name_of(int64_t activation) {
  for (const auto& [name, known] : kActivations) {
    if (static_cast<int64_t>(known) == activation) return name;
  }
  return std::nullopt;
}

BatchNormShape shape_of(const Tensor& input, at::MemoryFormat format, OptionalName activation, bool training) {
  const int64_t batch = input.size(0), channels = input.size(1);
  const int64_t inner = count_of("batch_norm: the positions of input", input.sizes().slice(2));
  // [N, C] is channels last with one position.
  const bool channels_last = format != at::MemoryFormat::Contiguous || inner == 1;
  return {kernel_dtype(input, kName, "input"), batch,   channels, inner, channels_last,
          activation_of(activation),           training};
}

// A per-channel tensor in the type of the sums.
Tensor widened(const Tensor& parameter, const Tensor& input) {
  return parameter.defined() ? parameter.to(accumulate_type(input.scalar_type())).contiguous() : Tensor();
}
Tensor widened(const OptionalTensor& parameter, const Tensor& input) {
  return widened(value_or_undefined(parameter), input);
}

ForwardResult batch_norm_kernel(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& residual, const OptionalTensor& running_mean,
                                const OptionalTensor& running_var, bool training, double eps, OptionalName activation) {
  check_arguments(input, weight, bias, residual, running_mean, running_var, training, eps);
  static_cast<void>(activation_of(activation));  // refuses an unknown one, for empty inputs too
  const at::MemoryFormat format = dense_format(input);
  const Tensor dense_input = input.contiguous(format);
  const Tensor dense_residual = is_defined(residual) ? residual->contiguous(format) : Tensor();
  const Tensor wide_weight = widened(weight, input), wide_bias = widened(bias, input);
  const auto options = input.options().memory_format(std::nullopt);
  const auto statistics = options.dtype(at::kDouble);
  Tensor output = at::empty(input.sizes(), options.memory_format(format));
  Tensor mean = at::empty({channels_of(input)}, statistics), variance = at::empty({channels_of(input)}, statistics);
  if (input.dim() < 2) return {output, mean, variance};
  if (!training) {
    mean.copy_(*running_mean);
    variance.copy_(*running_var);
  } else if (input.numel() == 0) {
    mean.zero_();
    variance.zero_();
  }
  if (input.numel() == 0) return {output, mean, variance};
  KernelsOn(input)->batch_norm.forward(
      {shape_of(dense_input, format, activation, training), dense_input.const_data_ptr(), data_or_null(dense_residual),
       data_or_null(wide_weight), data_or_null(wide_bias), eps, mean.mutable_data_ptr<double>(),
       variance.mutable_data_ptr<double>(), output.mutable_data_ptr()});
  return {output, mean, variance};
}

BackwardResult batch_norm_backward_kernel(const Tensor& grad_output, const Tensor& input, const OptionalTensor& output,
                                          const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                                          const Tensor& variance, bool training, double eps, OptionalName activation,
                                          OptionalType weight_type, OptionalType bias_type,
                                          std::array<bool, 4> output_mask) {
  TORCH_CHECK(grad_output.sizes() == input.sizes(), "batch_norm_backward: grad_output must have the shape of input, ",
              input.sizes(), ", got ", grad_output.sizes());
  const at::MemoryFormat format = dense_format(input);
  const Tensor dense_input = input.contiguous(format), dense_grad = grad_output.contiguous(format);
  const bool needs_output = activation_of(activation) == Activation::relu;
  TORCH_CHECK(!needs_output || is_defined(output), "batch_norm_backward: output must be given with activation 'relu'");
  const Tensor dense_output = needs_output ? output->contiguous(format) : Tensor();
  const Tensor wide_weight = widened(weight, input), wide_bias = widened(bias, input);
  const auto options = input.options().memory_format(format);
  const auto parameters = mean.options().dtype(accumulate_type(input.scalar_type()));
  const int64_t channels = channels_of(input);
  Tensor grad_input = output_mask[0] ? at::empty(input.sizes(), options) : Tensor();
  Tensor grad_weight = output_mask[1] ? at::empty({channels}, parameters) : Tensor();
  Tensor grad_bias = output_mask[2] ? at::empty({channels}, parameters) : Tensor();
  Tensor grad_residual = output_mask[3] ? at::empty(input.sizes(), options) : Tensor();
  if (input.numel() == 0) {
    if (grad_weight.defined()) grad_weight.zero_();
    if (grad_bias.defined()) grad_bias.zero_();
  } else {
    KernelsOn(input)->batch_norm.backward(
        {shape_of(dense_input, format, activation, training), dense_grad.const_data_ptr(), dense_input.const_data_ptr(),
         data_or_null(dense_output), data_or_null(wide_weight), data_or_null(wide_bias), mean.const_data_ptr<double>(),
         variance.const_data_ptr<double>(), eps, mutable_data_or_null(grad_input), mutable_data_or_null(grad_residual),
         mutable_data_or_null(grad_weight), mutable_data_or_null(grad_bias)});
  }
  if (grad_weight.defined() && weight_type) grad_weight = grad_weight.to(*weight_type);
  if (grad_bias.defined() && bias_type) grad_bias = grad_bias.to(*bias_type);
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

// running += momentum (statistic - running), with the unbiased variance. Per-channel work, left to torch's element-wise
// operators.
void update_running_statistics_kernel(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean,
                                      const Tensor& variance, int64_t count, double momentum) {
  if (count <= 1) return;
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  running_mean.copy_(running_mean.to(mean.scalar_type()) * (1 - momentum) + mean * momentum);
  running_var.copy_(running_var.to(variance.scalar_type()) * (1 - momentum) + variance * (momentum * unbiased));
}

// ---- autograd ----------------------------------------------------------------------------------------------------

ForwardResult batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& residual, const OptionalTensor& running_mean,
                         const OptionalTensor& running_var, bool training, double eps, OptionalName activation) {
  static const auto op = find_operator<decltype(batch_norm_kernel)>("dlkernels::batch_norm");
  return op.call(input, weight, bias, residual, running_mean, running_var, training, eps, activation);
}

BackwardResult batch_norm_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& output,
                                   const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                                   const Tensor& variance, bool training, double eps, OptionalName activation,
                                   OptionalType weight_type, OptionalType bias_type, std::array<bool, 4> output_mask) {
  static const auto op = find_operator<decltype(batch_norm_backward_kernel)>("dlkernels::batch_norm_backward");
  return op.call(grad_output, input, output, weight, bias, mean, variance, training, eps, activation, weight_type,
                 bias_type, output_mask);
}

// Where ReLU6 with this argument, or this output, lets no gradient pass.
Tensor stopped_by_relu6(const Tensor& values) {
  return values.le(0).logical_or_(values.ge(6));
}

// inputs: input, weight, bias, residual. Statistics are recomputed when training, since they depend on the input.
Tensor composed_output(const variable_list& inputs, const Tensor& mean, const Tensor& variance, bool training,
                       double eps, OptionalName activation) {
  const Tensor& input = inputs[0];
  at::DimVector reduced, broadcast(input.dim(), 1);
  broadcast[1] = input.size(1);
  for (int64_t d = 0; d < input.dim(); ++d) {
    if (d != 1) reduced.push_back(d);
  }
  const at::ScalarType type = accumulate_type(input.scalar_type());
  const Tensor wide = input.to(type);
  Tensor center = wide - (training ? wide.mean(reduced, true) : mean.to(type).reshape(broadcast));
  if (training) center = center - center.mean(reduced, true);  // what the rounding of the mean has left
  const Tensor spread = training ? center.square().mean(reduced, true) : variance.to(type).reshape(broadcast);
  Tensor output = center * (spread + eps).rsqrt();
  if (inputs[1].defined()) output = output * inputs[1].to(type).reshape(broadcast);
  if (inputs[2].defined()) output = output + inputs[2].to(type).reshape(broadcast);
  if (inputs[3].defined()) output = output + inputs[3];
  const Activation applied = activation_of(activation);
  if (applied == Activation::relu) output = output.clamp_min(0);
  if (applied == Activation::relu6) output = output.clamp(0, 6);
  return output.to(input.scalar_type());
}

struct BatchNormBackwardNode : torch::autograd::Function<BatchNormBackwardNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const OptionalTensor& output, const OptionalTensor& weight, const OptionalTensor& bias,
                               const Tensor& mean, const Tensor& variance, bool training, double eps,
                               OptionalName activation, OptionalType weight_type, OptionalType bias_type,
                               std::array<bool, 4> output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad_output, input, value_or_undefined(output), value_or_undefined(weight),
                            value_or_undefined(bias), mean, variance});
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["activation"] = static_cast<int64_t>(activation_of(activation));
    ctx->set_materialize_grads(false);
    auto [grad_input, grad_weight, grad_bias, grad_residual] =
        batch_norm_backward(grad_output, input, output, weight, bias, mean, variance, training, eps, activation,
                            weight_type, bias_type, output_mask);
    return with_placeholders({grad_input, grad_weight, grad_bias, grad_residual}, input);
  }

  // Where the activation lets gradients pass; undefined without one.
  static Tensor passing(Activation activation, const variable_list& saved, bool training, double eps) {
    at::AutoGradMode disable(false);
    if (activation == Activation::relu) return saved[2].le(0).logical_not();
    if (activation == Activation::none) return {};
    const variable_list inputs = {saved[1], saved[3], saved[4], Tensor()};
    return stopped_by_relu6(composed_output(inputs, saved[5], saved[6], training, eps, std::nullopt)).logical_not();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &input = saved[1], &weight = saved[3];
    const Tensor &mean = saved[5], &variance = saved[6];
    const bool training = ctx->saved_data["training"].toBool();
    const double eps = ctx->saved_data["eps"].toDouble();
    // Activations are piecewise linear: behind their mask the formula is that of plain batch norm.
    const Tensor mask = passing(static_cast<Activation>(ctx->saved_data["activation"].toInt()), saved, training, eps);
    Tensor masked_grad = grad_output;
    if (mask.defined()) {
      at::AutoGradMode enable(true);
      masked_grad = grad_output * mask;
    }
    // The bias and the residual enter linearly: their gradients' gradients reach grad_output alone.
    auto normalise = [&](const variable_list& inputs) -> variable_list {
      return {composed_output({inputs[0], inputs[1], Tensor(), Tensor()}, mean, variance, training, eps, std::nullopt)};
    };
    variable_list second = differentiate_twice(normalise, {input, weight}, {masked_grad}, {grads[0], grads[1]});
    Tensor grad_grad_output = second[2];
    auto accumulate = [&](const Tensor& term) {
      if (term.defined()) grad_grad_output = grad_grad_output.defined() ? grad_grad_output + term : term;
    };
    if (grads[2].defined()) {
      at::DimVector broadcast(input.dim(), 1);
      broadcast[1] = input.size(1);
      accumulate(grads[2].to(input.scalar_type()).reshape(broadcast).expand_as(input));
    }
    accumulate(grads[3]);
    if (mask.defined() && grad_grad_output.defined()) grad_grad_output = grad_grad_output * mask;
    variable_list result(13);
    result[0] = grad_grad_output;
    result[1] = second[0];
    result[3] = second[1];
    return result;
  }
};

BackwardResult batch_norm_backward_autograd(const Tensor& grad_output, const Tensor& input,
                                            const OptionalTensor& output, const OptionalTensor& weight,
                                            const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                                            bool training, double eps, OptionalName activation,
                                            OptionalType weight_type, OptionalType bias_type,
                                            std::array<bool, 4> output_mask) {
  if (!must_record(grad_output, input, weight)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return batch_norm_backward(grad_output, input, output, weight, bias, mean, variance, training, eps, activation,
                               weight_type, bias_type, output_mask);
  }
  const variable_list grads =
      without_placeholders(BatchNormBackwardNode::apply(grad_output, input, output, weight, bias, mean, variance,
                                                        training, eps, activation, weight_type, bias_type, output_mask),
                           output_mask);
  return {grads[0], grads[1], grads[2], grads[3]};
}

struct BatchNormNode : torch::autograd::Function<BatchNormNode> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, bool training, double eps, OptionalName activation,
                        ForwardResult* saved_outputs) {
    at::AutoDispatchBelowADInplaceOrView guard;
    *saved_outputs = batch_norm(input, weight, bias, residual, running_mean, running_var, training, eps, activation);
    const auto& [output, mean, variance] = *saved_outputs;
    const Activation applied = activation_of(activation);
    Tensor kept_bias, stopped;
    if (applied == Activation::relu6 && is_defined(residual)) {
      stopped = stopped_by_relu6(output);
    } else if (applied == Activation::relu6 && is_defined(bias)) {
      kept_bias = bias->clone();  // which torch does not save
    }
    ctx->save_for_backward({input, value_or_undefined(weight), mean, variance,
                            applied == Activation::relu ? output : Tensor(), kept_bias, stopped});
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["activation"] = static_cast<int64_t>(applied);
    ctx->saved_data["has_residual"] = is_defined(residual);
    if (is_defined(weight)) ctx->saved_data["weight_type"] = static_cast<int64_t>(weight->scalar_type());
    if (is_defined(bias)) ctx->saved_data["bias_type"] = static_cast<int64_t>(bias->scalar_type());
    return output;
  }

  static OptionalType saved_type(AutogradContext* ctx, const char* name) {
    const auto found = ctx->saved_data.find(name);
    if (found == ctx->saved_data.end()) return std::nullopt;
    return static_cast<at::ScalarType>(found->second.toInt());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalType weight_type = saved_type(ctx, "weight_type"), bias_type = saved_type(ctx, "bias_type");
    const Tensor& stopped = saved[6];
    auto [grad_input, grad_weight, grad_bias, grad_residual] = batch_norm_backward(
        stopped.defined() ? grads[0].masked_fill(stopped, 0) : grads[0], saved[0], optional_of(saved[4]),
        optional_of(saved[1]), optional_of(saved[5]), saved[2], saved[3], ctx->saved_data["training"].toBool(),
        ctx->saved_data["eps"].toDouble(),
        stopped.defined() ? std::nullopt : name_of(ctx->saved_data["activation"].toInt()), weight_type, bias_type,
        needed_gradients<4>(
            ctx, {true, weight_type.has_value(), bias_type.has_value(), ctx->saved_data["has_residual"].toBool()}));
    variable_list result(10);
    result[0] = grad_input;
    result[1] = grad_weight;
    result[2] = grad_bias;
    result[3] = grad_residual;
    return result;
  }
};

ForwardResult batch_norm_autograd(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& residual, const OptionalTensor& running_mean,
                                  const OptionalTensor& running_var, bool training, double eps,
                                  OptionalName activation) {
  TORCH_CHECK(!wants_gradient(running_mean) && !wants_gradient(running_var),
              "batch_norm is not differentiable with respect to argument 'running_mean' or 'running_var'. "
              "This input cannot have requires_grad True.");
  if (!must_record(input, weight, bias, residual)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return batch_norm(input, weight, bias, residual, running_mean, running_var, training, eps, activation);
  }
  ForwardResult outputs;
  std::get<0>(outputs) = BatchNormNode::apply(input, weight, bias, residual, running_mean, running_var, training, eps,
                                              activation, &outputs);
  return outputs;
}

// Changes its arguments and returns nothing: below autograd, but in view of version counters.
void update_running_statistics_autograd(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean,
                                        const Tensor& variance, c10::SymInt count, double momentum) {
  static const auto op =
      find_operator<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, c10::SymInt, double)>(
          "dlkernels::update_running_statistics_");
  at::AutoDispatchBelowAutograd guard;
  op.call(running_mean, running_var, mean, variance, count, momentum);
}

}  // namespace

Tensor batch_norm_with_update(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& residual, const OptionalTensor& running_mean,
                              const OptionalTensor& running_var, bool training, double momentum, double eps,
                              OptionalName activation) {
  auto [output, mean, variance] =
      batch_norm(input, weight, bias, residual, running_mean, running_var, training, eps, activation);
  if (training && input.dim() >= 2 && is_defined(running_mean) && is_defined(running_var)) {
    c10::SymInt count = input.sym_size(0);
    for (int64_t d = 2; d < input.dim(); ++d) count *= input.sym_size(d);
    update_running_statistics_autograd(*running_mean, *running_var, mean, variance, count, momentum);
  }
  return output;
}

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("batch_norm", &batch_norm_kernel);
  m.impl("batch_norm_backward", &batch_norm_backward_kernel);
  m.impl("update_running_statistics_", &update_running_statistics_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("batch_norm", &batch_norm_kernel);
  m.impl("batch_norm_backward", &batch_norm_backward_kernel);
  m.impl("update_running_statistics_", &update_running_statistics_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) {
  m.impl("batch_norm", &batch_norm_autograd);
  m.impl("batch_norm_backward", &batch_norm_backward_autograd);
  m.impl("update_running_statistics_", &update_running_statistics_autograd);
}

}  // namespace dlkernels::ops
