// The one joint between the operations and the instruction sets: every instruction set exports one of these tables.
#pragma once

#include "cross_entropy.h"
#include "linear_cross_entropy.h"

namespace dlkernels {

struct KernelTable {
  const char* isa;
  CrossEntropyKernels cross_entropy;
  LinearCrossEntropyKernels linear_cross_entropy;
};

}  // namespace dlkernels
