// Two-dimensional convolution for torch: stride, padding on each side, dilation, groups. Saves input and weight. The
// output is channels_last where the input or the weight is; anything else than the two layouts is made contiguous.
#include "ops/conv2d.h"

#include <ATen/ATen.h>

#include "ops/conv2d_pieces.h"
#include "ops/device.h"
#include "ops/second_order.h"

namespace dlkernels::ops {
namespace {

constexpr const char* kName = "conv2d";

using Mask = std::array<bool, 3>;                           // input, weight, bias
using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;  // grad_input, grad_weight, grad_bias

// ---- argument checks ---------------------------------------------------------------------------------------------

void check_types(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  for (const auto& [tensor, name] : {std::pair(&weight, "weight"), std::pair(&bias, "bias")}) {
    if (!tensor->defined()) continue;
    check_same_device(kName, input, "input", *tensor, name);
    TORCH_CHECK(tensor->scalar_type() == input.scalar_type(), "conv2d: Input type (", input.scalar_type(), ") and ",
                name, " type (", tensor->scalar_type(), ") should be the same; expected scalar type ",
                toString(input.scalar_type()), " but found ", toString(tensor->scalar_type()));
  }
  kernel_dtype(input, kName, "input");
}

void check_numbers(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  auto all = [](at::IntArrayRef values, int64_t least) {
    return std::all_of(values.begin(), values.end(), [&](int64_t v) { return v >= least; });
  };
  TORCH_CHECK(stride.size() == 2, "conv2d: stride must have 2 values, got ", stride);
  TORCH_CHECK(padding.size() == 4, "conv2d: padding must have 4 values (top, bottom, left, right), got ", padding);
  TORCH_CHECK(dilation.size() == 2, "conv2d: dilation must have 2 values, got ", dilation);
  TORCH_CHECK(groups > 0, "conv2d: non-positive groups is not supported, got ", groups);
  TORCH_CHECK(all(padding, 0), "conv2d: negative padding is not supported, got ", padding);
  TORCH_CHECK(all(stride, 1), "conv2d: non-positive stride is not supported, got ", stride);
  TORCH_CHECK(all(dilation, 1), "conv2d: dilation should be greater than zero, but got ", dilation);
}

// Rows (0) or columns (1) of a convolution.
ConvolutionAxis axis_of(const Tensor& input, const Tensor& weight, int axis, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation) {
  return {input.size(2 + axis), weight.size(2 + axis), stride[axis],
          padding[2 * axis],    padding[2 * axis + 1], dilation[axis]};
}

void check_shapes(const Tensor& input, const Tensor& weight, const Tensor& bias, at::IntArrayRef padding,
                  at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK(weight.dim() == 4, "conv2d: Expected 4-dimensional weight [K, C / groups, kernel_H, kernel_W], got ",
              weight.sizes());
  TORCH_CHECK(input.dim() == 4, "conv2d: Expected 4-dimensional input for 4-dimensional weight ", weight.sizes(),
              ", but got ", input.dim(), "-dimensional input of size ", input.sizes(), " instead");
  TORCH_CHECK(weight.size(0) >= groups, "conv2d: Given groups=", groups, ", expected weight to be at least ", groups,
              " at dimension 0, but got weight of size ", weight.sizes(), " instead");
  TORCH_CHECK(weight.size(0) % groups == 0, "conv2d: Given groups=", groups, ", expected weight to be divisible by ",
              groups, " at dimension 0, but got weight of size ", weight.sizes(), " instead");
  TORCH_CHECK(input.size(1) == weight.size(1) * groups, "conv2d: Given groups=", groups, ", weight of size ",
              weight.sizes(), ", expected input", input.sizes(), " to have ", weight.size(1) * groups,
              " channels, but got ", input.size(1), " channels instead");
  TORCH_CHECK(!bias.defined() || (bias.dim() == 1 && bias.size(0) == weight.size(0)), "conv2d: Given weight of size ",
              weight.sizes(), ", expected bias to be 1-dimensional with ", weight.size(0),
              " elements, but got bias of size ", bias.defined() ? bias.sizes() : at::IntArrayRef(), " instead");
  TORCH_CHECK(weight.size(2) > 0 && weight.size(3) > 0, "conv2d: kernel size should be greater than zero, but got ",
              "kernel_height: ", weight.size(2), " kernel_width: ", weight.size(3));
  const ConvolutionAxis rows = axis_of(input, weight, 0, {1, 1}, padding, dilation);
  const ConvolutionAxis columns = axis_of(input, weight, 1, {1, 1}, padding, dilation);
  TORCH_CHECK(rows.padded_size() >= rows.reach() && columns.padded_size() >= columns.reach(),
              "conv2d: Calculated padded input size per channel: (", rows.padded_size(), " x ", columns.padded_size(),
              "). Kernel size: (", rows.reach(), " x ", columns.reach(),
              "). Kernel size can't be greater than actual input size");
}

// ---- the kernels ----------------------------------------------------------------------------------------------------

Tensor conv2d_kernel(const Tensor& input, const Tensor& weight, const OptionalTensor& optional_bias,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);
BackwardResult conv2d_backward_kernel(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                      int64_t groups, Mask output_mask);

at::MemoryFormat memory_format_of(const Tensor& input, const Tensor& weight) {
  const bool channels_last = input.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                             weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Images dense in the format, at any distance from one another: a slice or an expanded batch is not copied.
Tensor dense_images(const Tensor& images, at::MemoryFormat format) {
  const bool dense = images.size(0) > 0 && images.narrow(0, 0, 1).is_contiguous(format);
  return dense ? images : images.contiguous(format);
}

Conv2dGeometry geometry_of(const Tensor& input, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, int64_t groups) {
  Conv2dGeometry g = {};
  g.N = input.size(0), g.C = input.size(1), g.H = input.size(2), g.W = input.size(3);
  g.K = weight.size(0), g.kernel_H = weight.size(2), g.kernel_W = weight.size(3);
  g.output_H = axis_of(input, weight, 0, stride, padding, dilation).outputs();
  g.output_W = axis_of(input, weight, 1, stride, padding, dilation).outputs();
  // Neither a single output nor a single tap has a neighbour that any step would lead to.
  g.stride_H = g.output_H == 1 ? 1 : stride[0], g.stride_W = g.output_W == 1 ? 1 : stride[1];
  g.dilation_H = g.kernel_H == 1 ? 1 : dilation[0], g.dilation_W = g.kernel_W == 1 ? 1 : dilation[1];
  g.padding_top = padding[0], g.padding_left = padding[2];
  g.groups = groups;
  g.channels_last = memory_format_of(input, weight) == at::MemoryFormat::ChannelsLast;
  for (int i = 0; i < 4; ++i) g.weight_strides[i] = weight.stride(i);
  return g;
}

at::MemoryFormat memory_format_of(const Conv2dGeometry& g) {
  return g.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// A convolution of a part of the operands: pieces of the rows and of the columns together.
struct Piece {
  const AxisPiece &rows, &columns;

  Tensor of_input(const Tensor& input) const {
    return input.narrow(2, rows.first_pixel, rows.pixels).narrow(3, columns.first_pixel, columns.pixels);
  }
  Tensor of_weight(const Tensor& weight) const {
    return weight.narrow(2, rows.first_tap, rows.taps).narrow(3, columns.first_tap, columns.taps);
  }
  Tensor of_output(const Tensor& output) const {
    return output.narrow(2, rows.first_output, rows.outputs).narrow(3, columns.first_output, columns.outputs);
  }
  std::array<int64_t, 4> padding() const {
    return {rows.padding, rows.padding_after, columns.padding, columns.padding_after};
  }
};

// Every pair of a piece of the rows and one of the columns, none where there is nothing but padding.
template <class Body>
void for_each_piece(const ConvolutionAxis& rows, const ConvolutionAxis& columns, Body&& body) {
  const std::vector<AxisPiece> down = pieces_of(rows), across = pieces_of(columns);
  for (const AxisPiece& row : down) {
    for (const AxisPiece& column : across) body(Piece{row, column});
  }
}

bool is_whole(const Tensor& input, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
              at::IntArrayRef dilation) {
  return input.numel() > 0 && !is_mostly_padding(axis_of(input, weight, 0, stride, padding, dilation)) &&
         !is_mostly_padding(axis_of(input, weight, 1, stride, padding, dilation));
}

// output = convolution, of any geometry and of inputs without elements.
void convolve_pieces(const Tensor& input, const Tensor& weight, const Tensor& bias, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, const Tensor& output) {
  bias.defined() ? output.copy_(bias.reshape({1, -1, 1, 1}).expand(output.sizes())) : output.zero_();
  if (input.numel() == 0) return;
  for_each_piece(
      axis_of(input, weight, 0, stride, padding, dilation), axis_of(input, weight, 1, stride, padding, dilation),
      [&](const Piece& piece) {
        piece.of_output(output).copy_(conv2d_kernel(piece.of_input(input), piece.of_weight(weight), optional_of(bias),
                                                    stride, piece.padding(), dilation, groups));
      });
}

Tensor conv2d_kernel(const Tensor& input, const Tensor& weight, const OptionalTensor& optional_bias,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Tensor bias = value_or_undefined(optional_bias);
  check_types(input, weight, bias);
  check_numbers(stride, padding, dilation, groups);
  check_shapes(input, weight, bias, padding, dilation, groups);
  Conv2dGeometry g = geometry_of(input, weight, stride, padding, dilation, groups);
  Tensor output = at::empty({g.N, g.K, g.output_H, g.output_W}, input.options().memory_format(memory_format_of(g)));
  if (output.numel() == 0) return output;
  if (!is_whole(input, weight, stride, padding, dilation)) {
    convolve_pieces(input, weight, bias, stride, padding, dilation, groups, output);
    return output;
  }
  const Tensor dense_input = dense_images(input, memory_format_of(g));
  const Tensor dense_bias = bias.defined() ? bias.contiguous() : bias;
  g.input_image_stride = dense_input.stride(0);
  g.output_image_stride = output.stride(0);
  KernelsOn(input)->conv2d.forward({kernel_dtype(input, kName, "input"), g, dense_input.const_data_ptr(),
                                    weight.const_data_ptr(), data_or_null(dense_bias), output.mutable_data_ptr()});
  return output;
}

// The gradient of the bias follows from grad_output alone: it is that of kernels of one tap with these outputs.
Tensor bias_gradient(const Tensor& grad_output) {
  const Tensor input = grad_output.narrow(1, 0, 1), weight = grad_output.new_empty({grad_output.size(1), 1, 1, 1});
  return std::get<2>(
      conv2d_backward_kernel(grad_output, input, weight, {1, 1}, {0, 0, 0, 0}, {1, 1}, 1, {false, false, true}));
}

// Adds the gradients of every piece to those of the input and the weight, as far as they are wanted. Sums of pieces are
// carried in the type of other sums.
void add_gradients_of_pieces(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                             const Tensor& grad_input, const Tensor& grad_weight) {
  const at::ScalarType type = accumulate_type(input.scalar_type());
  const Tensor wide_grad = grad_output.to(type), wide_input = input.to(type), wide_weight = weight.to(type);
  const Tensor input_sum = grad_input.defined() ? grad_input.to(type) : grad_input;
  const Tensor weight_sum = grad_weight.defined() ? grad_weight.to(type) : grad_weight;
  for_each_piece(axis_of(input, weight, 0, stride, padding, dilation),
                 axis_of(input, weight, 1, stride, padding, dilation), [&](const Piece& piece) {
                   const auto [of_input, of_weight, of_bias] = conv2d_backward_kernel(
                       piece.of_output(wide_grad), piece.of_input(wide_input), piece.of_weight(wide_weight), stride,
                       piece.padding(), dilation, groups, {grad_input.defined(), grad_weight.defined(), false});
                   if (grad_input.defined()) piece.of_input(input_sum).add_(of_input);
                   if (grad_weight.defined()) piece.of_weight(weight_sum).add_(of_weight);
                 });
  if (grad_input.defined() && !grad_input.is_same(input_sum)) grad_input.copy_(input_sum);
  if (grad_weight.defined() && !grad_weight.is_same(weight_sum)) grad_weight.copy_(weight_sum);
}

BackwardResult conv2d_backward_kernel(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                      int64_t groups, Mask output_mask) {
  check_types(input, weight, Tensor());
  check_numbers(stride, padding, dilation, groups);
  check_shapes(input, weight, Tensor(), padding, dilation, groups);
  check_same_dtype(kName, input, "input", grad_output, "grad_output");
  Conv2dGeometry g = geometry_of(input, weight, stride, padding, dilation, groups);
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef({g.N, g.K, g.output_H, g.output_W}),
              "conv2d_backward: grad_output must have the shape of the output, [", g.N, ", ", g.K, ", ", g.output_H,
              ", ", g.output_W, "], got ", grad_output.sizes());
  const at::MemoryFormat format = memory_format_of(g);
  Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) grad_input = at::empty(input.sizes(), input.options().memory_format(format));
  if (output_mask[1]) {
    grad_weight = at::empty(weight.sizes(), weight.options().memory_format(weight.suggest_memory_format()));
  }
  if (output_mask[2]) grad_bias = at::empty({g.K}, weight.options());
  if (grad_output.numel() == 0 || !is_whole(input, weight, stride, padding, dilation)) {
    for (const Tensor& grad : {grad_input, grad_weight, grad_bias}) {
      if (grad.defined()) grad.zero_();
    }
    if (grad_output.numel() == 0) return {grad_input, grad_weight, grad_bias};
    if (input.numel() > 0) {
      add_gradients_of_pieces(grad_output, input, weight, stride, padding, dilation, groups, grad_input, grad_weight);
    }
    return {grad_input, grad_weight, grad_bias.defined() ? bias_gradient(grad_output) : grad_bias};
  }
  const Tensor dense_input = output_mask[1] ? dense_images(input, format) : input;
  const Tensor dense_grad_output = dense_images(grad_output, format);
  g.input_image_stride = dense_input.stride(0);
  g.output_image_stride = dense_grad_output.stride(0);
  if (grad_weight.defined()) {
    for (int i = 0; i < 4; ++i) g.grad_weight_strides[i] = grad_weight.stride(i);
  }
  KernelsOn(input)->conv2d.backward({kernel_dtype(input, kName, "input"), g, dense_grad_output.const_data_ptr(),
                                     dense_input.const_data_ptr(), weight.const_data_ptr(),
                                     mutable_data_or_null(grad_input), mutable_data_or_null(grad_weight),
                                     mutable_data_or_null(grad_bias)});
  return {grad_input, grad_weight, grad_bias};
}

// ---- autograd ----------------------------------------------------------------------------------------------------

BackwardResult conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                               c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                               c10::SymInt groups, Mask output_mask) {
  using Signature = BackwardResult(const Tensor&, const Tensor&, const Tensor&, c10::SymIntArrayRef,
                                   c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymInt, Mask);
  static const auto op = find_operator<Signature>("dlkernels::conv2d_backward");
  return op.call(grad_output, input, weight, stride, padding, dilation, std::move(groups), output_mask);
}

// stride, padding, dilation and groups between forward and backward of a node.
struct Numbers {
  std::vector<c10::SymInt> stride, padding, dilation;
  c10::SymInt groups;

