// What every operation needs of torch: typed dispatcher handles, element types, gradient and autocast questions.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/sizes.h"

namespace dlkernels::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An argument of a function that Python calls: an int, where pybind11 takes whatever it can cut to one.
struct Int {
  int64_t number = 0;
  operator int64_t() const { return number; }
};
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The typed handle of an operator: calling it costs one dispatch and boxes nothing.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline DType kernel_dtype(const Tensor& tensor, const char* operation, const char* argument) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, operation, ": ", argument, " is ", tensor.scalar_type(),
                                  ", expected float32, float64, bfloat16 or float16");
  }
}

// The type sums are carried in: double for double, float for the rest.
inline at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool is_defined(const Tensor& tensor) {
  return tensor.defined();
}
inline bool is_defined(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined();
}

// An optional tensor as a plain one, undefined when absent.
inline Tensor value_or_undefined(const OptionalTensor& tensor) {
  return is_defined(tensor) ? *tensor : Tensor();
}
inline OptionalTensor optional_of(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// The product of some sizes of a tensor, which may overflow where another one is zero.
inline int64_t count_of(const char* what, at::IntArrayRef sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) count = multiply_sizes(what, count, size);
  return count;
}

inline const void* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}
inline void* mutable_data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

inline bool wants_gradient(const Tensor& tensor) {
  return tensor.defined() && (tensor.requires_grad() || tensor._fw_grad(/*level=*/0).defined());
}
inline bool wants_gradient(const OptionalTensor& tensor) {
  return tensor.has_value() && wants_gradient(*tensor);
}

// Whether a call must be recorded. When not, the Autograd kernel goes straight on to the device.
template <class... Tensors>
bool must_record(const Tensors&... tensors) {
  return c10::GradMode::is_enabled() && (wants_gradient(tensors) || ...);
}

// Which of a node's tensor arguments want a gradient, asked in its backward. `present` says which of them, in order,
// were given: an absent optional has no edge, so the edges of those after it move up.
template <size_t count>
std::array<bool, count> needed_gradients(AutogradContext* ctx, const std::array<bool, count>& present) {
  std::array<bool, count> needed{};
  size_t edge = 0;
  for (size_t i = 0; i < count; ++i) {
    if (present[i]) needed[i] = ctx->needs_input_grad(edge++);
  }
  return needed;
}

// One element type for all; the message names the argument that differs.
inline void check_same_dtype(const char* operation, const Tensor& expected, const char* expected_name,
                             const Tensor& tensor, const char* name) {
  TORCH_CHECK(!tensor.defined() || tensor.scalar_type() == expected.scalar_type(), operation, ": expected scalar type ",
              toString(expected.scalar_type()), " but found ", tensor.defined() ? toString(tensor.scalar_type()) : "",
              ": ", name, " must have the type of ", expected_name);
}
inline void check_same_device(const char* operation, const Tensor& expected, const char* expected_name,
                              const Tensor& tensor, const char* name) {
  TORCH_CHECK(!tensor.defined() || tensor.device() == expected.device(), operation,
              ": Expected all tensors to be on the same device, but ", expected_name, " is on ", expected.device(),
              " and ", name, " is on ", tensor.device());
}

// Casts every floating tensor as autocast does (cached for parameters); undefined tensors pass.
struct Autocast {
  at::ScalarType type;
  c10::DeviceType device;
  Tensor operator()(const Tensor& tensor) const {
    return tensor.defined() ? at::autocast::cached_cast(type, tensor, device) : tensor;
  }
  OptionalTensor operator()(const OptionalTensor& tensor) const {
    return is_defined(tensor) ? OptionalTensor((*this)(*tensor)) : tensor;
  }
};

}  // namespace dlkernels::ops
