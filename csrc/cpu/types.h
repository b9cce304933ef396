// Element types that the kernels know, and the type each of them computes in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace dlkernels {

enum class DType : int32_t { float32, float64, bfloat16, float16 };

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// The type that sums, exponentials and products of T are carried in.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

// Calls body with a null pointer of the element type; `body(auto* type)` reads it off the parameter.
template <class Body>
inline void dispatch(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32:
      return body(static_cast<float*>(nullptr));
    case DType::float64:
      return body(static_cast<double*>(nullptr));
    case DType::bfloat16:
      return body(static_cast<bfloat16*>(nullptr));
    case DType::float16:
      return body(static_cast<float16*>(nullptr));
  }
}

}  // namespace dlkernels
