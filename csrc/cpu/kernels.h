// The one joint between the operations and the instruction sets: every instruction set exports one of these tables.
#pragma once

#include "arithmetic_rate.h"
#include "attention.h"
#include "batch_norm.h"
#include "conv2d.h"
#include "cross_entropy.h"
#include "elementary.h"
#include "linear.h"
#include "linear_cross_entropy.h"
#include "lstm.h"

namespace dlkernels {

struct KernelTable {
  const char* isa;
  bool on_device;  // kernels want a Place (cuda/place.h): a stream, and memory for the time of a call
  ArithmeticRateKernels arithmetic_rate;
  AttentionKernels attention;
  BatchNormKernels batch_norm;
  Conv2dKernels conv2d;
  CrossEntropyKernels cross_entropy;
  ElementaryKernels elementary;
  LinearKernels linear;
  LinearCrossEntropyKernels linear_cross_entropy;
  LstmKernels lstm;
};

}  // namespace dlkernels
