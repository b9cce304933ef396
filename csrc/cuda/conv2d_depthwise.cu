// Convolution with one channel per group. There is no product: a thread computes an element of the output, or of the
// input's gradient, from the taps that meet it; neighbouring threads have neighbouring elements in both layouts.
//
// The weight's gradient is a sum over images and pixels for every tap: a block takes a part of the pixels, for one
// channel or, with channels side by side, for 32 of them, and the parts are added in their order.
#include "cuda/column_sums.cuh"
#include "cuda/conv2d_parts.cuh"
#include "cuda/reduce.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int64_t kPartPixels = 4096;

struct Position {
  int64_t image, channel, h, w;
};

// The elements of images [N][channels][H][W] or [N][H][W][channels].
struct Elements {
  int64_t count, image_stride;
  bool channels_last;
  Divider image, channels, H, W;

  Elements(int64_t N, int64_t channels_, int64_t H_, int64_t W_, int64_t image_stride_, bool channels_last_)
      : count(N * channels_ * H_ * W_),
        image_stride(image_stride_),
        channels_last(channels_last_),
        image(channels_ * H_ * W_),
        channels(channels_),
        H(H_),
        W(W_) {}

  // Of element `index` in the order of memory.
  __device__ __forceinline__ Position position(int64_t index) const {
    const Division whole(index, image);
    if (channels_last) {
      const Division pixel(whole.remainder, channels);
      const Division row(pixel.quotient, W);
      return {whole.quotient, pixel.remainder, row.quotient, row.remainder};
    }
    const Division row(whole.remainder, W);
    const Division channel(row.quotient, H);
    return {whole.quotient, channel.quotient, channel.remainder, row.remainder};
  }
  __device__ __forceinline__ int64_t offset(const Position& at) const {
    return at.image * image_stride + (channels_last ? (at.h * W.divisor() + at.w) * channels.divisor() + at.channel
                                                    : (at.channel * H.divisor() + at.h) * W.divisor() + at.w);
  }
};

Elements inputs_of(const Conv2dGeometry& g, int64_t image_stride) {
  return {g.N, g.C, g.H, g.W, image_stride, g.channels_last};
}
Elements outputs_of(const Conv2dGeometry& g) {
  return {g.N, g.K, g.output_H, g.output_W, g.output_image_stride, g.channels_last};
}

template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    apply_taps(Conv2dGeometry g, Elements inputs, Elements outputs, const Scalar* input, const Scalar* weight,
               const Scalar* bias, Scalar* output) {
  using T = accumulate_t<Scalar>;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= outputs.count) return;
  const Position at = outputs.position(index);
  const Scalar* taps = weight + at.channel * g.weight_strides[0];
  const int64_t channel = at.channel / (g.K / g.C);
  T sum = bias == nullptr ? T(0) : widen(bias[at.channel]);
  for (int64_t r = 0; r < g.kernel_H; ++r) {
    const int64_t h = at.h * g.stride_H - g.padding_top + r * g.dilation_H;
    if (h < 0 || h >= g.H) continue;
    for (int64_t s = 0; s < g.kernel_W; ++s) {
      const int64_t w = at.w * g.stride_W - g.padding_left + s * g.dilation_W;
      if (w < 0 || w >= g.W) continue;
      sum += widen(input[inputs.offset({at.image, channel, h, w})]) *
             widen(taps[r * g.weight_strides[2] + s * g.weight_strides[3]]);
    }
  }
  output[outputs.offset(at)] = narrow<Scalar>(sum);
}

// The output row (or column) that reads `place` through a tap, or -1.
__device__ __forceinline__ int64_t reader_of(int64_t place, int64_t tap, int64_t stride, int64_t dilation,
                                             int64_t padding, int64_t size) {
  const int64_t scaled = place + padding - tap * dilation;
  return scaled >= 0 && scaled % stride == 0 && scaled / stride < size ? scaled / stride : -1;
}

template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    apply_adjoint_taps(Conv2dGeometry g, Elements inputs, Elements outputs, const Scalar* grad_output,
                       const Scalar* weight, Scalar* grad_input) {
  using T = accumulate_t<Scalar>;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, multiplier = g.K / g.C;
  if (index >= inputs.count) return;
  const Position at = inputs.position(index);
  T sum = T(0);
  for (int64_t r = 0; r < g.kernel_H; ++r) {
    const int64_t h = reader_of(at.h, r, g.stride_H, g.dilation_H, g.padding_top, g.output_H);
    if (h < 0) continue;
    for (int64_t s = 0; s < g.kernel_W; ++s) {
      const int64_t w = reader_of(at.w, s, g.stride_W, g.dilation_W, g.padding_left, g.output_W);
      if (w < 0) continue;
      for (int64_t k = at.channel * multiplier; k < (at.channel + 1) * multiplier; ++k) {
        sum += widen(grad_output[outputs.offset({at.image, k, h, w})]) *
               widen(weight[k * g.weight_strides[0] + r * g.weight_strides[2] + s * g.weight_strides[3]]);
      }
    }
  }
  grad_input[inputs.offset(at)] = narrow<Scalar>(sum);
}

