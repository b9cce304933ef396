// Batch normalisation, with an optional residual and ReLU in the same pass (Ioffe and Szegedy 2015).
//
//   forward    y = relu(w (x - mean) / s + b + residual),   s^2 = variance + eps
//   backward   g = dy where y > 0;   dx = w / s (g - mean(g) - (x - mean) / s^2 mean(g (x - mean)))
//
// A block takes a part of one channel, or, with channels side by side, of 32 channels. Its warps take images in turn
// and lanes the positions of an image; or rows in turn, with a channel a lane: neighbouring lanes read neighbouring
// addresses in both layouts. Forward: means and sums of squared deviations of every part, never E[x^2] - mean^2, each
// thread's about its first element (Welford 1962); the parts of a channel merged in double in their order (Chan, Golub
// and LeVeque 1979); then the output, blocks in reverse order, to begin where the cache is warm. Backward: the same
// with sums of g and of g (x - mean). Elements are centred on the mean as rounded, and what was rounded away is folded
// into the channel's constants.
//
// Memory-bound: three passes over x or y forward, five over x, dy and dx backward.
#include "cpu/batch_norm.h"
#include "cuda/numbers.cuh"
#include "cuda/reduce.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int64_t kPartElements = 16384;  // of a channel, or of 32 side by side, in a block
constexpr int kRun = 16;                  // additions before a sum is widened

// ---- which elements a thread has -----------------------------------------------------------------------------------

// How elements are dealt to blocks: [channel blocks][parts] of them.
struct Layout {
  int64_t channels, rows, inner;  // rows: images, or, with channels side by side, positions of all images
  bool channels_last;
  int64_t channel_blocks, parts, rows_in_part;
  double elements;  // of a channel

  explicit Layout(const BatchNormShape& shape)
      : channels(shape.channels),
        rows(shape.channels_last ? shape.batch * shape.inner : shape.batch),
        inner(shape.inner),
        channels_last(shape.channels_last) {
    const int64_t row_elements = channels_last ? kWarpSize : inner;
    channel_blocks = channels_last ? ceil_div(channels, kWarpSize) : channels;
    rows_in_part = kPartElements / row_elements > 1 ? kPartElements / row_elements : 1;
    parts = ceil_div(rows, rows_in_part);
    elements = static_cast<double>(rows * (channels_last ? 1 : inner));
  }
  int64_t blocks() const { return channel_blocks * parts; }
};

// A thread's channel and its part of it.
struct Share {
  const Layout& layout;
  int64_t part, channel;

  __device__ Share(const Layout& l, int64_t block) : layout(l), part(block % l.parts), channel(block / l.parts) {
    if (layout.channels_last) channel = channel * kWarpSize + threadIdx.x % kWarpSize;
  }
  __device__ bool exists() const { return channel < layout.channels; }

  // body(offset) for every element of the thread.
  template <class Body>
  __device__ __forceinline__ void for_each(Body&& body) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t begin = part * layout.rows_in_part;
    const int64_t end = begin + layout.rows_in_part < layout.rows ? begin + layout.rows_in_part : layout.rows;
    for (int64_t row = begin + warp; row < end; row += kWarps) {
      if (layout.channels_last) {
        body(row * layout.channels + channel);
      } else {
        const int64_t first = (row * layout.channels + channel) * layout.inner;
        for (int64_t i = lane; i < layout.inner; i += kWarpSize) body(first + i);
      }
    }
  }
};

// Combines the values of a block's threads, or, with channels side by side, of the threads of each lane; the result is
// that of the first thread, or of the first warp.
template <class Value, class Combine>
__device__ Value reduce_block(Value value, bool channels_last, Combine combine) {
  Value* values = shared_memory<Value>();
  const int thread = static_cast<int>(threadIdx.x);
  values[thread] = value;
  for (int distance = kThreads / 2; distance >= (channels_last ? kWarpSize : 1); distance /= 2) {
    __syncthreads();
    if (thread < distance) values[thread] = combine(values[thread], values[thread + distance]);
  }
  return values[thread];
}

template <class Value>
__device__ void store_partial(const Share& share, Value value, Value* partials) {
  const bool holds = share.layout.channels_last ? threadIdx.x < kWarpSize && share.exists() : threadIdx.x == 0;
  if (holds) partials[share.part * share.layout.channels + share.channel] = value;
}

// ---- forward -------------------------------------------------------------------------------------------------------

struct Moments {
  double count, mean, squares;  // squares: the sum of squared deviations from the mean
};

struct Merge {
  __device__ Moments operator()(Moments a, Moments b) const {
    if (a.count == 0) return b;
    if (b.count == 0) return a;
    const double count = a.count + b.count, difference = b.mean - a.mean;
    return {count, a.mean + difference * (b.count / count),
            a.squares + b.squares + difference * difference * (a.count * b.count / count)};
  }
};

