// The one joint between the operations and the instruction sets: every instruction set exports one of these tables.
#pragma once

#include "batch_norm.h"
#include "cross_entropy.h"
#include "lstm.h"

namespace dlkernels {

struct KernelTable {
  const char* isa;
  BatchNormKernels batch_norm;
  CrossEntropyKernels cross_entropy;
  LstmKernels lstm;
};

}  // namespace dlkernels
