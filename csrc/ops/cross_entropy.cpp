// Softmax cross-entropy for torch: class indices or probabilities, class weights, ignored targets, label smoothing,
// [C], [N, C] and [N, C, d1, ...] logits. Saves the logits, the target and two numbers a row (statistics).
#include "ops/cross_entropy.h"

#include <ATen/ATen.h>

#include "ops/device.h"
#include "ops/second_order.h"

namespace dlkernels::ops {

// ---- what every cross-entropy checks ------------------------------------------------------------------------------

bool has_class_probabilities(const Tensor& target) {
  return at::isFloatingType(target.scalar_type());
}

at::ScalarType loss_type(at::ScalarType logits, const Tensor& target, const OptionalTensor& weight) {
  if (!has_class_probabilities(target)) return logits;
  at::ScalarType type = c10::promoteTypes(logits, target.scalar_type());
  if (is_defined(weight)) type = c10::promoteTypes(type, weight->scalar_type());
  return at::isFloatingType(type) ? type : logits;  // the operator refuses the others
}

namespace {

int64_t class_dimension(at::IntArrayRef logits) {
  return logits.size() == 1 ? 0 : 1;
}

at::DimVector loss_shape(at::IntArrayRef logits) {
  at::DimVector shape(logits);
  shape.erase(shape.begin() + class_dimension(logits));
  return shape;
}

// Class indices: one for each row of the logits.
void check_indices(const char* name, at::IntArrayRef logits, const Tensor& target) {
  const bool batched = logits.size() > 1;
  TORCH_CHECK_VALUE(!batched || (target.dim() >= 1 && target.size(0) == logits[0]), name,
                    ": Expected input batch_size (", logits[0], ") to match target batch_size (",
                    target.dim() >= 1 ? target.size(0) : 0, ").");
  TORCH_CHECK_VALUE(batched || target.dim() != 1 || target.size(0) == 1, name,
                    ": For 1D input, 1D target must have size 1, but got target size: ", target.numel());
  TORCH_CHECK(target.scalar_type() == at::kLong || target.scalar_type() == at::kByte, name,
              ": expected target dtype to be Long or Byte, but got ", target.scalar_type(),
              " (class probabilities would have the shape of the logits, ", logits, ", and not ", target.sizes(), ")");
  if (logits.size() <= 2) {
    TORCH_CHECK(target.dim() <= 1 && (batched || target.numel() == 1), name,
                ": 0D or 1D target tensor expected, multi-target not supported; got target of shape ", target.sizes(),
                " for logits of shape ", logits);
    return;
  }
  const at::DimVector expected = loss_shape(logits);
  TORCH_CHECK(target.sizes() == at::IntArrayRef(expected), name, ": Expected target size ", at::IntArrayRef(expected),
              ", got ", target.sizes(), ": size mismatch (got input: ", logits, " , target: ", target.sizes(), ")");
}

// Class probabilities: the shape of the logits.
void check_probabilities(const char* name, const Tensor& target, at::ScalarType type, int64_t ignore_index) {
  TORCH_CHECK(has_class_probabilities(target), name,
              ": Expected floating point type for target with class probabilities, got ", target.scalar_type());
  TORCH_CHECK(ignore_index < 0, name, ": ignore_index is not supported for floating point target, got ", ignore_index);
  TORCH_CHECK(target.scalar_type() == type, name, ": expected scalar type ", toString(type), " but found ",
              toString(target.scalar_type()), ": target must have the type of input");
}

}  // namespace

void check_targets(const char* name, at::IntArrayRef logits, const Tensor& target, at::ScalarType target_type,
                   const Tensor& weight, const LossArguments& loss) {
  TORCH_CHECK_VALUE(loss.reduction == kNone || loss.reduction == kMean || loss.reduction == kSum, name, ": ",
                    loss.reduction, " is not a valid value for reduction");
  TORCH_CHECK(loss.label_smoothing >= 0.0 && loss.label_smoothing <= 1.0, name,
              ": label_smoothing must be between 0.0 and 1.0. Got: ", loss.label_smoothing);
  if (target.sizes() == logits) {
    check_probabilities(name, target, target_type, loss.ignore_index);
  } else {
    check_indices(name, logits, target);
  }
  const int64_t classes = logits[class_dimension(logits)];
  TORCH_CHECK(
      !weight.defined() || (weight.dim() == 1 && weight.size(0) == classes), name,
      ": weight tensor should be defined either for all ", classes,
      " classes or no classes but got weight tensor of shape: ", weight.defined() ? weight.sizes() : at::IntArrayRef());
}

void check_target_range(const char* name, const Tensor& target, int64_t classes, int64_t ignore_index) {
  const int64_t* indices = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < target.numel(); ++i) {
    const int64_t index = indices[i];
    TORCH_CHECK_INDEX((index >= 0 && index < classes) || index == ignore_index, name, ": Target ", index,
                      " is out of bounds.", " Expected a class in [0, ", classes, ") or ignore_index=", ignore_index);
  }
}

