// Multiply-adds without memory: what a benchmark's share of the arithmetic ceiling is a share of.
#pragma once

#include "types.h"

namespace dlkernels {

struct ArithmeticRateKernels {
  // Runs `repetitions` rounds of the fastest multiply-adds for products of this type on every thread of the pool:
  // vectors, pairs of bfloat16 or tiles. Returns the operations done, a multiplication and a sum being two.
  double (*multiply_add)(DType dtype, int64_t repetitions);
};

#if defined(DLKERNELS_ISA)
namespace DLKERNELS_ISA {
ArithmeticRateKernels arithmetic_rate_kernels();
}
#endif

}  // namespace dlkernels
