// Applies one vector function to an array.
#include "elementary.h"

#include "parallel.h"
#include "vmath.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

template <class Function>
void map(const float* input, float* output, int64_t count, Function function) {
  for (int64_t i = 0; i < count; i += VecF::size) {
    const int64_t lanes = min_of(VecF::size, count - i);
    store_lanes(output + i, function(load_lanes(input + i, lanes)), lanes);
  }
}

void apply(ElementaryFunction function, const float* input, float* output, int64_t count) {
  switch (function) {
    case ElementaryFunction::exp:
      return map(input, output, count, [](VecF x) { return exp(x); });
    case ElementaryFunction::exp_of_negative:
      return map(input, output, count, [](VecF x) { return exp_of_negative(x); });
    case ElementaryFunction::coarse_exp2_of_negative:
      return map(input, output, count, [](VecF x) { return coarse_exp2_of_negative(x); });
    case ElementaryFunction::log:
      return map(input, output, count, [](VecF x) { return log(x); });
    case ElementaryFunction::tanh:
      return map(input, output, count, [](VecF x) { return tanh(x); });
    case ElementaryFunction::sigmoid:
      return map(input, output, count, [](VecF x) { return sigmoid(x); });
  }
}

}  // namespace

ElementaryKernels elementary_kernels() {
  return {apply};
}

}  // namespace dlkernels::DLKERNELS_ISA