  static void save(AutogradContext* ctx, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                   c10::SymIntArrayRef dilation, const c10::SymInt& groups) {
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
  }
  explicit Numbers(AutogradContext* ctx)
      : stride(ctx->saved_data["stride"].toSymIntVector()),
        padding(ctx->saved_data["padding"].toSymIntVector()),
        dilation(ctx->saved_data["dilation"].toSymIntVector()),
        groups(ctx->saved_data["groups"].toSymInt()) {}

  Tensor forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) const {
    return conv2d(input, weight, bias, stride, padding, dilation, groups);
  }
  BackwardResult backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, Mask mask) const {
    return conv2d_backward(grad_output, input, weight, stride, padding, dilation, groups, mask);
  }
};

// A convolution is linear in its input and in its weight, so the gradients of its gradients are convolutions again:
// with u, v, b the gradients that arrive for grad_input, grad_weight and grad_bias,
//   grad of grad_output = conv(u, weight) + conv(input, v) + b
//   grad of input       = the input gradient of conv(., v),    grad of weight = the weight gradient of conv(u, .)
struct Conv2dBackwardNode : torch::autograd::Function<Conv2dBackwardNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const Tensor& weight, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                               c10::SymIntArrayRef dilation, const c10::SymInt& groups, Mask output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad_output, input, weight});
    Numbers::save(ctx, stride, padding, dilation, groups);
    ctx->saved_data["output_mask"] = std::vector<bool>(output_mask.begin(), output_mask.end());
    ctx->set_materialize_grads(false);
    auto [grad_input, grad_weight, grad_bias] =
        conv2d_backward(grad_output, input, weight, stride, padding, dilation, groups, output_mask);
    return with_placeholders({grad_input, grad_weight, grad_bias}, input);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &input = saved[1], &weight = saved[2];
    const Numbers numbers(ctx);
    const auto mask = ctx->saved_data["output_mask"].toBoolList();
    const Tensor u = mask[0] ? grads[0] : Tensor(), v = mask[1] ? grads[1] : Tensor(),
                 b = mask[2] ? grads[2] : Tensor();
    Tensor grad_grad_output, grad_input, grad_weight;
    auto add = [&](const Tensor& term) {
      grad_grad_output = grad_grad_output.defined() ? grad_grad_output + term : term;
    };
    if (ctx->needs_input_grad(0)) {
      if (u.defined()) add(numbers.forward(u, weight, std::nullopt));
      if (v.defined()) add(numbers.forward(input, v, std::nullopt));
      if (b.defined()) add(b.reshape({1, -1, 1, 1}).expand_symint(grad_output.sym_sizes()));
    }
    if (ctx->needs_input_grad(1) && v.defined()) {
      grad_input = std::get<0>(numbers.backward(grad_output, input, v, {true, false, false}));
    }
    if (ctx->needs_input_grad(2) && u.defined()) {
      grad_weight = std::get<1>(numbers.backward(grad_output, u, weight, {false, true, false}));
    }
    return {grad_grad_output, grad_input, grad_weight, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

BackwardResult conv2d_backward_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                        c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                        c10::SymIntArrayRef dilation, c10::SymInt groups, Mask output_mask) {
  if (!must_record(grad_output, input, weight)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return conv2d_backward(grad_output, input, weight, stride, padding, dilation, std::move(groups), output_mask);
  }
  const variable_list grads = without_placeholders(
      Conv2dBackwardNode::apply(grad_output, input, weight, stride, padding, dilation, groups, output_mask),
      output_mask);
  return {grads[0], grads[1], grads[2]};
}

