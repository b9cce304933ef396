// The vector functions of vmath.h by name, so that tests can hold them to their stated errors on every instruction set.
#pragma once

#include "types.h"

namespace dlkernels {

enum class ElementaryFunction : int32_t { exp, exp_of_negative, coarse_exp2_of_negative, log, tanh, sigmoid };

struct ElementaryKernels {
  // output[i] = function(input[i]) for i < count; may be the same array.
  void (*apply)(ElementaryFunction function, const float* input, float* output, int64_t count);
};

#if defined(DLKERNELS_ISA)
namespace DLKERNELS_ISA {
ElementaryKernels elementary_kernels();
}
#endif

}  // namespace dlkernels
