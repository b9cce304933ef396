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
    const int64_t pixels = c.input.N * c.input.H * c.input.W, K = c.output.C;
    const auto input = ImagesInLayout<Scalar>::as_rows(c.input);
    const bool turns = !c.output.channels_last || !are_dense(c.output);
    const Scratch<Scalar> turned(turns ? pixels * K : 0);
    const Images<Scalar> output = {turns ? turned.data() : c.output.data,
                                   K * c.output.H * c.output.W,
                                   c.output.N,
                                   K,
                                   c.output.H,
                                   c.output.W,
                                   true};
    const Matrix<Scalar> weight = {c.weights.data + c.grid.taps[0].weight_offset, c.weights.in_stride,
                                   c.weights.out_stride};
    gemm<float>(pixels, K, c.input.C, Matrix<Scalar>{input.images.data, c.input.C, 1}, weight,
                [&](int64_t i, int64_t j, int64_t count, const float* values) {
                  Scalar* out = output.data + i * K + j;
                  for (int64_t k = 0; k < count; k += VecF::size) {
                    const int64_t lanes = min_of(VecF::size, count - k);
                    VecF sums = load_lanes(values + k, lanes);
                    if (c.bias != nullptr) sums += load_lanes(c.bias + j + k, lanes);
                    store_lanes(out + k, sums, lanes);
                  }
                });
    if (turns) copy_images<Scalar>({output.data, output.image_stride, output.N, K, output.H, output.W, true}, c.output);
    return true;
  }
  return false;
}

template bool convolve_pointwise(const Convolution<float>&);
template bool convolve_pointwise(const Convolution<double>&);
template bool convolve_pointwise(const Convolution<bfloat16>&);
template bool convolve_pointwise(const Convolution<float16>&);

}  // namespace dlkernels::DLKERNELS_ISA