namespace {

// A class for every row, [N, 1, d1, ...] for [N, C, d1, ...] logits. Rows that are ignored have logits of 0, a share of
// 0 and no part in the divisor: whatever they hold, and a divisor of 0 where all are ignored, is in no gradient.
Tensor composed_losses_of_indices(const Tensor& logits, const Tensor& indices, const Tensor& weight,
                                  const Tensor& divisor, int64_t ignore_index, double label_smoothing) {
  const int64_t dimension = class_dimension(logits.sizes());
  const Tensor ignored = indices.eq(ignore_index), classes = indices.masked_fill(ignored, 0);
  const Tensor log_p = logits.masked_fill(ignored, 0).log_softmax(dimension);
  Tensor losses = log_p.gather(dimension, classes);
  if (weight.defined()) losses = losses * weight.expand_as(logits).gather(dimension, classes);
  if (label_smoothing != 0.0) {
    const Tensor uniform = (weight.defined() ? log_p * weight : log_p).sum(dimension, /*keepdim=*/true);
    const double share = label_smoothing / static_cast<double>(logits.size(dimension));
    losses = losses * (1.0 - label_smoothing) + uniform * share;
  }
  return -losses * divisor.reciprocal().to(logits.scalar_type()).masked_fill(ignored, 0);
}

Tensor composed_losses_of_probabilities(const Tensor& logits, Tensor probabilities, const Tensor& weight,
                                        const Tensor& divisor, double label_smoothing) {
  const int64_t dimension = class_dimension(logits.sizes());
  if (label_smoothing != 0.0) {
    probabilities =
        probabilities * (1.0 - label_smoothing) + label_smoothing / static_cast<double>(logits.size(dimension));
  }
  if (weight.defined()) probabilities = probabilities * weight;
  return -(probabilities * logits.log_softmax(dimension)).sum(dimension, /*keepdim=*/true) /
         divisor.to(logits.scalar_type());
}

}  // namespace

Tensor composed_loss(const Tensor& logits, const Tensor& target, const Tensor& weight, const Tensor& divisor,
                     int64_t ignore_index, double label_smoothing, bool per_row) {
  const int64_t dimension = class_dimension(logits.sizes());
  const Tensor wide = logits.to(accumulate_type(logits.scalar_type()));
  Tensor class_weights;
  if (weight.defined()) {
    at::DimVector broadcast(logits.dim(), 1);
    broadcast[dimension] = logits.size(dimension);
    class_weights = weight.to(wide.scalar_type()).reshape(broadcast);
  }
  Tensor losses;
  if (has_class_probabilities(target)) {
    losses = composed_losses_of_probabilities(wide, target, class_weights, divisor, label_smoothing);
  } else {
    const Tensor indices = target.to(at::kLong).reshape(loss_shape(logits.sizes())).unsqueeze(dimension);
    losses = composed_losses_of_indices(wide, indices, class_weights, divisor, ignore_index, label_smoothing);
  }
  return (per_row ? losses.squeeze(dimension) : losses.sum()).to(logits.scalar_type());
}

