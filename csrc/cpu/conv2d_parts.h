// The parts of the two-dimensional convolution, a file for each; conv2d.cc has the idea and chooses between them.
#pragma once

#include "conv2d.h"
#include "gemm.h"
#include "taps.h"

namespace dlkernels::DLKERNELS_ISA {

// ---- the parts ------------------------------------------------------------------------------------------------------

// conv2d_dense.cc: products over (tap, channel) whose columns are output channels.
template <class Scalar>
void convolve_dense(const Convolution<Scalar>& convolution);

// The same in pairs of bfloat16. False for other types, and where there are no pairs or too few channels for them.
template <class Scalar>
bool convolve_in_pairs(const Convolution<Scalar>& convolution);

// conv2d_planar.cc: the same sums in the same order, in products whose columns are pixels.
template <class Scalar>
bool is_planar_better(const Convolution<Scalar>& convolution);
// Returns false, with nothing written, where a weight is not finite.
template <class Scalar>
bool convolve_planar(const Convolution<Scalar>& convolution);

// conv2d_tiles.cc: the same on matrix units. False where there are none, where the shape wastes them, or where a number
// cannot be split; the output is then unfinished.
template <class Scalar>
bool convolve_on_tiles(const Convolution<Scalar>& convolution);

// conv2d_pointwise.cc: 1x1 kernels at stride one on matrix units. False for any other convolution, or where there are
// none.
template <class Scalar>
bool convolve_pointwise(const Convolution<Scalar>& convolution);

// conv2d_gathered.cc: few input channels on matrix units. False where there are none, where the shape is another's, or
// where a number cannot be split; the output is then unfinished.
template <class Scalar>
bool convolve_gathered(const Convolution<Scalar>& convolution);

// conv2d_weight_gradient_tiles.cc: on matrix units. False where there are none or the shape wastes them.
template <class Scalar>
bool weight_gradient_on_tiles(const Conv2dBackwardArgs& args);

// conv2d_winograd.cc: float32 3x3 kernels at stride one with fewer multiplications. False for any other convolution,
// where the shape does not gain, or where a result is not finite; the result is then unfinished.
template <class Scalar>
bool convolve_winograd(const Convolution<Scalar>& convolution);
template <class Scalar>
bool winograd_weight_gradient(const Conv2dBackwardArgs& args);

// conv2d_depthwise.cc: one channel per group.
template <class Scalar>
void convolve_depthwise(const Convolution<Scalar>& convolution);
template <class Scalar>
void depthwise_weight_gradient(const Conv2dBackwardArgs& args);

// conv2d_weight_gradient.cc
template <class Scalar>
void dense_weight_gradient(const Conv2dBackwardArgs& args);

// conv2d_bias_gradient.cc
template <class Scalar>
void bias_gradient(const Conv2dBackwardArgs& args);

// ---- what they share ------------------------------------------------------------------------------------------------

inline constexpr int64_t kPixelBlock = 192;          // output pixels of a task
inline constexpr int64_t kOutputChannelBlock = 256;  // output channels of a task
inline constexpr int64_t kChannelBlock = 128;
inline constexpr int64_t kWindowBytes = 2 << 20;    // fewer channels at a time when a window would be larger
inline constexpr int64_t kPartialBytes = 32 << 20;  // bound of the gradient of the weight's partial sums
inline constexpr int64_t kWantedTasks = 32;
inline constexpr double kSerialWork = 1 << 18;  // multiply-adds below which threads cost more than they give

// The smallest equal parts of `total` that are at most `most`.
inline int64_t balanced(int64_t total, int64_t most) {
  return total <= 0 ? 1 : ceil_div(total, ceil_div(total, most));
}

// Channels staged at a time; part of the order of summation, so it follows from the shape of one image alone.
template <class T>
int64_t channel_block(int64_t channels, int64_t most, int64_t window_pixels) {
  int64_t block = balanced(channels, most);
  while (block > 1 && block * window_pixels * static_cast<int64_t>(sizeof(T)) > kWindowBytes)
    block = ceil_div(block, 2);
  return block;
}
// Channels of one group that a run of sums goes over, tap by tap; runs end at this many channels or kDepthBlock sums.
template <class Scalar>
int64_t channels_of_runs(const Convolution<Scalar>& c) {
  const Blocks blocks(c.input.N, c.grid.rows, c.grid.columns, kPixelBlock);
  return channel_block<accumulate_t<Scalar>>(c.input.C / c.groups, c.grid.tap_count == 1 ? kDepthBlock : kChannelBlock,
                                             c.grid.window_pixels(blocks));
}
template <class T>
int64_t images_that_fit(int64_t channels, int64_t window_pixels) {
  return kWindowBytes / (channels * window_pixels * static_cast<int64_t>(sizeof(T)));
}

// Below these sizes most of a tile would be padding: channels in or out, and pixels of the batch.
inline constexpr int64_t kFewestTileChannels = 16, kFewestTilePixels = 64;

// Whether an infinity or a NaN of a gradient of the output would be multiplied by padding, which would be NaN.
template <class Scalar>
bool spoils_padding(const Conv2dGeometry& g, const Grid& grid, const Scalar* grad_output) {
  if (!grid.reads_padding({0, 0, 0, g.N, g.output_H, g.output_W}, g.H, g.W)) return false;
  bool finite = true;
  const int64_t size = g.K * g.output_H * g.output_W;
  parallel_for(g.N, ceil_div(1 << 16, size), [&](int64_t n) {
    if (all_finite(grad_output + n * g.output_image_stride, size)) return;
    __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  });
  return !finite;
}

// Whether the outputs of a block are a matrix [pixel][channel] of sums in place, with a constant distance between
// pixels.
template <class Scalar>
bool is_one_matrix(const Convolution<Scalar>& c, const Block& block) {
  return sizeof(accumulate_t<Scalar>) == sizeof(Scalar) && c.output.channels_last && c.grid.output_step_y == 1 &&
         c.grid.output_step_x == 1 && (block.columns == c.output.W || (block.rows == 1 && block.images == 1));
}

// Where the sums of a block are taken: in the output where they can be, else in `results`.
template <class Scalar>
struct SumsPlace {
  accumulate_t<Scalar>* data;
  int64_t row_stride;
};
template <class Scalar>
SumsPlace<Scalar> place_sums(const Convolution<Scalar>& c, const Block& block, const Phase& phase, int64_t channel,
                             int64_t channels, accumulate_t<Scalar>* results) {
  if constexpr (sizeof(accumulate_t<Scalar>) == sizeof(Scalar)) {
    if (is_one_matrix(c, block)) {
      return {c.output.at(block.image, channel, phase.output_y + block.row, phase.output_x + block.column), c.output.C};
    }
  }
  return {results, channels};
}

// The bias, or zeros, where sums of products will be added.
template <class Scalar, class T = accumulate_t<Scalar>>
void start_sums(const Convolution<Scalar>& convolution, int64_t pixels, int64_t first_out, int64_t out_channels,
                T* sums, int64_t stride) {
  for (int64_t p = 0; p < pixels; ++p) {
    if (convolution.bias == nullptr) {
      fill(sums + p * stride, T(0), out_channels);
    } else {
      widen_row(convolution.bias + first_out, out_channels, sums + p * stride);
    }
  }
}

// out[pixel][k] = bias[k] + input weight, one product over all pixels of the batch; `input` has a row for each.
// Contiguous images are turned at the end.
template <class Scalar, class A, class B>
void multiply_all_pixels(const Convolution<Scalar>& c, Matrix<A> input, Matrix<B> weight, int64_t depth) {
  const int64_t pixels = c.output.N * c.output.H * c.output.W, K = c.output.C;
  const bool turns = !c.output.channels_last || !are_dense(c.output);
  const Scratch<Scalar> turned(turns ? pixels : 0, K);
  Scalar* output = turns ? turned.data() : c.output.data;
  gemm<float>(pixels, K, depth, input, weight, [&](int64_t i, int64_t j, int64_t count, const float* values) {
    Scalar* out = output + i * K + j;
    for (int64_t k = 0; k < count; k += VecF::size) {
      const int64_t lanes = min_of(VecF::size, count - k);
      VecF sums = load_lanes(values + k, lanes);
      if (c.bias != nullptr) sums += load_lanes(c.bias + j + k, lanes);
      store_lanes(out + k, sums, lanes);
    }
  });
  if (!turns) return;
  copy_images<Scalar>({output, K * c.output.H * c.output.W, c.output.N, K, c.output.H, c.output.W, true}, c.output);
}

// Parts that the pixel chunks are dealt to in order; each part's sums are added up apart, and the parts in order.
inline int64_t part_count(int64_t chunks, int64_t tasks_per_part, int64_t bytes_per_part) {
  const int64_t wanted = max_of(1, kWantedTasks / tasks_per_part);
  return max_of(1, min_of(min_of(chunks, wanted), kPartialBytes / max_of(1, bytes_per_part)));
}

template <class Scalar>
Images<Scalar> input_images(const Conv2dGeometry& g, Scalar* data) {
  return {data, g.input_image_stride, g.N, g.C, g.H, g.W, g.channels_last};
}
template <class Scalar>
Images<Scalar> output_images(const Conv2dGeometry& g, Scalar* data) {
  return {data, g.output_image_stride, g.N, g.K, g.output_H, g.output_W, g.channels_last};
}

// One phase with one tap per kernel position, in the order of the kernel.
inline Grid forward_grid(const Conv2dGeometry& g, const int64_t* weight_strides, Tap* taps, Phase* phase) {
  int64_t count = 0;
  for (int64_t kh = 0; kh < g.kernel_H; ++kh) {
    for (int64_t kw = 0; kw < g.kernel_W; ++kw) {
      taps[count++] = {kh * g.dilation_H - g.padding_top, kw * g.dilation_W - g.padding_left,
                       kh * weight_strides[2] + kw * weight_strides[3]};
    }
  }
  *phase = {g.output_H, g.output_W, 0, 0, 0, count};
  Grid grid = {g.output_H, g.output_W, 1, 1, g.stride_H, g.stride_W, phase, 1, nullptr, 0};
  grid.set_taps(taps, count);
  return grid;
}

}  // namespace dlkernels::DLKERNELS_ISA
