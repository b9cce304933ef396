// The gradient of a convolution's weight on matrix units: for each tap one product whose depth is the pixels.
//
//   dw[k][c][tap] = sum over output pixels of dout[pixel][k] in[pixel at the tap][c]
//
// Both operands are pixel-major; contiguous images are turned once. The pixels that a tap reads, padding among them,
// are staged as rows of their own; with a single tap at stride one they lie there already.
#include "conv2d_parts.h"
#include "gemm.h"

namespace dlkernels::DLKERNELS_ISA {

template <class Scalar>
bool weight_gradient_on_tiles(const Conv2dBackwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  const int64_t pixels = g.N * g.output_H * g.output_W;
  if (g.groups > 1 || g.C < kFewestTileChannels || g.K < kFewestTileChannels || pixels < kFewestTilePixels) {
    return false;
  }
  if constexpr (kHasTiles && !std::is_same_v<Scalar, double>) {
    Scratch<Tap> taps(g.kernel_H * g.kernel_W);
    Phase phase;
    const Grid grid = forward_grid(g, g.grad_weight_strides, taps.data(), &phase);
    const auto* grad_output = static_cast<const Scalar*>(args.grad_output);
    const Images<const Scalar> outputs = output_images(g, grad_output);
    if (spoils_padding(g, grid, grad_output)) return false;
    const Images<const Scalar> inputs = input_images(g, static_cast<const Scalar*>(args.input));
    const auto input = ImagesInLayout<Scalar>::as_rows(inputs), gradient = ImagesInLayout<Scalar>::as_rows(outputs);
    const bool in_place =
        grid.tap_count == 1 && g.stride_H == 1 && g.stride_W == 1 && g.output_H == g.H && g.output_W == g.W;
    using Staged = std::conditional_t<std::is_same_v<Scalar, bfloat16>, bfloat16, float>;
    const Scratch<Staged> staged(in_place ? 0 : pixels * g.C);
    const Matrix<Scalar> left = {gradient.images.data, 1, g.K};
    for (const Tap* tap = grid.taps; tap != grid.taps + grid.tap_count; ++tap) {
      auto store_rows = [&](int64_t k, int64_t c, int64_t count, const float* values) {
        Scalar* out = static_cast<Scalar*>(args.grad_weight) + tap->weight_offset + k * g.grad_weight_strides[0];
        const int64_t stride = g.grad_weight_strides[1];
        if (stride == 1) return narrow_row(values, count, out + c);
        for (int64_t i = 0; i < count; ++i) store_one(out + (c + i) * stride, values[i]);
      };
      if (in_place) {
        gemm<float>(g.K, g.C, pixels, left, Matrix<Scalar>{input.images.data, g.C, 1}, store_rows);
        continue;
      }
      const Window window = {tap->dy, tap->dx, g.output_H, g.output_W, g.stride_H, g.stride_W};
      parallel_for(g.N, 1, [&](int64_t n) {
        stage(input.images, n, 0, g.C, window, staged.data() + n * g.output_H * g.output_W * g.C);
      });
      gemm<float>(g.K, g.C, pixels, left, Matrix<Staged>{staged.data(), g.C, 1}, store_rows);
    }
    return true;
  }
  return false;
}

template bool weight_gradient_on_tiles<float>(const Conv2dBackwardArgs&);
template bool weight_gradient_on_tiles<double>(const Conv2dBackwardArgs&);
template bool weight_gradient_on_tiles<bfloat16>(const Conv2dBackwardArgs&);
template bool weight_gradient_on_tiles<float16>(const Conv2dBackwardArgs&);

}  // namespace dlkernels::DLKERNELS_ISA