template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1) find_moments(Layout layout, const Scalar* input, Moments* partials) {
  using T = accumulate_t<Scalar>;
  const Share share(layout, blockIdx.x);
  T first = T(0), mean = T(0), squares = T(0);
  int64_t count = 0;
  if (share.exists()) {
    share.for_each([&](int64_t offset) {
      const T value = widen(input[offset]);
      if (count == 0) first = value;
      ++count;
      const T difference = (value - first) - mean;
      mean += difference / static_cast<T>(count);
      squares += difference * ((value - first) - mean);
    });
  }
  const Moments mine = {static_cast<double>(count), static_cast<double>(first) + mean, squares};
  store_partial(share, reduce_block(mine, layout.channels_last, Merge()), partials);
}

__global__ void __launch_bounds__(kThreads, 1)
    merge_moments(Layout layout, const Moments* partials, double* mean, double* variance) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel >= layout.channels) return;
  Moments moments = {0, 0, 0};
  for (int64_t part = 0; part < layout.parts; ++part) {
    moments = Merge()(moments, partials[part * layout.channels + channel]);
  }
  mean[channel] = moments.mean;
  variance[channel] = moments.squares / moments.count;
}

// y = (x - center) scale + shift
template <class T>
struct Affine {
  T center, scale, shift;
  __device__ Affine(double mean, double variance, double eps, const T* weight, const T* bias, int64_t channel)
      : center(static_cast<T>(mean)) {
    const double factor = (weight == nullptr ? 1.0 : static_cast<double>(weight[channel])) / sqrt(variance + eps);
    scale = static_cast<T>(factor);
    shift = static_cast<T>((bias == nullptr ? 0.0 : static_cast<double>(bias[channel])) -
                           (mean - static_cast<double>(center)) * factor);
  }
};

