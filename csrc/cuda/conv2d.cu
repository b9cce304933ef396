// Convolution as a product that gathers its operands (implicit GEMM), on the matrix units.
//
//   forward          rows: output pixels   columns: output channels     depth: (tap, input channel)
//   input gradient   rows: input pixels    columns: input channels      depth: (tap, output channel)
//   weight gradient  rows: output channels columns: (tap, input channel) depth: output pixels, in slices
//
// Images are read with their channels side by side in chunks of 16 bytes. Those that lie otherwise, or whose groups
// have no whole number of chunks, are first laid out like that in a workspace, with zeros after the channels of each
// group; so are weights. With strides, the input gradient is one convolution for each residue of the input's rows and
// columns, of the taps that meet it: a pixel of it reads only what it needs.
//
// Sums run over (tap, channel) whatever the layout: both layouts give the same bits. Padding is multiplied as zeros, so
// that a weight or gradient that is not finite makes NaN where it meets the padding, as in cuDNN.
#include "cuda/conv2d_images.cuh"
#include "cuda/conv2d_parts.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// ---- weights -------------------------------------------------------------------------------------------------------

// Taps of a kernel: rows x columns of them from (first_H, first_W), step_H and step_W apart.
struct Taps {
  int64_t rows, columns, first_H, first_W, step_H, step_W;
  int64_t count() const { return rows * columns; }
};

// The weights of a product: element (row, tap, channel) of a group.
template <class Scalar>
struct Weights {
  const Scalar* data;  // at the first tap
  int64_t groups, rows, channels;
  int64_t group_stride, row_stride, channel_stride, tap_row_stride, tap_column_stride;
  Taps taps;

  Weights(const void* weight, const Conv2dGeometry& g, const Taps& t, bool rows_are_outputs)
      : data(static_cast<const Scalar*>(weight) + t.first_H * g.weight_strides[2] + t.first_W * g.weight_strides[3]),
        groups(g.groups),
        rows((rows_are_outputs ? g.K : g.C) / g.groups),
        channels((rows_are_outputs ? g.C : g.K) / g.groups),
        group_stride(g.K / g.groups * g.weight_strides[0]),
        row_stride(g.weight_strides[rows_are_outputs ? 0 : 1]),
        channel_stride(g.weight_strides[rows_are_outputs ? 1 : 0]),
        tap_row_stride(t.step_H * g.weight_strides[2]),
        tap_column_stride(t.step_W * g.weight_strides[3]),
        taps(t) {}
};

template <class Scalar>
__global__ void __launch_bounds__(kLayOutThreads, 1)
    lay_out_weights(Weights<Scalar> weights, int64_t padded, Scalar* out) {
  const int64_t index = int64_t{blockIdx.x} * kLayOutThreads + threadIdx.x;
  const int64_t channel = index % padded, tap = index / padded % (weights.taps.rows * weights.taps.columns);
  const int64_t row = index / padded / (weights.taps.rows * weights.taps.columns);  // of all groups
  if (row >= weights.groups * weights.rows) return;
  const Scalar* group = weights.data + row / weights.rows * weights.group_stride;
  out[index] = channel >= weights.channels
                   ? Scalar{}
                   : group[row % weights.rows * weights.row_stride + channel * weights.channel_stride +
                           tap / weights.taps.columns * weights.tap_row_stride +
                           tap % weights.taps.columns * weights.tap_column_stride];
}

// Rows of [tap][padded]: read in place where they lie like that.
template <class Scalar>
MatrixLines<Scalar, true> weight_rows(const Weights<Scalar>& weights, int64_t padded) {
  const Taps& taps = weights.taps;
  const int64_t depth = taps.count() * padded;
  const bool dense = weights.channels == padded && (weights.channel_stride == 1 || padded == 1) &&
                     (weights.tap_column_stride == padded || taps.columns == 1) &&
                     (weights.tap_row_stride == taps.columns * padded || taps.rows == 1);
  if (dense && is_aligned(weights.data, weights.row_stride) && weights.group_stride % Pack<Scalar>::size == 0) {
    return {weights.data, weights.rows, depth, weights.row_stride, weights.group_stride};
  }
  const int64_t count = weights.groups * weights.rows * depth;
  Scalar* data = workspace<Scalar>(count);
  if (depth > 0)
    launch({ceil_div(count, kLayOutThreads), kLayOutThreads}, lay_out_weights<Scalar>, weights, padded, data);
  return {data, weights.rows, depth, depth, weights.rows * depth};
}

// ---- sinks ---------------------------------------------------------------------------------------------------------

// Pixels of images: rows of the product are (image, i, j), columns the channels of a group.
template <class Scalar>
struct PixelSink {
  Scalar* data;  // of pixel (0, 0) of channel 0 of image 0
  const Scalar* bias;
  int64_t image_stride, row_stride, column_stride, channel_stride, channels;  // channels: of a group
  Divider pixels_of_image, pixels_of_row;

