// Scaled dot-product attention for torch: boolean and additive masks of any broadcastable shape, causal masks, dropout,
// grouped queries, broadcast batch dimensions. Saves its inputs (a boolean mask as a copy), the output (also in float32
// where it is a half type), two numbers a row (statistics) and the seed of dropout.
#include "ops/attention.h"

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>

#include <cmath>
#include <limits>

#include "ops/device.h"
#include "ops/second_order.h"

namespace dlkernels::ops {
namespace {

constexpr const char* kName = "scaled_dot_product_attention";

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;   // output, exact_output, statistics, dropout_seed
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // gradients of query, key, value, attn_mask

// ---- argument checks ---------------------------------------------------------------------------------------------

void check_tensors(const Tensor& query, const Tensor& key, const Tensor& value) {
  kernel_dtype(query, kName, "query");
  check_same_device(kName, query, "query", key, "key");
  check_same_device(kName, query, "query", value, "value");
  TORCH_CHECK(query.scalar_type() == key.scalar_type() && query.scalar_type() == value.scalar_type(), kName,
              ": Expected query, key, and value to have the same dtype, but got query.dtype: ", query.dtype(),
              " key.dtype: ", key.dtype(), " and value.dtype: ", value.dtype(), " instead.");
  TORCH_CHECK(query.dim() >= 2 && key.dim() >= 2 && value.dim() >= 2, kName,
              ": Expected query, key, and value to all be  at least 2 dimensional, but got query.dim: ", query.dim(),
              " key.dim: ", key.dim(), " and value.dim: ", value.dim(), " instead.");
  TORCH_CHECK(query.size(-1) == key.size(-1), kName,
              ": query and key must have the same last dimension, but got query ", query.sizes(), " and key ",
              key.sizes());
  TORCH_CHECK(key.size(-2) == value.size(-2), kName, ": key and value must have the same sequence length, but got key ",
              key.sizes(), " and value ", value.sizes());
}

void check_grouped_heads(const Tensor& query, const Tensor& key, const Tensor& value) {
  TORCH_CHECK_INDEX(query.dim() >= 3 && key.dim() >= 3 && value.dim() >= 3, kName,
                    ": enable_gqa needs a dimension of heads (Dimension out of range), but got query ", query.sizes(),
                    ", key ", key.sizes(), " and value ", value.sizes());
  const int64_t heads = query.size(-3), key_heads = key.size(-3), value_heads = value.size(-3);
  auto divides_heads = [heads](int64_t count) { return count > 0 ? heads % count == 0 : heads == 0; };
  TORCH_CHECK(divides_heads(key_heads) && divides_heads(value_heads), kName,
              ": Number of heads in key and value must divide the number of heads in query: got ", heads, " in query, ",
              key_heads, " in key and ", value_heads, " in value");
}

void check_mask(const Tensor& query, const Tensor& mask, bool is_causal) {
  if (!mask.defined()) return;
  TORCH_CHECK(!is_causal, kName, ": Explicit attn_mask should not be set when is_causal=True");
  check_same_device(kName, query, "query", mask, "attn_mask");
  const auto type = mask.scalar_type();
  TORCH_CHECK(type == at::kBool || type == at::kFloat || type == query.scalar_type(), kName,
              ": Expected attn_mask dtype to be bool or float or to match query dtype, but got attn_mask.dtype: ",
              mask.dtype(), " and  query.dtype: ", query.dtype(), " instead.");
}

void check_options(double dropout_p, const std::optional<double>& scale) {
  TORCH_CHECK(dropout_p >= 0.0 && dropout_p <= 1.0, kName,
              ": dropout probability dropout_p has to be between 0 and 1, but got ", dropout_p);
  TORCH_CHECK(!scale.has_value() || !std::isnan(*scale), kName, ": scale must be a number, got nan");
}

// ---- views -------------------------------------------------------------------------------------------------------

Tensor with_contiguous_columns(const Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

// Each head of the tensor `heads / tensor.size(-3)` times in a row.
Tensor repeat_heads(const Tensor& tensor, int64_t heads) {
  return tensor.size(-3) == heads ? tensor : tensor.repeat_interleave(heads / tensor.size(-3), -3);
}

template <class Pointer>
AttentionTensor<Pointer> as_argument(const Tensor& tensor) {
  AttentionTensor<Pointer> argument{};
  if (!tensor.defined()) return argument;
  if constexpr (std::is_same_v<Pointer, void*>) {
    argument.data = tensor.mutable_data_ptr();
  } else {
    argument.data = tensor.const_data_ptr();
  }
  for (int64_t d = 0; d < tensor.dim() - 3; ++d) argument.batch_strides[d] = tensor.stride(d);
  argument.head_stride = tensor.stride(-3);
  argument.row_stride = tensor.stride(-2);
  return argument;
}

template <class Pointer>
AttentionMask<Pointer> as_mask_argument(const Tensor& mask, at::ScalarType query_type) {
  AttentionMask<Pointer> argument{};
  argument.type = AttentionMaskType::none;
  if (!mask.defined()) return argument;
  const AttentionTensor<Pointer> tensor = as_argument<Pointer>(mask);
  argument.type = mask.scalar_type() == at::kBool    ? AttentionMaskType::boolean
                  : mask.scalar_type() == query_type ? AttentionMaskType::element
                                                     : AttentionMaskType::float32;
  argument.data = tensor.data;
  std::copy(std::begin(tensor.batch_strides), std::end(tensor.batch_strides), std::begin(argument.batch_strides));
  argument.head_stride = tensor.head_stride;
  argument.row_stride = tensor.row_stride;
  argument.column_stride = mask.stride(-1);
  return argument;
}

// Everything that forward and backward have in common: query, key, value and mask broadcast (by strides) to
// [batch..., heads, rows, columns], and their sizes.
struct Operands {
  Tensor query, key, value, mask;
  at::DimVector batch_shape;  // without heads
  bool has_heads;             // false for two-dimensional inputs, where `heads` is a dimension of size 1 put in front
  AttentionSizes sizes{};
  double scale;

  Operands(const Tensor& query_, const Tensor& key_, const Tensor& value_, const OptionalTensor& mask_,
           double dropout_p, bool is_causal, const std::optional<double>& scale_, bool enable_gqa) {
    check_tensors(query_, key_, value_);
    if (enable_gqa) check_grouped_heads(query_, key_, value_);
    check_mask(query_, value_or_undefined(mask_), is_causal);
    check_options(dropout_p, scale_);
    has_heads = std::max({query_.dim(), key_.dim(), value_.dim()}) > 2;
    auto prepared = [](const Tensor& t) { return with_contiguous_columns(t.dim() == 2 ? t.unsqueeze(0) : t); };
    query = prepared(query_), key = prepared(key_), value = prepared(value_);
    if (enable_gqa && key.size(-3) != value.size(-3)) {
      key = repeat_heads(key, query.size(-3)), value = repeat_heads(value, query.size(-3));
    }
    broadcast(enable_gqa);
    if (is_defined(mask_)) mask = expanded_mask(*mask_);
    const int64_t E = sizes.head_size;
    scale = scale_.value_or(E == 0 ? 1.0 : 1.0 / std::sqrt(static_cast<double>(E)));
  }

  at::DimVector shape(int64_t heads, int64_t rows, int64_t columns) const {
    at::DimVector result(batch_shape);
    result.insert(result.end(), {heads, rows, columns});
    return result;
  }

  // An output [batch..., heads, L, columns]. Where the heads of `like` lie inside its rows, as in a projection split
  // into heads, so do those of the output, and the projection that follows reads it without a copy.
  Tensor empty_like_layout(const Tensor& like, int64_t heads, int64_t rows, int64_t columns) const {
    const auto options = query.options().memory_format(std::nullopt);
    if (like.stride(-3) >= like.stride(-2)) return at::empty(shape(heads, rows, columns), options);
    return at::empty(shape(rows, heads, columns), options).transpose(-3, -2);
  }

 private:
  // With grouped queries the heads of key and value are their own; otherwise they broadcast as a batch dimension does,
  // which a key and value of one head make the same thing.
  void broadcast(bool enable_gqa) {
    auto leading = [](const Tensor& t, int64_t kept) { return t.sizes().slice(0, t.dim() - kept); };
    batch_shape =
        at::infer_size_dimvector(at::infer_size_dimvector(leading(query, 3), leading(key, 3)), leading(value, 3));
    const int64_t batch_dims = static_cast<int64_t>(batch_shape.size());
    TORCH_CHECK(batch_dims <= kAttentionBatchDims, kName, ": query, key and value may have up to ",
                kAttentionBatchDims + 3, " dimensions, got query ", query.sizes(), ", key ", key.sizes(), " and value ",
                value.sizes());
    const auto kv_heads = at::infer_size_dimvector({key.size(-3)}, {value.size(-3)});
    sizes.kv_heads = kv_heads[0];
    sizes.heads = enable_gqa ? query.size(-3) : at::infer_size_dimvector({query.size(-3)}, kv_heads)[0];
    sizes.query_length = query.size(-2), sizes.key_length = key.size(-2);
    sizes.head_size = query.size(-1), sizes.value_size = value.size(-1);
    sizes.batch_dims = batch_dims;
    std::copy(batch_shape.begin(), batch_shape.end(), sizes.batch_sizes);
    sizes.batches = count_of("attention: the batches", batch_shape);
    query = query.expand(shape(sizes.heads, sizes.query_length, sizes.head_size));
    key = key.expand(shape(sizes.kv_heads, sizes.key_length, sizes.head_size));
    value = value.expand(shape(sizes.kv_heads, sizes.key_length, sizes.value_size));
  }

  Tensor expanded_mask(const Tensor& original) const {
    const at::DimVector scores = shape(sizes.heads, sizes.query_length, sizes.key_length);
    at::IntArrayRef limit(scores);
    if (!has_heads) limit = limit.slice(1);
    TORCH_CHECK(at::is_expandable_to(original.sizes(), limit), kName, ": attn_mask of shape ", original.sizes(),
                " does not broadcast: The size of tensor a must match the size of tensor b, expected ", limit);
    return original.expand(scores);
  }
};

// ---- the kernels ----------------------------------------------------------------------------------------------------

bool is_rounded(const Tensor& tensor) {
  return accumulate_type(tensor.scalar_type()) != tensor.scalar_type();
}

// A seed from torch's generator of the device, in its memory: nothing waits for it, and graphs draw it anew.
Tensor draw_seed(const at::TensorOptions& options, bool is_needed) {
  Tensor seed = at::zeros({}, options.dtype(at::kLong));
  return is_needed ? seed.random_() : seed;
}
const uint64_t* seed_of(const Tensor& seed) {
  return reinterpret_cast<const uint64_t*>(seed.const_data_ptr<int64_t>());
}

ForwardResult attention_kernel(const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                               std::optional<double> scale, bool enable_gqa) {
  const Operands operands(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa);
  const AttentionSizes& sizes = operands.sizes;
  const auto options = query.options().memory_format(std::nullopt);
  Tensor output = operands.empty_like_layout(operands.query, sizes.heads, sizes.query_length, sizes.value_size);
  const bool is_half = is_rounded(query);
  Tensor exact_output = is_half ? at::empty_like(output, output.options().dtype(at::kFloat)) : at::empty({0}, options);
  at::DimVector statistics_shape(output.sizes().slice(0, output.dim() - 1));
  statistics_shape.insert(statistics_shape.begin(), 2);
  Tensor statistics = at::empty(statistics_shape, options.dtype(accumulate_type(query.scalar_type())));
  const Tensor dropout_seed = draw_seed(options, dropout_p > 0);
  KernelsOn(query)->attention.forward(
      {kernel_dtype(query, kName, "query"), sizes, as_argument<const void*>(operands.query),
       as_argument<const void*>(operands.key), as_argument<const void*>(operands.value),
       as_mask_argument<const void*>(operands.mask, query.scalar_type()), is_causal, operands.scale, dropout_p,
       seed_of(dropout_seed), as_argument<void*>(output),
       is_half ? as_argument<void*>(exact_output) : AttentionTensor<void*>{}, statistics.mutable_data_ptr()});
  if (operands.has_heads) return {output, exact_output, statistics, dropout_seed};
  return {output.squeeze(0), is_half ? exact_output.squeeze(0) : exact_output, statistics.squeeze(1), dropout_seed};
}

// The gradient of an argument from that of its broadcast view. Contiguous, for the order in which torch sums follows
// strides, as the gradient's follow those of the inputs.
Tensor reduced_to(const Tensor& grad, const Tensor& argument) {
  if (!grad.defined() || grad.sizes() == argument.sizes()) return grad;
  if (argument.dim() >= 3 && grad.size(-3) != argument.size(-3) && argument.size(-3) > 1) {  // repeated heads
    const int64_t heads = argument.size(-3);
    return reduced_to(grad.contiguous().unflatten(-3, {heads, grad.size(-3) / heads}).sum(-3), argument);
  }
  return at::sum_to(grad.contiguous(), argument.sizes());
}

// Whether a gradient is summed over dimensions that its argument is broadcast along.
bool is_summed(const Operands& operands, const Tensor& query, const Tensor& key, const Tensor& value) {
  return operands.query.numel() != query.numel() || operands.key.numel() != key.numel() ||
         operands.value.numel() != value.numel();
}

BackwardResult attention_backward_kernel(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                         const Tensor& value, const OptionalTensor& attn_mask, const Tensor& output,
                                         const Tensor& exact_output, const Tensor& statistics,
                                         const Tensor& dropout_seed, double dropout_p, bool is_causal,
                                         std::optional<double> scale, bool enable_gqa,
                                         std::array<bool, 4> output_mask) {
  const Operands operands(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa);
  if (is_rounded(query) && is_summed(operands, query, key, value)) {  // rounded once, after the sums
    auto wide = [](const Tensor& t) { return t.to(at::kFloat); };
    auto narrow = [&](const Tensor& t) { return t.defined() ? t.to(query.scalar_type()) : t; };
    const bool cast_mask = operands.mask.defined() && operands.mask.scalar_type() == query.scalar_type();
    auto [grad_query, grad_key, grad_value, grad_mask] =
        attention_backward_kernel(wide(grad_output), wide(query), wide(key), wide(value),
                                  cast_mask ? OptionalTensor(wide(*attn_mask)) : attn_mask, exact_output, exact_output,
                                  statistics, dropout_seed, dropout_p, is_causal, scale, enable_gqa, output_mask);
    return {narrow(grad_query), narrow(grad_key), narrow(grad_value), cast_mask ? narrow(grad_mask) : grad_mask};
  }
  const AttentionSizes& sizes = operands.sizes;
  const at::DimVector output_shape = operands.shape(sizes.heads, sizes.query_length, sizes.value_size);
  TORCH_CHECK(grad_output.sizes() == output.sizes() && grad_output.numel() == c10::multiply_integers(output_shape),
              "attention_backward: grad_output ", grad_output.sizes(), " must have the shape of output ",
              output.sizes(), ", which the inputs make ", at::IntArrayRef(output_shape));
  check_same_dtype("attention_backward", query, "query", grad_output, "grad_output");
  const bool is_half = is_rounded(query);
  const Tensor output_view = with_contiguous_columns(output).expand(output_shape);
  const Tensor exact_output_view = is_half ? with_contiguous_columns(exact_output).expand(output_shape) : Tensor();
  const Tensor grad_view = with_contiguous_columns(grad_output).expand(output_shape);
  const Tensor dense_statistics = statistics.contiguous();

  auto gradient = [&](int index, const Tensor& like, int64_t heads, int64_t rows, int64_t columns) {
    return output_mask[index] ? operands.empty_like_layout(like, heads, rows, columns) : Tensor();
  };
  Tensor grad_query = gradient(0, operands.query, sizes.heads, sizes.query_length, sizes.head_size);
  Tensor grad_key = gradient(1, operands.key, sizes.kv_heads, sizes.key_length, sizes.head_size);
  Tensor grad_value = gradient(2, operands.value, sizes.kv_heads, sizes.key_length, sizes.value_size);
  const bool wants_mask = output_mask[3] && operands.mask.defined() && operands.mask.scalar_type() != at::kBool;
  Tensor grad_mask, grad_mask_view;
  if (wants_mask) {
    const bool has_scores = operands.mask.numel() > 0;  // where not, no kernel visits the mask
    const auto options = attn_mask->options().memory_format(std::nullopt);
    grad_mask = has_scores ? at::empty(attn_mask->sizes(), options) : at::zeros(attn_mask->sizes(), options);
    if (has_scores) grad_mask_view = grad_mask.expand(operands.mask.sizes());
  }
  KernelsOn(query)->attention.backward(
      {kernel_dtype(query, kName, "query"), sizes, as_argument<const void*>(grad_view),
       as_argument<const void*>(operands.query), as_argument<const void*>(operands.key),
       as_argument<const void*>(operands.value), as_argument<const void*>(output_view),
       as_argument<const void*>(exact_output_view), dense_statistics.const_data_ptr(),
       as_mask_argument<const void*>(operands.mask, query.scalar_type()), is_causal, operands.scale, dropout_p,
       seed_of(dropout_seed), as_argument<void*>(grad_query), as_argument<void*>(grad_key),
       as_argument<void*>(grad_value), as_mask_argument<void*>(grad_mask_view, query.scalar_type()),
       grad_mask_view.defined() ? grad_mask.numel() : 0});
  return {reduced_to(grad_query, query), reduced_to(grad_key, key), reduced_to(grad_value, value), grad_mask};
}

// ---- autograd ----------------------------------------------------------------------------------------------------

using BackwardSignature = BackwardResult(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                         const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                                         const Tensor&, double, bool, std::optional<double>, bool, std::array<bool, 4>);

BackwardResult attention_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                  const Tensor& value, const OptionalTensor& attn_mask, const Tensor& output,
                                  const Tensor& exact_output, const Tensor& statistics, const Tensor& dropout_seed,
                                  double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa,
                                  std::array<bool, 4> output_mask) {
  static const auto op = find_operator<BackwardSignature>("dlkernels::attention_backward");
  return op.call(grad_output, query, key, value, attn_mask, output, exact_output, statistics, dropout_seed, dropout_p,
                 is_causal, scale, enable_gqa, output_mask);
}

// The factors 0 and 1 / (1 - p) that dropout multiplied the probabilities by, [batch..., heads, L, S], from the
// backward operator: with probabilities of one and rows of the identity as grad_output, they are the gradient of value.
Tensor dropout_factors(const Tensor& grad_output, const c10::SymInt& S, const Tensor& dropout_seed, double dropout_p) {
  const c10::SymInt L = grad_output.sym_size(-2);
  const auto options = grad_output.options().dtype(accumulate_type(grad_output.scalar_type()));
  auto zeros = [&](const c10::SymInt& rows, const c10::SymInt& columns) {
    c10::SymDimVector shape(grad_output.sym_sizes());
    shape[shape.size() - 2] = rows, shape.back() = columns;
    return at::zeros_symint(shape, options);
  };
  const Tensor output = zeros(L, L), row = output.select(-1, 0);
  const Tensor statistics = at::stack({row, row + 1});  // every score is 0, and its exponential the whole sum
  const auto grads = attention_backward(output + at::eye_symint(L, options), zeros(L, 1), zeros(S, 1), zeros(S, L),
                                        std::nullopt, output, at::empty({0}, options), statistics, dropout_seed,
                                        dropout_p, false, std::nullopt, false, {false, false, true, false});
  return std::get<2>(grads).transpose(-2, -1);
}

// The attention from differentiable operators. `mask` and `dropout` (factors of the probabilities) may be undefined.
Tensor composed_attention(const Tensor& query, Tensor key, Tensor value, const Tensor& mask, const Tensor& dropout,
                          bool is_causal, std::optional<double> scale, bool enable_gqa) {
  if (enable_gqa) {
    for (Tensor* shared : {&key, &value}) {
      const c10::SymInt heads = shared->sym_size(-3);
      if (heads != 0) *shared = shared->repeat_interleave_symint(query.sym_size(-3) / heads, -3);
    }
  }
  const int64_t E = query.sym_size(-1).guard_int(__FILE__, __LINE__);
  const double factor = scale.value_or(E == 0 ? 1.0 : 1.0 / std::sqrt(static_cast<double>(E)));
  Tensor scores = at::matmul(query * factor, key.transpose(-2, -1));
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (mask.defined() && mask.scalar_type() == at::kBool) {
    scores = scores + at::zeros_like(mask, query.options()).masked_fill(mask.logical_not(), -infinity);
  } else if (mask.defined()) {
    scores = scores + mask;
  } else if (is_causal) {
    const Tensor visible = at::ones_symint({query.sym_size(-2), key.sym_size(-2)}, query.options().dtype(at::kBool));
    scores = scores.masked_fill(visible.tril().logical_not(), -infinity);
  }
  if (key.sym_size(-2) == 0) return at::matmul(scores, value);
  const Tensor maxima = scores.detach().amax(-1, true);
  const Tensor visible = maxima.ne(-infinity);  // a row that sees nothing gives zeros
  const Tensor exponentials = (scores - maxima.masked_fill(visible.logical_not(), 0.0)).exp();
  const Tensor sums = exponentials.sum(-1, true).masked_fill(visible.logical_not(), 1.0);
  Tensor probabilities = exponentials / sums;
  if (dropout.defined()) probabilities = probabilities * dropout;
  return at::matmul(probabilities.to(value.scalar_type()), value);
}

struct AttentionBackwardNode : torch::autograd::Function<AttentionBackwardNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& query, const Tensor& key,
                               const Tensor& value, const OptionalTensor& attn_mask, const Tensor& output,
                               const Tensor& exact_output, const Tensor& statistics, const Tensor& dropout_seed,
                               double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa,
                               std::array<bool, 4> output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad_output, query, key, value, value_or_undefined(attn_mask), dropout_seed});
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["is_causal"] = is_causal;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["enable_gqa"] = enable_gqa;
    ctx->set_materialize_grads(false);
    auto [grad_query, grad_key, grad_value, grad_mask] =
        attention_backward(grad_output, query, key, value, attn_mask, output, exact_output, statistics, dropout_seed,
                           dropout_p, is_causal, scale, enable_gqa, output_mask);
    return with_placeholders({grad_query, grad_key, grad_value, grad_mask}, query);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool is_causal = ctx->saved_data["is_causal"].toBool(), enable_gqa = ctx->saved_data["enable_gqa"].toBool();
    const auto scale = ctx->saved_data["scale"].toOptional<double>();
    const double dropout_p = ctx->saved_data["dropout_p"].toDouble();
    const Tensor dropout =
        dropout_p > 0 ? dropout_factors(saved[0].detach(), saved[2].sym_size(-2), saved[5], dropout_p) : Tensor();
    auto forward = [&](const variable_list& inputs) -> variable_list {
      return {composed_attention(inputs[0], inputs[1], inputs[2], inputs[3], dropout, is_causal, scale, enable_gqa)};
    };
    const variable_list second = differentiate_twice(forward, {saved[1], saved[2], saved[3], saved[4]}, {saved[0]},
                                                     {grads[0], grads[1], grads[2], grads[3]});
    return {second[4], second[0], second[1], second[2], second[3], Tensor(), Tensor(),
            Tensor(),  Tensor(),  Tensor(),  Tensor(),  Tensor(),  Tensor(), Tensor()};
  }
};

