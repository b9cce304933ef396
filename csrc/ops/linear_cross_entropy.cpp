// Cross-entropy of a linear layer for torch, without its logits: input [N, in] or [in], linear_weight [C, in]. Saves
// the operands and three numbers a row (statistics). Losses with more dimensions are composed of this one in Python.
#include "ops/linear_cross_entropy.h"

#include <ATen/ATen.h>

#include "ops/cross_entropy.h"
#include "ops/device.h"
#include "ops/linear.h"
#include "ops/second_order.h"

namespace dlkernels::ops {
namespace {

constexpr const char* kName = "linear_cross_entropy";

using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;           // loss, statistics, divisor
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of input, linear_weight, linear_bias, target

// ---- argument checks ---------------------------------------------------------------------------------------------

at::DimVector logits_shape(const Tensor& input, const Tensor& linear_weight) {
  at::DimVector shape(input.sizes());
  shape.back() = linear_weight.size(0);
  return shape;
}

// As Python writes it, and so torch's message.
std::string python_shape(const Tensor& tensor) {
  std::string text = "(";
  for (const int64_t size : tensor.sizes()) text += std::to_string(size) + ", ";
  if (tensor.dim() == 0) return "()";
  text.resize(text.size() - (tensor.dim() == 1 ? 1 : 2));
  return text + ")";
}

void check_layer(const Tensor& input, const Tensor& linear_weight, const Tensor& linear_bias) {
  kernel_dtype(input, kName, "input");
  TORCH_CHECK(input.dim() == 1 || input.dim() == 2, kName, ": expected input with dimensionality 1 or 2, got ",
              input.dim());
  TORCH_CHECK(linear_weight.dim() >= 2, kName, ": expected linear_weight with dimensionality at least 2, got ",
              linear_weight.dim());
  TORCH_CHECK(linear_weight.dim() == 2,
              "linear_cross_entropy: the operator takes a linear_weight of shape [C, in], got ", linear_weight.sizes());
  TORCH_CHECK(input.size(-1) == linear_weight.size(1), kName,
              ": expected equal input and linear_weight last dimensions (in_features), got ", input.size(-1), " and ",
              linear_weight.size(1), ", respectively");
  TORCH_CHECK(!linear_bias.defined() || (linear_bias.dim() == 1 && linear_bias.size(0) == linear_weight.size(0)), kName,
              ": expected linear_bias shape (", linear_weight.size(0), ",), got ",
              linear_bias.defined() ? python_shape(linear_bias) : "");
}

void check_arguments(const Tensor& input, const Tensor& linear_weight, const Tensor& linear_bias, const Tensor& target,
                     const Tensor& weight, const LossArguments& loss, bool wide_loss) {
  check_layer(input, linear_weight, linear_bias);
  check_same_device(kName, input, "input", linear_weight, "linear_weight");
  check_same_device(kName, input, "input", linear_bias, "linear_bias");
  check_same_device(kName, input, "input", target, "target");
  check_same_device(kName, input, "input", weight, "weight");
  check_same_dtype(kName, input, "input", linear_weight, "linear_weight");
  check_same_dtype(kName, input, "input", linear_bias, "linear_bias");
  // A wide loss takes these in its own type too.
  auto type_of = [&](const Tensor& tensor) {
    const at::ScalarType wide = accumulate_type(input.scalar_type());
    return wide_loss && tensor.defined() && tensor.scalar_type() == wide ? wide : input.scalar_type();
  };
  TORCH_CHECK(!weight.defined() || weight.scalar_type() == type_of(weight), kName, ": expected scalar type ",
              toString(type_of(weight)), " but found ", weight.defined() ? toString(weight.scalar_type()) : "",
              ": weight must have the type of input");
  check_targets(kName, logits_shape(input, linear_weight), target, type_of(target), weight, loss);
}

// ---- the kernels ----------------------------------------------------------------------------------------------------

// The kernels take any stride between rows.
Tensor dense_rows(const Tensor& tensor) {
  return tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1) ? tensor : tensor.contiguous();
}
int64_t row_stride(const Tensor& tensor) {
  return tensor.dim() == 2 ? tensor.stride(0) : 0;
}

// Dense operands and the shape that points at them.
struct Operands {
  Tensor input, linear_weight, linear_bias, target, weight;
  LinearCrossEntropyShape shape;

