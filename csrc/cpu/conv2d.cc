// Two-dimensional convolution.
//
//   out[n, k, y, x] = bias[k] + sum over (c, kh, kw) of in[n, c, y s - p + kh d, x s - p + kw d] w[k, c, kh, kw]
//
// Forward and the gradient of the input are one algorithm, a sum over taps. A tap is a shift (dy, dx) and a C x K
// matrix:
//
//   out[y, x, :] = sum over taps t of in[y s + dy(t), x s + dx(t), :] W_t
//
// Forward has a tap per kernel position. The gradient of the input swaps the roles of C and K; where the stride is
// above one, each of the stride_H x stride_W residues of the input's coordinates is a convolution of stride one with
// the taps that reach it, so nothing is multiplied by zeros that the stride put there.
//
// Dense convolutions are products over (tap, channel). Their columns, which the lanes lie along, are output channels
// (conv2d_dense.cc; conv2d_tiles.cc and conv2d_pointwise.cc on matrix units) or pixels (conv2d_planar.cc), whichever
// fill the lanes and lie there in memory. 3x3 kernels at stride one take a third of the multiplications, forward and
// for both gradients (conv2d_winograd.cc). With one channel per group there is no product: lanes are channels, and each
// tap is a multiply-add (conv2d_depthwise.cc). The gradient of the weight is a product whose depth is the pixels
// (conv2d_weight_gradient.cc; conv2d_weight_gradient_tiles.cc on matrix units).
//
// 2 N K output_H output_W C/groups kernel_H kernel_W operations each way. Both layouts share every sum.
#include "conv2d_parts.h"
#include "split.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// Whether every group has one channel in and one out, and channels make good lanes.
bool is_depthwise(int64_t C, int64_t K, int64_t groups) {
  return C == groups && K == groups && groups > 1;
}

// A third of the multiplications is less than six products on matrix units in place of one, but not than one or three.
template <class Scalar>
bool prefers_tiles() {
  return planes_of<Scalar>() < 3;
}

template <class Scalar>
void convolve(const Convolution<Scalar>& convolution) {
  if (is_depthwise(convolution.input.C, convolution.output.C, convolution.groups)) {
    convolve_depthwise(convolution);
    return;
  }
  if (convolve_pointwise(convolution) || convolve_gathered(convolution)) return;
  const bool tiles_first = prefers_tiles<Scalar>();
  if (tiles_first && convolve_on_tiles(convolution)) return;
  if (convolve_winograd(convolution) || (!tiles_first && convolve_on_tiles(convolution))) return;
  if (convolve_in_pairs(convolution) || (is_planar_better(convolution) && convolve_planar(convolution))) return;
  convolve_dense(convolution);
}