BackwardResult attention_backward_autograd(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                           const Tensor& value, const OptionalTensor& attn_mask, const Tensor& output,
                                           const Tensor& exact_output, const Tensor& statistics,
                                           const Tensor& dropout_seed, double dropout_p, bool is_causal,
                                           std::optional<double> scale, bool enable_gqa,
                                           std::array<bool, 4> output_mask) {
  if (!must_record(grad_output, query, key, value, attn_mask)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return attention_backward(grad_output, query, key, value, attn_mask, output, exact_output, statistics, dropout_seed,
                              dropout_p, is_causal, scale, enable_gqa, output_mask);
  }
  const variable_list grads = without_placeholders(
      AttentionBackwardNode::apply(grad_output, query, key, value, attn_mask, output, exact_output, statistics,
                                   dropout_seed, dropout_p, is_causal, scale, enable_gqa, output_mask),
      output_mask);
  return {grads[0], grads[1], grads[2], grads[3]};
}

// A boolean mask may be changed after the call, as torch allows, which converts it: what is saved is a copy of what it
// holds, without the repetitions of an expanded one.
Tensor mask_to_save(const OptionalTensor& mask) {
  if (!is_defined(mask) || mask->scalar_type() != at::kBool) return value_or_undefined(mask);
  Tensor once = *mask;
  for (int64_t d = 0; d < mask->dim(); ++d) {
    if (mask->sym_stride(d) == 0 && mask->sym_size(d) > 1) once = once.narrow(d, 0, 1);
  }
  return once.clone().expand_symint(mask->sym_sizes());
}

