// Two-dimensional convolution: what the kernels are given. T is the element type of every array.
#pragma once

#include "types.h"

namespace dlkernels {

// No size is negative; images, channels, maps and kernel sizes are positive.
struct Conv2dGeometry {
  int64_t N;                       // images
  int64_t C, H, W;                 // input channels and size
  int64_t K, output_H, output_W;   // output channels and size
  int64_t kernel_H, kernel_W;      //
  int64_t stride_H, stride_W;      // >= 1
  int64_t padding_top;             // rows of zeros above the image; those below follow from output_H
  int64_t padding_left;            // columns of zeros to the left
  int64_t dilation_H, dilation_W;  // >= 1
  int64_t groups;                  // divides C and K
  bool channels_last;              // input and output are [N][H][W][C] in memory, otherwise [N][C][H][W]
  int64_t input_image_stride;      // elements from one image to the next in input (not grad_input); may be 0
  int64_t output_image_stride;     // the same in output or grad_output
  int64_t weight_strides[4];       // of weight, in elements: [K][C / groups][kernel_H][kernel_W]
  int64_t grad_weight_strides[4];  // of grad_weight; unused in forward
};

struct Conv2dForwardArgs {
  DType dtype;
  Conv2dGeometry geometry;
  const void* input;   // T, every image dense in the layout of geometry
  const void* weight;  // T
  const void* bias;    // T [K], or null
  void* output;        // T, in the layout of geometry; aliases nothing
};

struct Conv2dBackwardArgs {
  DType dtype;
  Conv2dGeometry geometry;
  const void* grad_output;  // T, every image dense in the layout of geometry
  const void* input;        // T, every image dense in the layout of geometry
  const void* weight;       // T
  void* grad_input;         // T, dense in the layout of geometry, or null when not wanted
  void* grad_weight;        // T, or null
  void* grad_bias;          // T [K], or null
};

struct Conv2dKernels {
  void (*forward)(const Conv2dForwardArgs&);
  void (*backward)(const Conv2dBackwardArgs&);
};

#if defined(DLKERNELS_ISA)
namespace DLKERNELS_ISA {
Conv2dKernels conv2d_kernels();
}
#endif

}  // namespace dlkernels