  Operands(const Tensor& input_, const Tensor& linear_weight_, const Tensor& linear_bias_, const Tensor& target_,
           const Tensor& weight_, int64_t ignore_index, double label_smoothing)
      : input(dense_rows(input_)), linear_weight(dense_rows(linear_weight_)), target(target_.contiguous()) {
    const bool probabilities = has_class_probabilities(target);
    if (linear_bias_.defined()) linear_bias = linear_bias_.contiguous();
    if (!probabilities && target.scalar_type() != at::kLong) target = target.to(at::kLong);
    if (weight_.defined()) weight = weight_.to(accumulate_type(input.scalar_type())).contiguous();
    shape.dtype = kernel_dtype(input, kName, "input");
    shape.target_dtype = probabilities ? kernel_dtype(target, kName, "target") : shape.dtype;
    shape.rows = input.dim() == 1 ? 1 : input.size(0);
    shape.features = input.size(-1);
    shape.classes = linear_weight.size(0);
    shape.input = input.const_data_ptr();
    shape.input_row_stride = row_stride(input);
    shape.linear_weight = linear_weight.const_data_ptr();
    shape.linear_weight_row_stride = row_stride(linear_weight);
    shape.linear_bias = data_or_null(linear_bias);
    shape.target = probabilities ? nullptr : target.const_data_ptr<int64_t>();
    shape.target_probabilities = probabilities ? target.const_data_ptr() : nullptr;
    shape.weight = data_or_null(weight);
    shape.ignore_index = ignore_index;
    shape.label_smoothing = label_smoothing;
  }
};

ForwardResult linear_cross_entropy_kernel(const Tensor& input, const Tensor& linear_weight,
                                          const OptionalTensor& linear_bias, const Tensor& target,
                                          const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                          double label_smoothing, bool wide_loss) {
  check_arguments(input, linear_weight, value_or_undefined(linear_bias), target, value_or_undefined(weight),
                  {reduction, ignore_index, label_smoothing}, wide_loss);
  const Operands operands(input, linear_weight, value_or_undefined(linear_bias), target, value_or_undefined(weight),
                          ignore_index, label_smoothing);
  const LinearCrossEntropyShape& shape = operands.shape;
  // On other devices looking would wait for them: there a target that is no class gives NaN.
  if (shape.target != nullptr && input.is_cpu())
    check_target_range(kName, operands.target, shape.classes, ignore_index);

  const at::ScalarType wide = accumulate_type(input.scalar_type());
  const auto options = input.options().memory_format(std::nullopt).dtype(wide);
  Tensor loss = at::empty(reduction == kNone ? input.sizes().slice(0, input.dim() - 1) : at::IntArrayRef(), options);
  Tensor statistics = at::empty({3, shape.rows}, options);
  Tensor divisor = at::empty({}, options.dtype(at::kDouble));
  KernelsOn(input)->linear_cross_entropy.forward({shape, static_cast<LossReduction>(reduction), loss.mutable_data_ptr(),
                                                  statistics.mutable_data_ptr(), divisor.mutable_data_ptr<double>()});
  return {wide_loss ? loss : loss.to(input.scalar_type()), statistics, divisor};
}

BackwardResult linear_cross_entropy_backward_kernel(const Tensor& grad_loss, const Tensor& input,
                                                    const Tensor& linear_weight, const OptionalTensor& linear_bias,
                                                    const Tensor& target, const OptionalTensor& weight,
                                                    const Tensor& statistics, const Tensor& divisor,
                                                    int64_t ignore_index, double label_smoothing,
                                                    std::array<bool, 4> output_mask) {
  const Operands operands(input, linear_weight, value_or_undefined(linear_bias), target, value_or_undefined(weight),
                          ignore_index, label_smoothing);
  const Tensor dense_grad_loss = grad_loss.to(accumulate_type(input.scalar_type())).contiguous();
  const bool per_row = grad_loss.numel() == statistics.size(1);
  TORCH_CHECK(per_row || grad_loss.numel() == 1, "linear_cross_entropy_backward: grad_loss has ", grad_loss.numel(),
              " elements, expected 1 or one for each of ", statistics.size(1), " rows");
  auto like = [](bool wanted, const Tensor& tensor) {
    return wanted ? at::empty(tensor.sizes(), tensor.options().memory_format(std::nullopt)) : Tensor();
  };
  const BackwardResult grads = {like(output_mask[0], input), like(output_mask[1], linear_weight),
                                like(output_mask[2], value_or_undefined(linear_bias)), like(output_mask[3], target)};
  const auto& [grad_input, grad_linear_weight, grad_linear_bias, grad_target] = grads;
  KernelsOn(input)->linear_cross_entropy.backward(
      {operands.shape, statistics.const_data_ptr(), dense_grad_loss.const_data_ptr(),
       per_row && grad_loss.numel() > 1 ? 1 : 0, divisor.const_data_ptr<double>(), mutable_data_or_null(grad_input),
       mutable_data_or_null(grad_linear_weight), mutable_data_or_null(grad_linear_bias),
       mutable_data_or_null(grad_target)});
  return grads;
}

// ---- autograd ----------------------------------------------------------------------------------------------------

using BackwardSignature = BackwardResult(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                         const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, int64_t,
                                         double, std::array<bool, 4>);

BackwardResult linear_cross_entropy_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& linear_weight,
                                             const OptionalTensor& linear_bias, const Tensor& target,
                                             const OptionalTensor& weight, const Tensor& statistics,
                                             const Tensor& divisor, int64_t ignore_index, double label_smoothing,
                                             std::array<bool, 4> output_mask) {
  static const auto op = find_operator<BackwardSignature>("dlkernels::linear_cross_entropy_backward");
  return op.call(grad_loss, input, linear_weight, linear_bias, target, weight, statistics, divisor, ignore_index,
                 label_smoothing, output_mask);
}