template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    normalize(Layout layout, bool relu, const Scalar* input, const Scalar* residual, const accumulate_t<Scalar>* weight,
              const accumulate_t<Scalar>* bias, double eps, const double* mean, const double* variance,
              Scalar* output) {
  using T = accumulate_t<Scalar>;
  const Share share(layout, gridDim.x - 1 - blockIdx.x);
  if (!share.exists()) return;
  const Affine<T> affine(mean[share.channel], variance[share.channel], eps, weight, bias, share.channel);
  share.for_each([&](int64_t offset) {
    T out = (widen(input[offset]) - affine.center) * affine.scale + affine.shift;
    if (residual != nullptr) out += widen(residual[offset]);
    output[offset] = narrow<Scalar>(relu && out < T(0) ? T(0) : out);  // NaN stays
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

struct GradientSums {
  double gradient, product;  // of g, and of g (x - center)
};
struct AddSums {
  __device__ GradientSums operator()(GradientSums a, GradientSums b) const {
    return {a.gradient + b.gradient, a.product + b.product};
  }
};

// The gradient behind the ReLU; NaN outputs let it pass, as torch's do.
template <class Scalar>
__device__ __forceinline__ accumulate_t<Scalar> gradient_at(const Scalar* grad_output, const Scalar* output,
                                                            int64_t offset) {
  using T = accumulate_t<Scalar>;
  return output != nullptr && widen(output[offset]) <= T(0) ? T(0) : widen(grad_output[offset]);
}

// `output` is null without ReLU.
template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    sum_gradients(Layout layout, const Scalar* grad_output, const Scalar* input, const Scalar* output,
                  const double* mean, GradientSums* partials) {
  using T = accumulate_t<Scalar>;
  const Share share(layout, blockIdx.x);
  GradientSums sums = {0, 0};
  if (share.exists()) {
    const T center = static_cast<T>(mean[share.channel]);
    T gradient = T(0), product = T(0);
    int run = 0;
    auto widen_sums = [&] {
      sums.gradient += gradient, sums.product += product;
      gradient = product = T(0);
    };
    share.for_each([&](int64_t offset) {
      const T g = gradient_at(grad_output, output, offset);
      gradient += g;
      product += g * (widen(input[offset]) - center);
      if (++run % kRun == 0) widen_sums();
    });
    widen_sums();
  }
  store_partial(share, reduce_block(sums, layout.channels_last, AddSums()), partials);
}

// dx = scale g - factor (x - center) - constant
struct Correction {
  double factor, constant;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    finish_gradients(Layout layout, const GradientSums* partials, bool training, const T* weight, const double* mean,
                     const double* variance, double eps, Correction* corrections, T* grad_weight, T* grad_bias) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel >= layout.channels) return;
  GradientSums sums = {0, 0};
  for (int64_t part = 0; part < layout.parts; ++part) {
    sums = AddSums()(sums, partials[part * layout.channels + channel]);
  }
  const double rounded = mean[channel] - static_cast<double>(static_cast<T>(mean[channel]));
  const double product = sums.product - rounded * sums.gradient;  // of g (x - mean)
  const double deviation = sqrt(variance[channel] + eps);
  if (grad_weight != nullptr) grad_weight[channel] = static_cast<T>(product / deviation);
  if (grad_bias != nullptr) grad_bias[channel] = static_cast<T>(sums.gradient);
  const double scale = (weight == nullptr ? 1.0 : static_cast<double>(weight[channel])) / deviation;
  corrections[channel] = {0.0, 0.0};
  if (!training) return;
  const double share = scale / layout.elements, factor = share * product / (variance[channel] + eps);
  corrections[channel] = {factor, share * sums.gradient - factor * rounded};
}

template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    differentiate(Layout layout, bool training, const Scalar* grad_output, const Scalar* input, const Scalar* output,
                  const accumulate_t<Scalar>* weight, const double* mean, const double* variance, double eps,
                  const Correction* corrections, Scalar* grad_input, Scalar* grad_residual) {
  using T = accumulate_t<Scalar>;
  const Share share(layout, gridDim.x - 1 - blockIdx.x);
  if (!share.exists()) return;
  const T* no_bias = nullptr;
  const Affine<T> affine(mean[share.channel], variance[share.channel], eps, weight, no_bias, share.channel);
  const T constant = static_cast<T>(corrections[share.channel].constant);
  const T factor = static_cast<T>(corrections[share.channel].factor);
  share.for_each([&](int64_t offset) {
    const T g = gradient_at(grad_output, output, offset);
    if (grad_residual != nullptr) grad_residual[offset] = narrow<Scalar>(g);
    if (grad_input == nullptr) return;
    T out = affine.scale * g;
    if (training) out -= (widen(input[offset]) - affine.center) * factor + constant;
    grad_input[offset] = narrow<Scalar>(out);
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

template <class Scalar>
void forward_typed(const BatchNormForwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const Layout layout(args.shape);
  const Scalar* input = static_cast<const Scalar*>(args.input);
  if (args.shape.training) {
    Moments* partials = workspace<Moments>(layout.parts * layout.channels);
    launch({layout.blocks(), kThreads, kThreads * sizeof(Moments)}, find_moments<Scalar>, layout, input, partials);
    launch({ceil_div(layout.channels, kThreads), kThreads}, merge_moments, layout, partials, args.mean, args.variance);
  }
  launch({layout.blocks(), kThreads}, normalize<Scalar>, layout, args.shape.relu, input,
         static_cast<const Scalar*>(args.residual), static_cast<const T*>(args.weight),
         static_cast<const T*>(args.bias), args.eps, args.mean, args.variance, static_cast<Scalar*>(args.output));
}

template <class Scalar>
void backward_typed(const BatchNormBackwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const Layout layout(args.shape);
  const Scalar* grad_output = static_cast<const Scalar*>(args.grad_output);
  const Scalar* input = static_cast<const Scalar*>(args.input);
  const Scalar* output = args.shape.relu ? static_cast<const Scalar*>(args.output) : nullptr;
  const T* weight = static_cast<const T*>(args.weight);
  GradientSums* partials = workspace<GradientSums>(layout.parts * layout.channels);
  Correction* corrections = workspace<Correction>(layout.channels);
  launch({layout.blocks(), kThreads, kThreads * sizeof(GradientSums)}, sum_gradients<Scalar>, layout, grad_output,
         input, output, args.mean, partials);
  launch({ceil_div(layout.channels, kThreads), kThreads}, finish_gradients<T>, layout, partials, args.shape.training,
         weight, args.mean, args.variance, args.eps, corrections, static_cast<T*>(args.grad_weight),
         static_cast<T*>(args.grad_bias));
  if (args.grad_input == nullptr && args.grad_residual == nullptr) return;
  launch({layout.blocks(), kThreads}, differentiate<Scalar>, layout, args.shape.training, grad_output, input, output,
         weight, args.mean, args.variance, args.eps, corrections, static_cast<Scalar*>(args.grad_input),
         static_cast<Scalar*>(args.grad_residual));
}

void forward(const BatchNormForwardArgs& args) {
  dispatch(args.shape.dtype, [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

void backward(const BatchNormBackwardArgs& args) {
  dispatch(args.shape.dtype, [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace

BatchNormKernels batch_norm_kernels() {
  return {forward, backward};
}

}  // namespace dlkernels::DLKERNELS_ISA
