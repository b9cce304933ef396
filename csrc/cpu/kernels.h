// The one joint between the operations and the instruction sets: every instruction set exports one of these tables.
#pragma once

#include "cross_entropy.h"

namespace dlkernels {

struct KernelTable {
  const char* isa;
  CrossEntropyKernels cross_entropy;
};

}  // namespace dlkernels
