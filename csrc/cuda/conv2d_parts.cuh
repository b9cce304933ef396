// The parts of a convolution that have files of their own; conv2d.cu chooses between them.
#pragma once

#include "cpu/conv2d.h"

namespace dlkernels::DLKERNELS_ISA {

// One channel per group: conv2d_depthwise.cu.
inline bool is_depthwise(const Conv2dGeometry& geometry) {
  return geometry.groups == geometry.C && geometry.C > 1;
}

void depthwise_forward(const Conv2dForwardArgs& args);
void depthwise_input_gradient(const Conv2dBackwardArgs& args);
void depthwise_weight_gradient(const Conv2dBackwardArgs& args);

// conv2d_weight_gradient.cu
void dense_weight_gradient(const Conv2dBackwardArgs& args);
void bias_gradient(const Conv2dBackwardArgs& args);

}  // namespace dlkernels::DLKERNELS_ISA
