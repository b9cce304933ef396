// Convolution with a 1x1 kernel at stride one on matrix units: one product over all pixels of the batch.
//
//   out[pixel][k] = bias[k] + sum over c of in[pixel][c] w[c][k]
//
// Pixel-major images are the operands as they lie. Contiguous ones are turned, and turned back, once: that reads and
// writes them once more, where a product with the pixels along the lanes would add other sums than channels_last does.
#include "conv2d_parts.h"
#include "gemm.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

template <class Scalar>
bool is_pointwise(const Convolution<Scalar>& c) {
  const Grid& grid = c.grid;
  return grid.tap_count == 1 && grid.phase_count == 1 && c.groups == 1 && grid.first_dy == 0 && grid.first_dx == 0 &&
         grid.input_step_y == 1 && grid.input_step_x == 1 && grid.output_step_y == 1 && grid.output_step_x == 1 &&
         c.output.H == c.input.H && c.output.W == c.input.W;
}

}  // namespace

template <class Scalar>
bool convolve_pointwise(const Convolution<Scalar>& c) {
  if (!is_pointwise(c) || c.input.C < kFewestTileChannels || c.output.C < kFewestTileChannels ||
      c.input.N * c.input.H * c.input.W < kFewestTilePixels) {
    return false;
  }
  if constexpr (kHasTiles && !std::is_same_v<Scalar, double>) {
    const auto input = ImagesInLayout<Scalar>::as_rows(c.input);
    const Matrix<Scalar> weight = {c.weights.data + c.grid.taps[0].weight_offset, c.weights.in_stride,
                                   c.weights.out_stride};
    multiply_all_pixels(c, Matrix<Scalar>{input.images.data, c.input.C, 1}, weight, c.input.C);
    return true;
  }
  return false;
}

template bool convolve_pointwise(const Convolution<float>&);
template bool convolve_pointwise(const Convolution<double>&);
template bool convolve_pointwise(const Convolution<bfloat16>&);
template bool convolve_pointwise(const Convolution<float16>&);

}  // namespace dlkernels::DLKERNELS_ISA