namespace {

constexpr const char* kName = "cross_entropy";

using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;  // loss, statistics, divisor
using BackwardResult = std::tuple<Tensor, Tensor>;         // grad_logits, grad_target

// ---- the kernels -------------------------------------------------------------------------------------------------

// The kernel takes any stride of the first dimension, so that row slices and expanded batches are not copied.
Tensor dense_per_outer_index(const Tensor& logits) {
  const bool dense = logits.dim() <= 1 || logits.size(0) == 0 || logits.select(0, 0).is_contiguous();
  return dense && logits.dim() > 1 ? logits : logits.contiguous();
}

// Dense operands and the shape that points at them.
struct Operands {
  Tensor logits, target, weight;
  CrossEntropyShape shape;

  Operands(const Tensor& logits_, const Tensor& target_, const Tensor& weight_, int64_t ignore_index,
           double label_smoothing)
      : logits(dense_per_outer_index(logits_)), target(target_.contiguous()) {
    const bool probabilities = has_class_probabilities(target);
    if (!probabilities && target.scalar_type() != at::kLong) target = target.to(at::kLong);
    if (weight_.defined()) weight = weight_.to(accumulate_type(logits.scalar_type())).contiguous();
    const int64_t dimension = class_dimension(logits.sizes());
    shape.dtype = kernel_dtype(logits, kName, "input");
    shape.outer = logits.dim() == 1 ? 1 : logits.size(0);
    shape.classes = logits.size(dimension);
    shape.inner = count_of("cross_entropy: the positions of input", logits.sizes().slice(dimension + 1));
    shape.logits = logits.const_data_ptr();
    shape.logits_outer_stride = logits.dim() == 1 ? 0 : logits.stride(0);
    shape.target = probabilities ? nullptr : target.const_data_ptr<int64_t>();
    shape.target_probabilities = probabilities ? target.const_data_ptr() : nullptr;
    shape.weight = data_or_null(weight);
    shape.ignore_index = ignore_index;
    shape.label_smoothing = label_smoothing;
  }
};

void check_arguments(const Tensor& logits, const Tensor& target, const Tensor& weight, const LossArguments& loss) {
  kernel_dtype(logits, kName, "input");
  TORCH_CHECK(logits.dim() >= 1, "cross_entropy: input must have shape [C], [N, C] or [N, C, d1, ...], got a scalar");
  check_same_device(kName, logits, "input", target, "target");
  check_same_device(kName, logits, "input", weight, "weight");
  check_same_dtype(kName, logits, "input", weight, "weight");
  check_targets(kName, logits.sizes(), target, logits.scalar_type(), weight, loss);
}

ForwardResult cross_entropy_kernel(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                   int64_t reduction, int64_t ignore_index, double label_smoothing) {
  check_arguments(logits, target, value_or_undefined(weight), {reduction, ignore_index, label_smoothing});
  const Operands operands(logits, target, value_or_undefined(weight), ignore_index, label_smoothing);
  const CrossEntropyShape& shape = operands.shape;
  // On other devices looking would wait for them: there a target that is no class gives NaN.
  if (shape.target != nullptr && logits.is_cpu())
    check_target_range(kName, operands.target, shape.classes, ignore_index);

  const auto options = logits.options().memory_format(std::nullopt);
  Tensor loss =
      at::empty(reduction == kNone ? at::IntArrayRef(loss_shape(logits.sizes())) : at::IntArrayRef(), options);
  const int64_t rows = multiply_sizes("cross_entropy: the rows of input", shape.outer, shape.inner);
  Tensor statistics = at::empty({2, rows}, options.dtype(accumulate_type(logits.scalar_type())));
  Tensor divisor = at::empty({}, options.dtype(at::kDouble));
  KernelsOn(logits)->cross_entropy.forward({shape, static_cast<LossReduction>(reduction), loss.mutable_data_ptr(),
                                            statistics.mutable_data_ptr(), divisor.mutable_data_ptr<double>()});
  return {loss, statistics, divisor};
}

BackwardResult cross_entropy_backward_kernel(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                             const OptionalTensor& weight, const Tensor& statistics,
                                             const Tensor& divisor, int64_t ignore_index, double label_smoothing,
                                             std::array<bool, 2> output_mask) {
  const Operands operands(logits, target, value_or_undefined(weight), ignore_index, label_smoothing);
  const Tensor dense_grad_loss = grad_loss.contiguous();
  const bool per_row = grad_loss.numel() == statistics.size(1);
  TORCH_CHECK(per_row || grad_loss.numel() == 1, "cross_entropy_backward: grad_loss has ", grad_loss.numel(),
              " elements, expected 1 or one for each of ", statistics.size(1), " rows");
  const auto options = logits.options().memory_format(std::nullopt);
  Tensor grad_logits = output_mask[0] ? at::empty(logits.sizes(), options) : Tensor();
  Tensor grad_target = output_mask[1] ? at::empty(logits.sizes(), options) : Tensor();
  if (!output_mask[0] && !output_mask[1]) return {grad_logits, grad_target};
  KernelsOn(logits)->cross_entropy.backward({operands.shape, statistics.const_data_ptr(),
                                             dense_grad_loss.const_data_ptr(), per_row && grad_loss.numel() > 1 ? 1 : 0,
                                             divisor.const_data_ptr<double>(), mutable_data_or_null(grad_logits),
                                             mutable_data_or_null(grad_target)});
  return {grad_logits, grad_target};
}

// ---- autograd ----------------------------------------------------------------------------------------------------

using BackwardSignature = BackwardResult(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                         const Tensor&, const Tensor&, int64_t, double, std::array<bool, 2>);

BackwardResult cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                      const OptionalTensor& weight, const Tensor& statistics, const Tensor& divisor,
                                      int64_t ignore_index, double label_smoothing, std::array<bool, 2> output_mask) {
  static const auto op = find_operator<BackwardSignature>("dlkernels::cross_entropy_backward");
  return op.call(grad_loss, logits, target, weight, statistics, divisor, ignore_index, label_smoothing, output_mask);
}

