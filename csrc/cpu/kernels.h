// The one joint between the operations and the instruction sets: every instruction set exports one of these tables.
#pragma once

#include "attention.h"
#include "cross_entropy.h"

namespace dlkernels {

struct KernelTable {
  const char* isa;
  CrossEntropyKernels cross_entropy;
  AttentionKernels attention;
};

}  // namespace dlkernels