  template <class T>
  __device__ __forceinline__ void operator()(int64_t group, int64_t pixel, int64_t column, const T (&values)[2],
                                             int count) const {
    const Division image(pixel, pixels_of_image);
    const Division place(image.remainder, pixels_of_row);
    const int64_t channel = group * channels + column;
    Scalar* out = data + image.quotient * image_stride + place.quotient * row_stride + place.remainder * column_stride +
                  channel * channel_stride;
    Scalar results[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool has_bias = bias != nullptr && i < count;
      results[i] = narrow<Scalar>(has_bias ? values[i] + widen(bias[channel + i]) : values[i]);
    }
    if (channel_stride == 1) return store_pair(out, results, count);
    out[0] = results[0];
    if (count == 2) out[channel_stride] = results[1];
  }
};

// ---- the products --------------------------------------------------------------------------------------------------

void check_sizes(const Conv2dGeometry& g) {
  constexpr int64_t kLargest = 1 << 28;  // coordinates are 32-bit numbers
  const int64_t reach_H = g.kernel_H * g.dilation_H + g.padding_top,
                reach_W = g.kernel_W * g.dilation_W + g.padding_left;
  for (const int64_t size : {g.H + reach_H, g.W + reach_W, g.output_H * g.stride_H, g.output_W * g.stride_W}) {
    if (size > kLargest)
      throw std::runtime_error("conv2d: CUDA kernels take at most 2^28 rows and columns of an image");
  }
}

template <class Scalar>
void forward_typed(const Conv2dForwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  const Images<Scalar> input = input_images<Scalar>(g, args.input);
  const Weights<Scalar> weights(args.weight, g, {g.kernel_H, g.kernel_W, 0, 0, 1, 1}, true);
  const int64_t pixels = g.output_H * g.output_W, pixel_stride = g.channels_last ? g.K : 1;
  const PixelSink<Scalar> sink = {static_cast<Scalar*>(args.output),
                                  static_cast<const Scalar*>(args.bias),
                                  g.output_image_stride,
                                  g.output_W * pixel_stride,
                                  pixel_stride,
                                  g.channels_last ? 1 : pixels,
                                  g.K / g.groups,
                                  Divider(pixels),
                                  Divider(g.output_W)};
  const auto right = weight_rows(weights, input.padded);
  multiply(g.N * pixels, right.lines, right.length, g.groups, input_patches<Scalar, true>(g, input), right, sink);
}

// The taps that meet the input's rows (or columns) of one residue, and how output rows follow from them.
struct Phase {
  int64_t first, count, step;  // taps first, first + step, ...
  int64_t size;                // rows with this residue
  Walk walk;                   // over output rows

  Phase(int64_t residue, int64_t rows, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation)
      : first(0), step(1), size(ceil_div(rows - residue, stride)) {
    while (step * dilation % stride != 0) ++step;
    while (first < step && (residue + padding - first * dilation) % stride != 0) ++first;
    const bool met = first < step && first < kernel;
    count = met ? ceil_div(kernel - first, step) : 0;
    walk = {1, met ? as_int((residue + padding - first * dilation) / stride) : 0, as_int(-step * dilation / stride)};
  }
};

template <class Scalar>
void input_gradient(const Conv2dBackwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  const Images<Scalar> grad_output = output_images<Scalar>(g, args.grad_output);
  const int64_t pixel_stride = g.channels_last ? g.C : 1;
  for (int64_t h = 0; h < g.stride_H && h < g.H; ++h) {
    for (int64_t w = 0; w < g.stride_W && w < g.W; ++w) {
      const Phase down(h, g.H, g.kernel_H, g.stride_H, g.padding_top, g.dilation_H);
      const Phase across(w, g.W, g.kernel_W, g.stride_W, g.padding_left, g.dilation_W);
      const Taps taps = {down.count, across.count, down.first, across.first, down.step, across.step};
      const Weights<Scalar> weights(args.weight, g, taps, false);
      const PixelSink<Scalar> sink = {static_cast<Scalar*>(args.grad_input) + (h * g.W + w) * pixel_stride,
                                      nullptr,
                                      g.C * g.H * g.W,
                                      g.stride_H * g.W * pixel_stride,
                                      g.stride_W * pixel_stride,
                                      g.channels_last ? 1 : g.H * g.W,
                                      g.C / g.groups,
                                      Divider(down.size * across.size),
                                      Divider(across.size)};
      const Patches<Scalar, true> patches(grad_output, down.size, across.size, down.walk, across.walk, down.count,
                                          across.count);
      const auto right = weight_rows(weights, grad_output.padded);
      multiply(patches.pixels, right.lines, right.length, g.groups, patches, right, sink);
    }
  }
}

void forward(const Conv2dForwardArgs& args) {
  check_sizes(args.geometry);
  if (is_depthwise(args.geometry)) return depthwise_forward(args);
  dispatch(args.dtype, [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

template <class Scalar>
void backward_typed(const Conv2dBackwardArgs& args) {
  const bool depthwise = is_depthwise(args.geometry);
  if (args.grad_input != nullptr) depthwise ? depthwise_input_gradient(args) : input_gradient<Scalar>(args);
  if (args.grad_weight != nullptr) depthwise ? depthwise_weight_gradient(args) : dense_weight_gradient(args);
  if (args.grad_bias != nullptr) bias_gradient(args);
}

void backward(const Conv2dBackwardArgs& args) {
  check_sizes(args.geometry);
  dispatch(args.dtype, [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace

Conv2dKernels conv2d_kernels() {
  return {forward, backward};
}

}  // namespace dlkernels::DLKERNELS_ISA