// Only the attention is an output of the node; what is saved reaches the caller through `saved_outputs`, without
// history.
struct AttentionNode : torch::autograd::Function<AttentionNode> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                        const OptionalTensor& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
                        bool enable_gqa, ForwardResult* saved_outputs) {
    at::AutoDispatchBelowADInplaceOrView guard;
    *saved_outputs = attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa);
    const auto& [output, exact_output, statistics, dropout_seed] = *saved_outputs;
    ctx->save_for_backward(
        {query, key, value, mask_to_save(attn_mask), output, exact_output, statistics, dropout_seed});
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["is_causal"] = is_causal;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["enable_gqa"] = enable_gqa;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool has_mask = saved[3].defined();
    auto [grad_query, grad_key, grad_value, grad_mask] =
        attention_backward(grads[0], saved[0], saved[1], saved[2], optional_of(saved[3]), saved[4], saved[5], saved[6],
                           saved[7], ctx->saved_data["dropout_p"].toDouble(), ctx->saved_data["is_causal"].toBool(),
                           ctx->saved_data["scale"].toOptional<double>(), ctx->saved_data["enable_gqa"].toBool(),
                           {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                            has_mask && ctx->needs_input_grad(3)});
    return {grad_query, grad_key, grad_value, grad_mask, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

ForwardResult attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                                 const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                 std::optional<double> scale, bool enable_gqa) {
  if (!must_record(query, key, value, attn_mask)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa);
  }
  ForwardResult outputs;
  std::get<0>(outputs) =
      AttentionNode::apply(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, &outputs);
  return outputs;
}

// ---- autocast: attention is computed in the lower precision --------------------------------------------------------

template <c10::DispatchKey key_, c10::DeviceType device>
ForwardResult attention_autocast(const Tensor& query, const Tensor& key, const Tensor& value,
                                 const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                 std::optional<double> scale, bool enable_gqa) {
  c10::impl::ExcludeDispatchKeyGuard guard(key_);
  const Autocast cast{at::autocast::get_autocast_dtype(device), device};
  return attention(cast(query), cast(key), cast(value), cast(attn_mask), dropout_p, is_causal, scale, enable_gqa);
}

}  // namespace

ForwardResult attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
                        double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa) {
  static const auto op = find_operator<decltype(attention_kernel)>("dlkernels::attention");
  return op.call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa);
}

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("attention", &attention_kernel);
  m.impl("attention_backward", &attention_backward_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("attention", &attention_kernel);
  m.impl("attention_backward", &attention_backward_kernel);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) {
  m.impl("attention", &attention_autograd);
  m.impl("attention_backward", &attention_backward_autograd);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCPU, m) {
  m.impl("attention", &attention_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCUDA, m) {
  m.impl("attention", &attention_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace dlkernels::ops