struct LinearCrossEntropyBackwardNode : torch::autograd::Function<LinearCrossEntropyBackwardNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_loss, const Tensor& input,
                               const Tensor& linear_weight, const OptionalTensor& linear_bias, const Tensor& target,
                               const OptionalTensor& weight, const Tensor& statistics, const Tensor& divisor,
                               int64_t ignore_index, double label_smoothing, std::array<bool, 4> output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad_loss, input, linear_weight, value_or_undefined(linear_bias), target,
                            value_or_undefined(weight), divisor});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->set_materialize_grads(false);
    auto [grad_input, grad_linear_weight, grad_linear_bias, grad_target] =
        linear_cross_entropy_backward(grad_loss, input, linear_weight, linear_bias, target, weight, statistics, divisor,
                                      ignore_index, label_smoothing, output_mask);
    return with_placeholders({grad_input, grad_linear_weight, grad_linear_bias, grad_target}, input);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad_loss = saved[0], &weight = saved[5], &divisor = saved[6];
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    const double label_smoothing = ctx->saved_data["label_smoothing"].toDouble();
    const bool per_row = grad_loss.dim() > 0;
    // The one place with logits: differentiated twice, they are needed whole.
    auto loss = [&](const variable_list& inputs) -> variable_list {
      const Tensor logits = ops::linear(inputs[0], inputs[1], optional_of(inputs[2])).to(grad_loss.scalar_type());
      return {composed_loss(logits, inputs[3], weight, divisor, ignore_index, label_smoothing, per_row)};
    };
    const variable_list second =
        differentiate_twice(loss, {saved[1], saved[2], saved[3], saved[4]}, {grad_loss}, grads);
    return {second[4], second[0], second[1], second[2], second[3], Tensor(),
            Tensor(),  Tensor(),  Tensor(),  Tensor(),  Tensor()};
  }
};

BackwardResult linear_cross_entropy_backward_autograd(const Tensor& grad_loss, const Tensor& input,
                                                      const Tensor& linear_weight, const OptionalTensor& linear_bias,
                                                      const Tensor& target, const OptionalTensor& weight,
                                                      const Tensor& statistics, const Tensor& divisor,
                                                      int64_t ignore_index, double label_smoothing,
                                                      std::array<bool, 4> output_mask) {
  if (!must_record(grad_loss, input, linear_weight, linear_bias, target)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return linear_cross_entropy_backward(grad_loss, input, linear_weight, linear_bias, target, weight, statistics,
                                         divisor, ignore_index, label_smoothing, output_mask);
  }
  const variable_list grads = without_placeholders(
      LinearCrossEntropyBackwardNode::apply(grad_loss, input, linear_weight, linear_bias, target, weight, statistics,
                                            divisor, ignore_index, label_smoothing, output_mask),
      output_mask);
  return {grads[0], grads[1], grads[2], grads[3]};
}

// Only the loss is an output of the node; what is saved reaches the caller through `saved_outputs`, without history.
struct LinearCrossEntropyNode : torch::autograd::Function<LinearCrossEntropyNode> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& linear_weight,
                        const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
                        int64_t reduction, int64_t ignore_index, double label_smoothing, bool wide_loss,
                        ForwardResult* saved_outputs) {
    at::AutoDispatchBelowADInplaceOrView guard;
    *saved_outputs = linear_cross_entropy(input, linear_weight, linear_bias, target, weight, reduction, ignore_index,
                                          label_smoothing, wide_loss);
    const auto& [loss, statistics, divisor] = *saved_outputs;
    ctx->save_for_backward({input, linear_weight, value_or_undefined(linear_bias), target, value_or_undefined(weight),
                            statistics, divisor});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool has_bias = saved[2].defined();
    auto [grad_input, grad_linear_weight, grad_linear_bias, grad_target] = linear_cross_entropy_backward(
        grads[0], saved[0], saved[1], optional_of(saved[2]), saved[3], optional_of(saved[4]), saved[5], saved[6],
        ctx->saved_data["ignore_index"].toInt(), ctx->saved_data["label_smoothing"].toDouble(),
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), has_bias && ctx->needs_input_grad(2),
         ctx->needs_input_grad(has_bias ? 3 : 2)});
    return {grad_input, grad_linear_weight, grad_linear_bias, grad_target, Tensor(),
            Tensor(),   Tensor(),           Tensor(),         Tensor(),    Tensor()};
  }
};