// Blocks are [part][tap][channels]; partials [part][tap][K].
template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    sum_taps(Conv2dGeometry g, Elements inputs, Elements outputs, const Scalar* grad_output, const Scalar* input,
             double* partials) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t channel_blocks = g.channels_last ? ceil_div(g.K, kWarpSize) : g.K;
  const int64_t taps = g.kernel_H * g.kernel_W, tap = blockIdx.x / channel_blocks % taps;
  const int64_t part = blockIdx.x / channel_blocks / taps, block = blockIdx.x % channel_blocks;
  const int64_t k = g.channels_last ? block * kWarpSize + lane : block;
  const int64_t first = part * kPartPixels + (g.channels_last ? warp : static_cast<int>(threadIdx.x));
  const int64_t pixels = g.N * g.output_H * g.output_W;
  const int64_t end = (part + 1) * kPartPixels < pixels ? (part + 1) * kPartPixels : pixels;
  constexpr int kRun = 16;
  accumulate_t<Scalar> run = 0;
  double sum = 0;
  int count = 0;
  for (int64_t pixel = first; k < g.K && pixel < end; pixel += g.channels_last ? kWarps : kThreads) {
    const Division row(pixel, outputs.W);
    const Division image(row.quotient, outputs.H);
    const int64_t h = image.remainder * g.stride_H - g.padding_top + tap / g.kernel_W * g.dilation_H;
    const int64_t w = row.remainder * g.stride_W - g.padding_left + tap % g.kernel_W * g.dilation_W;
    if (h < 0 || h >= g.H || w < 0 || w >= g.W) continue;
    run += widen(grad_output[outputs.offset({image.quotient, k, image.remainder, row.remainder})]) *
           widen(input[inputs.offset({image.quotient, k / (g.K / g.C), h, w})]);
    if (++count % kRun != 0) continue;
    sum += run;
    run = 0;
  }
  sum += run;
  double* exchange = shared_memory<double>();
  if (g.channels_last) {
    exchange[threadIdx.x] = sum;
    __syncthreads();
    if (warp != 0 || k >= g.K) return;
    for (int other = 1; other < kWarps; ++other) sum += exchange[other * kWarpSize + lane];
  } else {
    sum = Team<kWarps>::reduce(sum, Add(), exchange);
    if (threadIdx.x != 0) return;
  }
  partials[(part * taps + tap) * g.K + k] = sum;
}

template <class Scalar>
struct TapSink {
  Scalar* data;
  int64_t K, kernel_W;
  int64_t strides[4];
  __device__ void operator()(int64_t column, double sum) const {
    const int64_t tap = column / K;
    data[column % K * strides[0] + tap / kernel_W * strides[2] + tap % kernel_W * strides[3]] =
        narrow<Scalar>(static_cast<accumulate_t<Scalar>>(sum));
  }
};

// ---- launchers -----------------------------------------------------------------------------------------------------

template <class Scalar>
void forward_typed(const Conv2dForwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  const Elements outputs = outputs_of(g);
  launch({ceil_div(outputs.count, kThreads), kThreads}, apply_taps<Scalar>, g, inputs_of(g, g.input_image_stride),
         outputs, static_cast<const Scalar*>(args.input), static_cast<const Scalar*>(args.weight),
         static_cast<const Scalar*>(args.bias), static_cast<Scalar*>(args.output));
}

template <class Scalar>
void input_gradient_typed(const Conv2dBackwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  const Elements inputs = inputs_of(g, g.C * g.H * g.W);
  launch({ceil_div(inputs.count, kThreads), kThreads}, apply_adjoint_taps<Scalar>, g, inputs, outputs_of(g),
         static_cast<const Scalar*>(args.grad_output), static_cast<const Scalar*>(args.weight),
         static_cast<Scalar*>(args.grad_input));
}

template <class Scalar>
void weight_gradient_typed(const Conv2dBackwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  const int64_t taps = g.kernel_H * g.kernel_W, parts = ceil_div(g.N * g.output_H * g.output_W, kPartPixels);
  double* partials = workspace<double>(parts, taps, g.K);
  const int64_t blocks = parts * taps * (g.channels_last ? ceil_div(g.K, kWarpSize) : g.K);
  launch({blocks, kThreads, kThreads * sizeof(double)}, sum_taps<Scalar>, g, inputs_of(g, g.input_image_stride),
         outputs_of(g), static_cast<const Scalar*>(args.grad_output), static_cast<const Scalar*>(args.input), partials);
  TapSink<Scalar> sink = {static_cast<Scalar*>(args.grad_weight), g.K, g.kernel_W, {}};
  for (int i = 0; i < 4; ++i) sink.strides[i] = g.grad_weight_strides[i];
  launch({ceil_div(taps * g.K, kSumThreads), kSumThreads}, add_parts<TapSink<Scalar>>, partials, parts, taps * g.K,
         sink);
}

}  // namespace

void depthwise_forward(const Conv2dForwardArgs& args) {
  dispatch(args.dtype, [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

void depthwise_input_gradient(const Conv2dBackwardArgs& args) {
  dispatch(args.dtype, [&](auto* type) { input_gradient_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

void depthwise_weight_gradient(const Conv2dBackwardArgs& args) {
  dispatch(args.dtype, [&](auto* type) { weight_gradient_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace dlkernels::DLKERNELS_ISA
