// Arithmetic of sizes that stops where 64 bits do not hold the result. A caller may name any stride, padding or
// expanded shape; what follows from them is computed here before memory is asked for or touched.
#pragma once

#include <cstdint>

namespace dlkernels {

// Throws a runtime_error that says which number is too large.
[[noreturn]] void refuse_size(const char* what);

#if defined(DLKERNELS_ISA)
namespace DLKERNELS_ISA {
#endif

// The product of sizes, none of them negative; `what` names it in the error.
template <class... Sizes>
inline int64_t multiply_sizes(const char* what, Sizes... sizes) {
  if (((sizes == 0) || ...)) return 0;
  int64_t product = 1;
  if ((__builtin_mul_overflow(product, static_cast<int64_t>(sizes), &product) || ...)) refuse_size(what);
  return product;
}

template <class... Sizes>
inline int64_t add_sizes(const char* what, Sizes... sizes) {
  int64_t sum = 0;
  if ((__builtin_add_overflow(sum, static_cast<int64_t>(sizes), &sum) || ...)) refuse_size(what);
  return sum;
}

// ceil(size / step) for a size that is not negative; no intermediate result is larger than the size.
inline int64_t divide_up(int64_t size, int64_t step) {
  return size / step + (size % step != 0 ? 1 : 0);
}

#if defined(DLKERNELS_ISA)
}  // namespace DLKERNELS_ISA
#endif

}  // namespace dlkernels