struct CrossEntropyBackwardNode : torch::autograd::Function<CrossEntropyBackwardNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_loss, const Tensor& logits,
                               const Tensor& target, const OptionalTensor& weight, const Tensor& statistics,
                               const Tensor& divisor, int64_t ignore_index, double label_smoothing,
                               std::array<bool, 2> output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad_loss, logits, target, value_or_undefined(weight), divisor});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->set_materialize_grads(false);
    auto [grad_logits, grad_target] = cross_entropy_backward(grad_loss, logits, target, weight, statistics, divisor,
                                                             ignore_index, label_smoothing, output_mask);
    return with_placeholders({grad_logits, grad_target}, logits);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad_loss = saved[0], &weight = saved[3], &divisor = saved[4];
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    const double label_smoothing = ctx->saved_data["label_smoothing"].toDouble();
    const bool per_row = grad_loss.dim() > 0;
    auto loss = [&](const variable_list& inputs) -> variable_list {
      return {composed_loss(inputs[0], inputs[1], weight, divisor, ignore_index, label_smoothing, per_row)};
    };
    const variable_list second = differentiate_twice(loss, {saved[1], saved[2]}, {grad_loss}, {grads[0], grads[1]});
    return {second[2], second[0], second[1], Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

BackwardResult cross_entropy_backward_autograd(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                               const OptionalTensor& weight, const Tensor& statistics,
                                               const Tensor& divisor, int64_t ignore_index, double label_smoothing,
                                               std::array<bool, 2> output_mask) {
  if (!must_record(grad_loss, logits, target)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return cross_entropy_backward(grad_loss, logits, target, weight, statistics, divisor, ignore_index, label_smoothing,
                                  output_mask);
  }
  const variable_list grads =
      without_placeholders(CrossEntropyBackwardNode::apply(grad_loss, logits, target, weight, statistics, divisor,
                                                           ignore_index, label_smoothing, output_mask),
                           output_mask);
  return {grads[0], grads[1]};
}

// Only the loss is an output of the node; what is saved reaches the caller through `saved_outputs`, without history.
struct CrossEntropyNode : torch::autograd::Function<CrossEntropyNode> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                        int64_t reduction, int64_t ignore_index, double label_smoothing, ForwardResult* saved_outputs) {
    at::AutoDispatchBelowADInplaceOrView guard;
    *saved_outputs = cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing);
    const auto& [loss, statistics, divisor] = *saved_outputs;
    ctx->save_for_backward({logits, target, value_or_undefined(weight), statistics, divisor});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto [grad_logits, grad_target] =
        cross_entropy_backward(grads[0], saved[0], saved[1], optional_of(saved[2]), saved[3], saved[4],
                               ctx->saved_data["ignore_index"].toInt(), ctx->saved_data["label_smoothing"].toDouble(),
                               needed_gradients<2>(ctx, {true, true}));
    return {grad_logits, grad_target, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

ForwardResult cross_entropy_autograd(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                     int64_t reduction, int64_t ignore_index, double label_smoothing) {
  if (!must_record(logits, target, weight)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing);
  }
  TORCH_CHECK(!wants_gradient(weight),
              "cross_entropy is not differentiable with respect to argument 'weight'. "
              "This input cannot have requires_grad True.");
  ForwardResult outputs;
  std::get<0>(outputs) =
      CrossEntropyNode::apply(logits, target, weight, reduction, ignore_index, label_smoothing, &outputs);
  return outputs;
}