struct Conv2dNode : torch::autograd::Function<Conv2dNode> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                        const c10::SymInt& groups) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({input, weight});
    Numbers::save(ctx, stride, padding, dilation, groups);
    ctx->saved_data["has_bias"] = is_defined(bias);
    return conv2d(input, weight, bias, stride, padding, dilation, groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool bias_wanted = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2);
    auto [grad_input, grad_weight, grad_bias] = Numbers(ctx).backward(
        grads[0], saved[0], saved[1], {ctx->needs_input_grad(0), ctx->needs_input_grad(1), bias_wanted});
    return {grad_input, grad_weight, grad_bias, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor conv2d_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                       c10::SymInt groups) {
  if (!must_record(input, weight, bias)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return conv2d(input, weight, bias, stride, padding, dilation, std::move(groups));
  }
  return Conv2dNode::apply(input, weight, bias, stride, padding, dilation, groups);
}

// ---- autocast: convolutions run in the lower precision ----------------------------------------------------------

template <c10::DispatchKey key, c10::DeviceType device>
Tensor conv2d_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                       c10::SymInt groups) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const Autocast cast{at::autocast::get_autocast_dtype(device), device};
  return conv2d(cast(input), cast(weight), cast(bias), stride, padding, dilation, std::move(groups));
}

