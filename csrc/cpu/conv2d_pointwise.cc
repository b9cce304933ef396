// Convolution with a 1x1 kernel at stride one on matrix units: one product over all pixels of the batch.
//
//   out[pixel][k] = bias[k] + sum over c of in[pixel][c] w[c][k],   dw[k][c] = sum over pixels of dout[pixel][k] in[pixel][c]
//
// Pixel-major images are the operands as they lie. Contiguous ones are turned, and turned back, once: that reads and
// writes them once more, where a product with the pixels along the lanes would add other sums than channels_last does.
#include "conv2d_parts.h"
#include "gemm.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int64_t kFewestChannels = 16;  // in or out: with fewer, most of a tile would be padding
constexpr int64_t kFewestPixels = 64;

template <class Scalar>
bool are_pixels_rows(const Images<Scalar>& images) {
  return images.image_stride == images.C * images.H * images.W || images.N == 1;
}

// Images as rows of channels, one for each pixel of the batch.
template <class Scalar>
Matrix<Scalar> pixel_rows(const Images<const Scalar>& images) {
  return {images.data, images.C, 1};
}

template <class Scalar>
bool is_worthwhile(const Images<const Scalar>& input, int64_t out_channels) {
  return kHasTiles && !std::is_same_v<Scalar, double> && input.C >= kFewestChannels &&
         out_channels >= kFewestChannels && input.N * input.H * input.W >= kFewestPixels;
}

}  // namespace

template <class Scalar>
bool convolve_pointwise(const Convolution<Scalar>& c) {
  const Grid& grid = c.grid;
  const bool is_pointwise = grid.tap_count == 1 && grid.phase_count == 1 && c.groups == 1 && grid.first_dy == 0 &&
                            grid.first_dx == 0 && grid.input_step_y == 1 && grid.input_step_x == 1 &&
                            grid.output_step_y == 1 && grid.output_step_x == 1 && c.output.H == c.input.H &&
                            c.output.W == c.input.W;
  if (!is_pointwise || !is_worthwhile(c.input, c.output.C) || !are_pixels_rows(c.input)) return false;
  if constexpr (kHasTiles && !std::is_same_v<Scalar, double>) {
    const int64_t pixels = c.input.N * c.input.H * c.input.W, K = c.output.C;
    const ImagesInLayout<Scalar> input(c.input, true, true);
    const bool turns = !c.output.channels_last;
    const Scratch<Scalar> turned(turns ? pixels * K : 0);
    const Images<Scalar> output = {turns ? turned.data() : c.output.data, K * c.output.H * c.output.W, c.output.N, K,
                                   c.output.H, c.output.W, true};
    const Matrix<Scalar> weight = {c.weights.data + grid.taps[0].weight_offset, c.weights.in_stride,
                                   c.weights.out_stride};
    gemm<float>(pixels, K, c.input.C, pixel_rows(input.images), weight,
                [&](int64_t i, int64_t j, int64_t count, const float* values) {
                  Scalar* out = output.data + i * K + j;
                  for (int64_t k = 0; k < count; k += VecF::size) {
                    const int64_t lanes = min_of(VecF::size, count - k);
                    VecF sums = load_lanes(values + k, lanes);
                    if (c.bias != nullptr) sums += load_lanes(c.bias + j + k, lanes);
                    store_lanes(out + k, sums, lanes);
                  }
                });
    if (turns) turn_images<Scalar>({output.data, output.image_stride, output.N, K, output.H, output.W, true}, c.output);
    return true;
  }
  return false;
}

template <class Scalar>
bool pointwise_weight_gradient(const Conv2dBackwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  const Images<const Scalar> input = input_images(g, static_cast<const Scalar*>(args.input));
  const Images<const Scalar> grad_output = output_images(g, static_cast<const Scalar*>(args.grad_output));
  const bool is_pointwise = g.kernel_H == 1 && g.kernel_W == 1 && g.groups == 1 && g.stride_H == 1 && g.stride_W == 1 &&
                            g.padding_top == 0 && g.padding_left == 0 && g.output_H == g.H && g.output_W == g.W;
  if (!is_pointwise || !is_worthwhile(input, g.K) || !are_pixels_rows(input) || !are_pixels_rows(grad_output)) {
    return false;
  }
  if constexpr (kHasTiles && !std::is_same_v<Scalar, double>) {
    const ImagesInLayout<Scalar> pixels(input, true, true), gradients(grad_output, true, true);
    Scalar* grad_weight = static_cast<Scalar*>(args.grad_weight);
    const int64_t* strides = g.grad_weight_strides;
    gemm<float>(g.K, g.C, g.N * g.H * g.W, pixel_rows(gradients.images).transposed(), pixel_rows(pixels.images),
                [&](int64_t k, int64_t c, int64_t count, const float* values) {
                  Scalar* out = grad_weight + k * strides[0] + c * strides[1];
                  if (strides[1] == 1) return narrow_row(values, count, out);
                  for (int64_t i = 0; i < count; ++i) store_one(out + i * strides[1], values[i]);
                });
    return true;
  }
  return false;
}

template bool convolve_pointwise(const Convolution<float>&);
template bool convolve_pointwise(const Convolution<double>&);
template bool convolve_pointwise(const Convolution<bfloat16>&);
template bool convolve_pointwise(const Convolution<float16>&);
template bool pointwise_weight_gradient<float>(const Conv2dBackwardArgs&);
template bool pointwise_weight_gradient<double>(const Conv2dBackwardArgs&);
template bool pointwise_weight_gradient<bfloat16>(const Conv2dBackwardArgs&);
template bool pointwise_weight_gradient<float16>(const Conv2dBackwardArgs&);

}  // namespace dlkernels::DLKERNELS_ISA