// The weight as matrices of taps from input to output channels.
template <class Scalar>
Weights<Scalar> weights_of(const Conv2dGeometry& g, const void* weight, int64_t in_stride, int64_t out_stride) {
  const int64_t* strides = g.weight_strides;
  const int64_t taps = g.kernel_H * g.kernel_W;
  const bool innermost = strides[1] == taps && strides[2] == g.kernel_W && strides[3] == 1;
  return {static_cast<const Scalar*>(weight), g.K / g.groups * strides[0], in_stride, out_stride, innermost ? taps : 0};
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class Scalar>
void forward_of(const Conv2dForwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  Scratch<Tap> taps(g.kernel_H, g.kernel_W);
  Phase phase;
  convolve<Scalar>({input_images(g, static_cast<const Scalar*>(args.input)),
                    weights_of<Scalar>(g, args.weight, g.weight_strides[1], g.weight_strides[0]),
                    static_cast<const Scalar*>(args.bias), output_images(g, static_cast<Scalar*>(args.output)),
                    g.groups, forward_grid(g, g.weight_strides, taps.data(), &phase)});
}

// ---- gradients ------------------------------------------------------------------------------------------------------

// A phase for each residue of the input's coordinates. To pixels (q stride + residue), kernel position kh comes from
// output row q + (residue + padding - kh dilation) / stride where that is whole.
Grid input_gradient_grid(const Conv2dGeometry& g, const int64_t* weight_strides, Tap* taps, Phase* phases) {
  int64_t count = 0, phase_count = 0;
  for (int64_t residue_y = 0; residue_y < min_of(g.stride_H, g.H); ++residue_y) {
    for (int64_t residue_x = 0; residue_x < min_of(g.stride_W, g.W); ++residue_x) {
      const int64_t first_tap = count;
      for (int64_t kh = g.kernel_H - 1; kh >= 0; --kh) {
        const int64_t y = residue_y + g.padding_top - kh * g.dilation_H;
        if (y % g.stride_H != 0) continue;
        for (int64_t kw = g.kernel_W - 1; kw >= 0; --kw) {
          const int64_t x = residue_x + g.padding_left - kw * g.dilation_W;
          if (x % g.stride_W != 0) continue;
          taps[count++] = {y / g.stride_H, x / g.stride_W, kh * weight_strides[2] + kw * weight_strides[3]};
        }
      }
      phases[phase_count++] = {ceil_div(g.H - residue_y, g.stride_H),
                               ceil_div(g.W - residue_x, g.stride_W),
                               residue_y,
                               residue_x,
                               first_tap,
                               count - first_tap};
    }
  }
  Grid grid = {ceil_div(g.H, g.stride_H),
               ceil_div(g.W, g.stride_W),
               g.stride_H,
               g.stride_W,
               1,
               1,
               phases,
               phase_count,
               nullptr,
               0};
  grid.set_taps(taps, count);
  return grid;
}

template <class Scalar>
void input_gradient(const Conv2dBackwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  Scratch<Tap> taps(g.kernel_H, g.kernel_W);
  Scratch<Phase> phases(min_of(g.stride_H, g.H), min_of(g.stride_W, g.W));
  convolve<Scalar>({output_images(g, static_cast<const Scalar*>(args.grad_output)),
                    weights_of<Scalar>(g, args.weight, g.weight_strides[0], g.weight_strides[1]),
                    nullptr,
                    {static_cast<Scalar*>(args.grad_input), g.C * g.H * g.W, g.N, g.C, g.H, g.W, g.channels_last},
                    g.groups,
                    input_gradient_grid(g, g.weight_strides, taps.data(), phases.data())});
}

// Both operands of float32 are split for every tap, which many channels make up for.
template <class Scalar>
bool tiles_pay(const Conv2dGeometry& g) {
  constexpr int64_t kManyChannels = 128;  // the harmonic mean of both, halved
  const bool is_3x3 = g.kernel_H == 3 && g.kernel_W == 3 && g.stride_H == 1 && g.stride_W == 1;
  if (g.kernel_H * g.kernel_W == 1 || sizeof(Scalar) == 2) return true;
  return prefers_tiles<Scalar>() && (!is_3x3 || g.C * g.K >= kManyChannels * (g.C + g.K));
}

template <class Scalar>
void weight_gradient(const Conv2dBackwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  if (is_depthwise(g.C, g.K, g.groups)) {
    depthwise_weight_gradient<Scalar>(args);
    return;
  }
  if (tiles_pay<Scalar>(g) && weight_gradient_on_tiles<Scalar>(args)) return;
  if (!winograd_weight_gradient<Scalar>(args)) dense_weight_gradient<Scalar>(args);
}

// ---- table ----------------------------------------------------------------------------------------------------------

void forward(const Conv2dForwardArgs& args) {
  dispatch(args.dtype, [&](auto* type) { forward_of<std::remove_pointer_t<decltype(type)>>(args); });
}

void backward(const Conv2dBackwardArgs& args) {
  dispatch(args.dtype, [&](auto* type) {
    using Scalar = std::remove_pointer_t<decltype(type)>;
    if (args.grad_input != nullptr) input_gradient<Scalar>(args);
    if (args.grad_weight != nullptr) weight_gradient<Scalar>(args);
    if (args.grad_bias != nullptr) bias_gradient<Scalar>(args);
  });
}

}  // namespace

Conv2dKernels conv2d_kernels() {
  return {forward, backward};
}

}  // namespace dlkernels::DLKERNELS_ISA