// ---- the arguments of torch.nn.functional.conv2d -----------------------------------------------------------------

std::array<int64_t, 2> pair_of(const IntOrInts& values, const char* name) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2, "conv2d: expected ", name,
              " to be a single integer value or a list of 2 values to match the convolution dimensions, but got ", name,
              "=", at::IntArrayRef(values));
  return {values[0], values.back()};
}

// Zeros on both sides together that leave the size as it is; the odd one goes to the end.
void same_padding(const Tensor& weight, const std::array<int64_t, 2>& stride, const std::array<int64_t, 2>& dilation,
                  std::array<c10::SymInt, 4>& padding) {
  TORCH_CHECK(stride[0] == 1 && stride[1] == 1, "conv2d: padding='same' is not supported for strided convolutions");
  for (int i = 0; i < 2; ++i) {
    const c10::SymInt taps = weight.sym_size(2 + i) - 1;
    const std::optional<int64_t> known = taps.maybe_as_int();
    const c10::SymInt total =
        known ? multiply_sizes("conv2d: padding='same'", *known, dilation[i]) : taps * dilation[i];
    padding[2 * i] = total / 2;
    padding[2 * i + 1] = total - padding[2 * i];
  }
}

// What torch checks before it looks at the padding.
void check_call(const Tensor& input, const Tensor& weight, const std::array<int64_t, 2>& stride, int64_t groups) {
  TORCH_CHECK(weight.dim() == 4, "conv2d: Expected ", weight.dim(), "-dimensional input for ", weight.dim(),
              "-dimensional weight ", weight.sym_sizes(), ", but got ", input.dim(), "-dimensional input of size ",
              input.sym_sizes(), " instead; conv2d takes a 4-dimensional weight");
  TORCH_CHECK(input.dim() == 3 || input.dim() == 4,
              "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ", input.sym_sizes());
  TORCH_CHECK(groups > 0, "conv2d: non-positive groups is not supported, got ", groups);
  TORCH_CHECK(stride[0] > 0 && stride[1] > 0, "conv2d: non-positive stride is not supported, got ",
              at::IntArrayRef(stride));
}

}  // namespace

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::SymIntArrayRef stride,
              c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, c10::SymInt groups) {
  using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::SymIntArrayRef,
                           c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymInt);
  static const auto op = find_operator<Signature>("dlkernels::conv2d");
  return op.call(input, weight, bias, stride, padding, dilation, std::move(groups));
}