ForwardResult linear_cross_entropy_autograd(const Tensor& input, const Tensor& linear_weight,
                                            const OptionalTensor& linear_bias, const Tensor& target,
                                            const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                            double label_smoothing, bool wide_loss) {
  if (!must_record(input, linear_weight, linear_bias, target, weight)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return linear_cross_entropy(input, linear_weight, linear_bias, target, weight, reduction, ignore_index,
                                label_smoothing, wide_loss);
  }
  TORCH_CHECK(!wants_gradient(weight),
              "linear_cross_entropy is not differentiable with respect to argument 'weight'. "
              "This input cannot have requires_grad True.");
  // A copy of the bias is saved: torch's layer saves none, so that it may be changed in place before backward.
  const OptionalTensor kept_bias = is_defined(linear_bias) ? OptionalTensor(linear_bias->clone()) : linear_bias;
  ForwardResult outputs;
  std::get<0>(outputs) = LinearCrossEntropyNode::apply(input, linear_weight, kept_bias, target, weight, reduction,
                                                       ignore_index, label_smoothing, wide_loss, &outputs);
  return outputs;
}

// ---- autocast: the layer in the lower precision, the loss in float32 ---------------------------------------------

template <c10::DispatchKey key, c10::DeviceType device>
ForwardResult linear_cross_entropy_autocast(const Tensor& input, const Tensor& linear_weight,
                                            const OptionalTensor& linear_bias, const Tensor& target,
                                            const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                            double label_smoothing, bool) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const Autocast lower{at::autocast::get_autocast_dtype(device), device}, wide{at::kFloat, device};
  return linear_cross_entropy(lower(input), lower(linear_weight), lower(linear_bias),
                              has_class_probabilities(target) ? wide(target) : target, wide(weight), reduction,
                              ignore_index, label_smoothing, true);
}

}  // namespace

ForwardResult linear_cross_entropy(const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias,
                                   const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                                   int64_t ignore_index, double label_smoothing, bool wide_loss) {
  static const auto op = find_operator<decltype(linear_cross_entropy_kernel)>("dlkernels::linear_cross_entropy");
  return op.call(input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing,
                 wide_loss);
}

Tensor linear_cross_entropy_functional(const Tensor& input, const Tensor& linear_weight,
                                       const OptionalTensor& linear_bias, const Tensor& target,
                                       const OptionalTensor& weight, Int reduction, Int ignore_index,
                                       double label_smoothing) {
  const at::ScalarType layer = input.scalar_type(), type = loss_type(layer, target, weight);
  if (!has_class_probabilities(target)) {
    return std::get<0>(linear_cross_entropy(input, linear_weight, linear_bias, target, weight, reduction, ignore_index,
                                            label_smoothing, false));
  }
  // The type that half types are summed in is a loss of theirs; for another the whole layer is computed in it.
  const bool wide_loss = type != layer && type == accumulate_type(layer);
  auto promoted = [&](const Tensor& tensor) {
    return wide_loss || tensor.scalar_type() != layer ? tensor : tensor.to(type);
  };
  return std::get<0>(linear_cross_entropy(
      promoted(input), promoted(linear_weight),
      is_defined(linear_bias) ? OptionalTensor(promoted(*linear_bias)) : linear_bias, target.to(type),
      in_type(type, weight), reduction, ignore_index, label_smoothing, wide_loss));
}

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("linear_cross_entropy", &linear_cross_entropy_kernel);
  m.impl("linear_cross_entropy_backward", &linear_cross_entropy_backward_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("linear_cross_entropy", &linear_cross_entropy_kernel);
  m.impl("linear_cross_entropy_backward", &linear_cross_entropy_backward_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) {
  m.impl("linear_cross_entropy", &linear_cross_entropy_autograd);
  m.impl("linear_cross_entropy_backward", &linear_cross_entropy_backward_autograd);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCPU, m) {
  m.impl("linear_cross_entropy", &linear_cross_entropy_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCUDA, m) {
  m.impl("linear_cross_entropy", &linear_cross_entropy_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace dlkernels::ops