// ---- autocast: losses are computed in float32 --------------------------------------------------------------------

template <c10::DispatchKey key, c10::DeviceType device>
ForwardResult cross_entropy_autocast(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                     int64_t reduction, int64_t ignore_index, double label_smoothing) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const Autocast cast{at::kFloat, device};
  return cross_entropy(cast(logits), has_class_probabilities(target) ? cast(target) : target, cast(weight), reduction,
                       ignore_index, label_smoothing);
}

}  // namespace

ForwardResult cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                            int64_t ignore_index, double label_smoothing) {
  static const auto op = find_operator<decltype(cross_entropy_kernel)>("dlkernels::cross_entropy");
  return op.call(logits, target, weight, reduction, ignore_index, label_smoothing);
}

Tensor cross_entropy_functional(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, Int reduction,
                                Int ignore_index, double label_smoothing) {
  if (!has_class_probabilities(target)) {
    return std::get<0>(cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing));
  }
  const at::ScalarType type = loss_type(logits.scalar_type(), target, weight);
  return std::get<0>(
      cross_entropy(logits.to(type), target.to(type), in_type(type, weight), reduction, ignore_index, label_smoothing));
}

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("cross_entropy", &cross_entropy_kernel);
  m.impl("cross_entropy_backward", &cross_entropy_backward_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("cross_entropy", &cross_entropy_kernel);
  m.impl("cross_entropy_backward", &cross_entropy_backward_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) {
  m.impl("cross_entropy", &cross_entropy_autograd);
  m.impl("cross_entropy_backward", &cross_entropy_backward_autograd);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCPU, m) {
  m.impl("cross_entropy", &cross_entropy_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCUDA, m) {
  m.impl("cross_entropy", &cross_entropy_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace dlkernels::ops