Tensor conv2d_functional(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const IntOrInts& stride,
                         const Padding& padding, const IntOrInts& dilation, Int groups) {
  const auto strides = pair_of(stride, "stride"), dilations = pair_of(dilation, "dilation");
  check_call(input, weight, strides, groups);
  std::array<c10::SymInt, 4> sides = {0, 0, 0, 0};
  if (const auto* text = std::get_if<std::string>(&padding)) {
    if (*text == "same") {
      same_padding(weight, strides, dilations, sides);
    } else {
      TORCH_CHECK(*text == "valid", "conv2d: Invalid padding string: '", *text, "', expected 'valid' or 'same'");
    }
  } else {
    const auto pair = pair_of(std::get<IntOrInts>(padding), "padding");
    sides = {pair[0], pair[0], pair[1], pair[1]};
  }
  const std::array<c10::SymInt, 2> stride_values = {strides[0], strides[1]};
  const std::array<c10::SymInt, 2> dilation_values = {dilations[0], dilations[1]};
  const bool unbatched = input.dim() == 3;
  const Tensor output = conv2d(unbatched ? input.unsqueeze(0) : input, weight, bias, stride_values, sides,
                               dilation_values, groups.number);
  return unbatched ? output.squeeze(0) : output;
}

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("conv2d", &conv2d_kernel);
  m.impl("conv2d_backward", &conv2d_backward_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("conv2d", &conv2d_kernel);
  m.impl("conv2d_backward", &conv2d_backward_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) {
  m.impl("conv2d", &conv2d_autograd);
  m.impl("conv2d_backward", &conv2d_backward_autograd);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCPU, m) {
  m.impl("conv2d", &conv2d_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCUDA, m) {
  m.impl("conv2d", &conv2d_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace dlkernels::ops
