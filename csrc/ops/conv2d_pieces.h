// A convolution whose windows would be mostly padding, as convolutions that have something to compute.
//
// Kernels stage windows of the image with their padding, about as large as stride times outputs and dilation times
// taps. Nothing but memory bounds these where they step over an image that is small against them, so along such an axis
// outputs are taken in pieces: neighbours that the same taps reach, all of whose pixels lie in the image. Outputs that
// are in no piece read padding alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/sizes.h"

namespace dlkernels::ops {

// Rows or columns of a convolution; output i reads pixel i stride + tap dilation - padding by each of its taps.
struct ConvolutionAxis {
  int64_t size, taps, stride, padding, padding_after, dilation;

  // Pixels from the first to the last one that an output reads.
  int64_t reach() const {
    return add_sizes("conv2d: the extent of the kernel", multiply_sizes("conv2d: dilation", dilation, taps - 1), 1);
  }
  int64_t padded_size() const { return add_sizes("conv2d: the padded size", size, padding, padding_after); }
  int64_t outputs() const { return (padded_size() - reach()) / stride + 1; }
};

// What is left of an axis: its outputs, its taps and the pixels they read, with padding only where it is not cut.
struct AxisPiece {
  int64_t first_output, outputs, first_tap, taps, first_pixel, pixels, padding, padding_after;
};

// Whether the windows of an axis would be much larger than the image, the outputs and the kernel.
inline bool is_mostly_padding(const ConvolutionAxis& axis) {
  const int64_t outputs = axis.outputs(), window = (outputs - 1) * axis.stride + axis.reach();
  const int64_t room = add_sizes("conv2d: the sizes of an axis", axis.size, outputs, axis.taps);
  return window / 4 - 16 > room || axis.padding >= window;
}

// The pieces of an axis in the order of its outputs: the whole of it where its windows are of ordinary size.
inline std::vector<AxisPiece> pieces_of(const ConvolutionAxis& axis) {
  const int64_t outputs = axis.outputs();
  if (!is_mostly_padding(axis)) {
    return {{0, outputs, 0, axis.taps, 0, axis.size, axis.padding, axis.padding_after}};
  }
  std::vector<AxisPiece> pieces;
  const int64_t last_tap = (axis.taps - 1) * axis.dilation;
  // The outputs before and after these have all their taps on one side of the image.
  const int64_t begin = axis.padding > last_tap ? divide_up(axis.padding - last_tap, axis.stride) : 0;
  const int64_t end = std::min(outputs, (axis.size - 1 + axis.padding) / axis.stride + 1);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t before = axis.padding - i * axis.stride;  // pixels of the image from the first tap's on
    const int64_t first = before > 0 ? divide_up(before, axis.dilation) : 0;
    const int64_t taps = std::min(axis.taps - 1, (axis.size - 1 + before) / axis.dilation) - first + 1;
    if (taps <= 0) continue;
    if (!pieces.empty()) {
      AxisPiece& last = pieces.back();
      if (last.first_output + last.outputs == i && last.first_tap == first && last.taps == taps) {
        ++last.outputs, last.pixels += axis.stride;
        continue;
      }
    }
    pieces.push_back({i, 1, first, taps, first * axis.dilation - before, (taps - 1) * axis.dilation + 1, 0, 0});
  }
  return pieces;
}

}  // namespace dlkernels::ops
