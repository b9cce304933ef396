// Chooses the kernel of a product: Hopper's own where it may be used and the operands suit it, else the portable one in
// large tiles where they fill the device, else in small ones.
#pragma once

#include "cuda/hopper_product.cuh"

namespace dlkernels::DLKERNELS_ISA {

template <class Left, class Right, class Sink>
void multiply(int64_t rows, int64_t columns, int64_t depth, int64_t groups, const Left& left, const Right& right,
              const Sink& sink) {
  using Scalar = typename Left::Scalar;
  if constexpr (can_be_boxes<Left, Right>) {
    if (uses_hopper() && fits_boxes(rows, columns, depth, groups)) {
      return multiply_as_boxes(rows, columns, depth, left, right, sink);
    }
  }
  if constexpr (sizeof(Scalar) < 8) {
    const int64_t tiles = groups * ceil_div(rows, LargeProduct::rows) * ceil_div(columns, LargeProduct::columns);
    if (tiles >= processors()) {
      return multiply_as<LargeProduct>(plan_product<Scalar, LargeProduct>(rows, columns, depth, groups), left, right,
                                       sink);
    }
  }
  multiply_as<SmallProduct>(plan_product<Scalar, SmallProduct>(rows, columns, depth, groups), left, right, sink);
}

}  // namespace dlkernels::DLKERNELS_ISA
