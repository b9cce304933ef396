// Batch normalisation, with an optional residual and ReLU in the same pass (Ioffe and Szegedy 2015).
//
//   forward    y = relu(w (x - mean) / s + b + residual),   s^2 = variance + eps
//   backward   g = dy where y > 0;   dx = w / s (g - mean(g) - (x - mean) / s^2 mean(g (x - mean)))
//
// A thread takes packs: 16 bytes of neighbours, or single elements where packs do not divide a row. With contiguous
// images a block takes packs of one channel, whose images may be of any size; with channels side by side its threads
// take rows in turn, each the same channels of all its rows. Either way the places of a pack are apart until the end:
// place e of a thread's packs has sums of its own, in both layouts by the same code, which are of one channel or of
// several.
//
// Forward: means and sums of squared deviations, never E[x^2] - mean^2, each place's about its first element (Welford
// 1962); those of places, threads and blocks are merged in double (Chan, Golub and LeVeque 1979), those of a channel's
// blocks by a block of their own, which also makes the channel's constants; then the output, blocks in reverse order,
// to begin where the cache is warm. Backward: the same with sums of g and of g (x - mean). Elements are centred on the
// mean as rounded, and what was rounded away is folded into the constants.
//
// ReLU is differentiated by its output, as torch's is, and ReLU6 by its argument, which backward computes again: its
// output may be changed in place meanwhile.
//
// Squares of float32 overflow from 2^64 on. A channel whose statistics, or sums, do not come out as ordinary numbers is
// done again in double: its sums by the first warp of the block that puts them together, its elements where they are.
// An infinite center marks it.
//
// Memory-bound: three passes over x or y forward, five over x, dy and dx backward, and two over y with ReLU.
#include "cpu/batch_norm.h"
#include "cuda/numbers.cuh"
#include "cuda/reduce.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int64_t kPacksOfThread = 16;
constexpr int kRun = 8;  // packs before sums are widened

// ---- which elements a thread has -----------------------------------------------------------------------------------

// How packs are dealt to blocks: [channel blocks][parts] of them.
struct Layout {
  int64_t channels, inner;
  bool channels_last;
  int lanes = 1;      // threads that share a row, with channels side by side: a power of two
  Divider row_packs;  // contiguous: packs of a channel's row in an image
  int64_t packs;      // of a channel; with channels side by side, rows
  int64_t channel_blocks, parts, part_packs;
  double elements;  // of a channel

  Layout(const BatchNormShape& shape, int pack)
      : channels(shape.channels),
        inner(shape.inner),
        channels_last(shape.channels_last),
        row_packs(shape.inner / pack),
        packs(shape.channels_last ? shape.batch * shape.inner : shape.batch * (shape.inner / pack)),
        channel_blocks(shape.channels),
        elements(static_cast<double>(shape.batch * shape.inner)) {
    if (channels_last) {
      while (lanes < kWarpSize && lanes * pack < channels) lanes *= 2;
      channel_blocks = ceil_div(channels, lanes * pack);
    }
    part_packs = kThreads / lanes * kPacksOfThread;
    parts = ceil_div(packs, part_packs);
  }
  int64_t blocks() const { return channel_blocks * parts; }
};

// A thread's part of the packs, and the channel of each place in them.
template <int kPack>
struct Share {
  const Layout& layout;
  int64_t part, first_channel;

  __device__ Share(const Layout& l, int64_t block) : layout(l), part(block % l.parts), first_channel(block / l.parts) {
    if (layout.channels_last)
      first_channel = (first_channel * layout.lanes + static_cast<int>(threadIdx.x) % layout.lanes) * kPack;
  }
  __device__ bool exists() const { return first_channel < layout.channels; }
  __device__ int64_t channel(int place) const { return layout.channels_last ? first_channel + place : first_channel; }

  // constants[place] = of(channel), once where all places have one channel.
  template <class Constant, class Of>
  __device__ __forceinline__ void for_places(Constant (&constants)[kPack], Of&& of) const {
#pragma unroll
    for (int e = 0; e < kPack; ++e) constants[e] = e > 0 && !layout.channels_last ? constants[0] : of(channel(e));
  }

  // body(offset) for every pack of the thread.
  template <class Body>
  __device__ __forceinline__ void for_each(Body&& body) const {
    const int64_t begin = part * layout.part_packs;
    const int64_t end = begin + layout.part_packs < layout.packs ? begin + layout.part_packs : layout.packs;
    const int step = kThreads / layout.lanes;
    for (int64_t pack = begin + static_cast<int>(threadIdx.x) / layout.lanes; pack < end; pack += step) {
      if (layout.channels_last) {
        body(pack * layout.channels + first_channel);
      } else {
        const Division image(pack, layout.row_packs);
        body((image.quotient * layout.channels + first_channel) * layout.inner + image.remainder * kPack);
      }
    }
  }
};

// The combination of the values of all threads that are a multiple of `lanes` apart, for the first `lanes` threads.
template <class Value, class Combine>
__device__ Value reduce_block(Value value, int lanes, Combine combine) {
  for (int distance = kWarpSize / 2; distance >= lanes; distance /= 2) {
    value = combine(value, value.of_lane_across(distance));
  }
  Value* exchange = shared_memory<Value>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  __syncthreads();  // of the last use of `exchange`
  if (lane < lanes) exchange[warp * lanes + lane] = value;
  __syncthreads();
  if (thread >= lanes) return value;
  for (int w = 1; w < kWarps; ++w) value = combine(value, exchange[w * lanes + thread]);
  return value;
}

template <class Value>
constexpr int64_t kExchangeBytes = kThreads * sizeof(Value);

// of(place): what a thread found in a place of its packs. Writes what the block found of each channel.
template <int kPack, class Value, class Combine, class Of>
__device__ void store_partials(const Share<kPack>& share, Value* partials, Combine combine, Of&& of) {
  const Layout& layout = share.layout;
  Value* out = partials + share.part * layout.channels;
  if (!layout.channels_last) {
    Value value = of(0);
#pragma unroll
    for (int e = 1; e < kPack; ++e) value = combine(value, of(e));
    value = reduce_block(value, 1, combine);
    if (threadIdx.x == 0) out[share.first_channel] = value;
    return;
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    const Value value = reduce_block(of(e), layout.lanes, combine);
    if (static_cast<int>(threadIdx.x) < layout.lanes && share.exists()) out[share.channel(e)] = value;
  }
}

// What all blocks found of a channel, for the first thread of the block that asks.
template <class Value, class Combine>
__device__ Value combine_partials(const Layout& layout, int64_t channel, const Value* partials, Combine combine) {
  Value value = {};
  for (int64_t part = threadIdx.x; part < layout.parts; part += kThreads) {
    value = combine(value, partials[part * layout.channels + channel]);
  }
  return reduce_block(value, 1, combine);
}

// ---- channels of very large numbers --------------------------------------------------------------------------------

// Whether a channel with these statistics needs more range than T has, see cpu/batch_norm.cc.
template <class T, class... Numbers>
__device__ bool is_extreme(Numbers... numbers) {
  constexpr double kLargest = 0x1p100;
  return sizeof(T) < sizeof(double) && !((fabs(numbers) <= kLargest) && ...);
}

// Whether the constants of a channel, with this center, say that it is in double.
template <class T>
__device__ __forceinline__ bool is_wide(T center) {
  return sizeof(T) < sizeof(double) && isinf(center);
}

// What the center of a channel, its rounded mean, lacks; nothing where the mean is infinite, as it may be in
// evaluation.
template <class T>
__device__ double rounded_away(double mean) {
  const double rest = mean - static_cast<double>(static_cast<T>(mean));
  return rest == rest ? rest : 0.0;
}

// body(offset) for the elements of a channel that are this lane's.
template <class Body>
__device__ void for_each_of_lane(const Layout& layout, int64_t channel, Body&& body) {
  const int64_t elements = static_cast<int64_t>(layout.elements);
  for (int64_t i = static_cast<int>(threadIdx.x) % kWarpSize; i < elements; i += kWarpSize) {
    body(layout.channels_last ? i * layout.channels + channel
                              : (i / layout.inner * layout.channels + channel) * layout.inner + i % layout.inner);
  }
}

template <class Value, class Combine>
__device__ Value combine_lanes(Value value, Combine combine) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = combine(value, value.of_lane_across(distance));
  }
  return value;
}

// ---- forward -------------------------------------------------------------------------------------------------------

struct Moments {
  double count, mean, squares;  // squares: the sum of squared deviations from the mean

  __device__ Moments of_lane_across(int distance) const {
    return {__shfl_xor_sync(kAllLanes, count, distance), __shfl_xor_sync(kAllLanes, mean, distance),
            __shfl_xor_sync(kAllLanes, squares, distance)};
  }
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

template <class Scalar, int kPack>
__global__ void __launch_bounds__(kThreads, 1) find_moments(Layout layout, const Scalar* input, Moments* partials) {
  using T = accumulate_t<Scalar>;
  const Share<kPack> share(layout, blockIdx.x);
  T first[kPack] = {}, mean[kPack] = {}, squares[kPack] = {};
  int count = 0;
  if (share.exists()) {
    share.for_each([&](int64_t offset) {
      T values[kPack];
      load_pack(input + offset, values);
      const bool is_first = count == 0;
      ++count;
      const T share_of_one = T(1) / static_cast<T>(count);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        if (is_first) first[e] = values[e];
        const T value = values[e] - first[e], difference = value - mean[e];
        mean[e] += difference * share_of_one;
        squares[e] += difference * (value - mean[e]);
      }
    });
  }
  store_partials(share, partials, Merge(), [&](int e) {
    return Moments{static_cast<double>(count), static_cast<double>(first[e]) + mean[e], squares[e]};
  });
}

// Those of a channel, by one warp.
template <class Scalar>
__device__ Moments find_wide_moments(const Layout& layout, const Scalar* input, int64_t channel) {
  Moments moments = {};
  for_each_of_lane(layout, channel, [&](int64_t offset) {
    const double difference = static_cast<double>(widen(input[offset])) - moments.mean;
    moments.count += 1;
    moments.mean += difference / moments.count;
    moments.squares += difference * (static_cast<double>(widen(input[offset])) - moments.mean);
  });
  return combine_lanes(moments, Merge());
}

// y = (x - center) scale + shift
template <class T>
struct Affine {
  T center, scale, shift;

  __device__ __forceinline__ T operator()(T x) const { return (x - center) * scale + shift; }
  __device__ static Affine of(double mean, double variance, double eps, const T* weight, const T* bias,
                              int64_t channel) {
    const double factor = (weight == nullptr ? 1.0 : static_cast<double>(weight[channel])) / sqrt(variance + eps);
    if (is_extreme<T>(mean, variance, factor)) return {static_cast<T>(HUGE_VAL), T(0), T(0)};
    const T center = static_cast<T>(mean);
    return {
        center, static_cast<T>(factor),
        static_cast<T>((bias == nullptr ? 0.0 : static_cast<double>(bias[channel])) - rounded_away<T>(mean) * factor)};
  }
};

// A block a channel.
template <class Scalar, class T = accumulate_t<Scalar>>
__global__ void __launch_bounds__(kThreads, 1)
    finish_moments(Layout layout, const Scalar* input, const Moments* partials, const T* weight, const T* bias,
                   double eps, double* mean, double* variance, Affine<T>* affines) {
  const int64_t channel = blockIdx.x;
  Moments moments = combine_partials(layout, channel, partials, Merge());
  if (threadIdx.x >= kWarpSize) return;
  const bool extreme = is_extreme<T>(moments.mean, moments.squares / moments.count);
  if (__shfl_sync(kAllLanes, static_cast<int>(extreme), 0)) moments = find_wide_moments(layout, input, channel);
  if (threadIdx.x != 0) return;
  const double spread = moments.squares / moments.count;
  mean[channel] = moments.mean;
  variance[channel] = spread;
  affines[channel] = Affine<T>::of(moments.mean, spread, eps, weight, bias, channel);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    take_moments(int64_t channels, const T* weight, const T* bias, double eps, const double* mean,
                 const double* variance, Affine<T>* affines) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel >= channels) return;
  affines[channel] = Affine<T>::of(mean[channel], variance[channel], eps, weight, bias, channel);
}

// What an element of a channel in double is made of.
template <class T>
struct WideAffine {
  const T *weight, *bias;
  const double *mean, *variance;
  double eps;

  __device__ double operator()(int64_t channel, double value) const {
    const double factor =
        (weight == nullptr ? 1.0 : static_cast<double>(weight[channel])) / sqrt(variance[channel] + eps);
    return (value - mean[channel]) * factor + (bias == nullptr ? 0.0 : static_cast<double>(bias[channel]));
  }
};

template <class T>
__device__ __forceinline__ T activated(Activation activation, T out) {
  if (activation != Activation::none && out < T(0)) out = T(0);  // NaN stays
  if (activation == Activation::relu6 && out > T(6)) out = T(6);
  return out;
}

// The elements of a thread some of whose channels are in double.
template <class Scalar, int kPack, class T = accumulate_t<Scalar>>
__device__ void normalize_wide(const Share<kPack>& share, Activation activation, const Scalar* input,
                               const Scalar* residual, const Affine<T> (&affine)[kPack], const WideAffine<T>& wide,
                               Scalar* output) {
  share.for_each([&](int64_t offset) {
    for (int e = 0; e < kPack; ++e) {
      const T value = widen(input[offset + e]), added = residual == nullptr ? T(0) : widen(residual[offset + e]);
      double out = (value - affine[e].center) * affine[e].scale + affine[e].shift + added;
      if (is_wide(affine[e].center)) out = wide(share.channel(e), static_cast<double>(value)) + added;
      output[offset + e] = narrow<Scalar>(static_cast<T>(activated(activation, out)));
    }
  });
}

template <class Scalar, int kPack>
__global__ void __launch_bounds__(kThreads, 1)
    normalize(Layout layout, Activation activation, const Scalar* input, const Scalar* residual,
              const Affine<accumulate_t<Scalar>>* affines, WideAffine<accumulate_t<Scalar>> wide, Scalar* output) {
  using T = accumulate_t<Scalar>;
  const Share<kPack> share(layout, gridDim.x - 1 - blockIdx.x);
  if (!share.exists()) return;
  Affine<T> affine[kPack];
  share.for_places(affine, [&](int64_t channel) { return affines[channel]; });
  bool any_wide = false;
#pragma unroll
  for (int e = 0; e < kPack; ++e) any_wide |= is_wide(affine[e].center);
  if (any_wide) return normalize_wide(share, activation, input, residual, affine, wide, output);
  share.for_each([&](int64_t offset) {
    T values[kPack], added[kPack] = {};
    load_pack(input + offset, values);
    if (residual != nullptr) load_pack(residual + offset, added);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      T out = affine[e](values[e]);
      if (residual != nullptr) out += added[e];
      values[e] = activated(activation, out);
    }
    store_pack(output + offset, values);
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

struct GradientSums {
  double gradient, product;  // of g, and of g (x - center)

  __device__ GradientSums of_lane_across(int distance) const {
    return {__shfl_xor_sync(kAllLanes, gradient, distance), __shfl_xor_sync(kAllLanes, product, distance)};
  }
};
struct AddSums {
  __device__ GradientSums operator()(GradientSums a, GradientSums b) const {
    return {a.gradient + b.gradient, a.product + b.product};
  }
};

// The activation in backward: known by its output, or by the map that makes its argument, or neither where there is
// none.
template <class Scalar>
struct Gate {
  using T = accumulate_t<Scalar>;
  const Scalar* output;      // of ReLU, or null
  const Affine<T>* affines;  // with ReLU6, or null
  WideAffine<T> wide;        // the same of channels in double

  template <int kPack>
  __device__ __forceinline__ void take_affines(const Share<kPack>& share, Affine<T> (&affine)[kPack]) const {
    if (affines != nullptr) share.for_places(affine, [&](int64_t channel) { return affines[channel]; });
  }

  // Gradients behind the activation, from the pack of the input; NaN lets them pass, as torch's activations do.
  template <int kPack>
  __device__ __forceinline__ void stop(int64_t offset, const T (&values)[kPack], const Affine<T> (&affine)[kPack],
                                       T (&gradients)[kPack]) const {
    if (output != nullptr) {
      T outputs[kPack];
      load_pack(output + offset, outputs);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        if (outputs[e] <= T(0)) gradients[e] = T(0);
      }
    } else if (affines != nullptr) {
      using Range = Relu6Range<Scalar>;
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const T argument = affine[e](values[e]);
        if (argument <= T(Range::low) || argument >= T(Range::high)) gradients[e] = T(0);
      }
    }
  }

  // Of one element of a channel that may be in double.
  __device__ T stop_one(int64_t offset, int64_t channel, T value, const Affine<T>& affine, T gradient) const {
    if (output != nullptr) return widen(output[offset]) <= T(0) ? T(0) : gradient;
    if (affines == nullptr) return gradient;
    using Range = Relu6Range<Scalar>;
    const double argument = is_wide(affine.center) ? wide(channel, static_cast<double>(value)) : affine(value);
    return argument <= Range::low || argument >= Range::high ? T(0) : gradient;
  }
};

template <class Scalar, int kPack>
__global__ void __launch_bounds__(kThreads, 1)
    sum_gradients(Layout layout, const Scalar* grad_output, const Scalar* input, Gate<Scalar> gate, const double* mean,
                  GradientSums* partials) {
  using T = accumulate_t<Scalar>;
  const Share<kPack> share(layout, blockIdx.x);
  GradientSums sums[kPack] = {};
  if (share.exists()) {
    T center[kPack], gradient[kPack] = {}, product[kPack] = {};
    Affine<T> affine[kPack] = {};
    gate.take_affines(share, affine);
    share.for_places(center, [&](int64_t channel) { return static_cast<T>(mean[channel]); });
    int run = 0;
    auto widen_sums = [&] {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        sums[e].gradient += gradient[e], sums[e].product += product[e];
        gradient[e] = product[e] = T(0);
      }
    };
    share.for_each([&](int64_t offset) {
      T values[kPack], gradients[kPack];
      load_pack(input + offset, values);
      load_pack(grad_output + offset, gradients);
      gate.stop(offset, values, affine, gradients);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        gradient[e] += gradients[e];
        product[e] += gradients[e] * (values[e] - center[e]);
      }
      if (++run % kRun == 0) widen_sums();
    });
    widen_sums();
  }
  store_partials(share, partials, AddSums(), [&](int e) { return sums[e]; });
}

// dx = scale g - factor (x - center) - constant
template <class T>
struct Derivative {
  T center, scale, factor, constant;
};

// Sums of a channel, by one warp.
template <class Scalar>
__device__ GradientSums sum_wide_gradients(const Layout& layout, const Scalar* grad_output, const Scalar* input,
                                           const Gate<Scalar>& gate, int64_t channel, double center) {
  using T = accumulate_t<Scalar>;
  const Affine<T> affine = gate.affines == nullptr ? Affine<T>{} : gate.affines[channel];
  GradientSums sums = {};
  for_each_of_lane(layout, channel, [&](int64_t offset) {
    const T value = widen(input[offset]);
    const double gradient = gate.stop_one(offset, channel, value, affine, widen(grad_output[offset]));
    sums.gradient += gradient;
    sums.product += gradient * (static_cast<double>(value) - center);
  });
  return combine_lanes(sums, AddSums());
}

// A block a channel. `wide` holds the derivatives of channels in double.
template <class Scalar, class T = accumulate_t<Scalar>>
__global__ void __launch_bounds__(kThreads, 1)
    finish_gradients(Layout layout, const Scalar* grad_output, const Scalar* input, Gate<Scalar> gate,
                     const GradientSums* partials, bool training, const T* weight, const double* mean,
                     const double* variance, double eps, Derivative<T>* derivatives, Derivative<double>* wide,
                     T* grad_weight, T* grad_bias) {
  const int64_t channel = blockIdx.x;
  GradientSums sums = combine_partials(layout, channel, partials, AddSums());
  if (threadIdx.x >= kWarpSize) return;
  const T center = static_cast<T>(mean[channel]);
  const double deviation = sqrt(variance[channel] + eps);
  const double scale = (weight == nullptr ? 1.0 : static_cast<double>(weight[channel])) / deviation;
  bool extreme = is_extreme<T>(mean[channel], variance[channel], scale, sums.gradient, sums.product);
  extreme = __shfl_sync(kAllLanes, static_cast<int>(extreme), 0) != 0;
  if (extreme) {
    sums = sum_wide_gradients(layout, grad_output, input, gate, channel, static_cast<double>(center));
  }
  if (threadIdx.x != 0) return;
  const double rounded = rounded_away<T>(mean[channel]);
  const double product = sums.product - rounded * sums.gradient;  // of g (x - mean)
  if (grad_weight != nullptr) grad_weight[channel] = static_cast<T>(product / deviation);
  if (grad_bias != nullptr) grad_bias[channel] = static_cast<T>(sums.gradient);
  const double share = scale / layout.elements, factor = share * product / (variance[channel] + eps);
  const double constant = share * sums.gradient - factor * rounded;
  const Derivative<double> exact = {static_cast<double>(center), scale, training ? factor : 0.0,
                                    training ? constant : 0.0};
  if (extreme) wide[channel] = exact;
  derivatives[channel] = {extreme ? static_cast<T>(HUGE_VAL) : center, static_cast<T>(exact.scale),
                          static_cast<T>(exact.factor), static_cast<T>(exact.constant)};
}

// The elements of a thread some of whose channels are in double.
template <class Scalar, int kPack, class T = accumulate_t<Scalar>>
__device__ void differentiate_wide(const Share<kPack>& share, const Scalar* grad_output, const Scalar* input,
                                   const Gate<Scalar>& gate, const Affine<T> (&affine)[kPack],
                                   const Derivative<T> (&derivative)[kPack], const Derivative<double>* wide,
                                   Scalar* grad_input, Scalar* grad_residual) {
  share.for_each([&](int64_t offset) {
    for (int e = 0; e < kPack; ++e) {
      const T value = widen(input[offset + e]);
      const T gradient = gate.stop_one(offset + e, share.channel(e), value, affine[e], widen(grad_output[offset + e]));
      if (grad_residual != nullptr) grad_residual[offset + e] = narrow<Scalar>(gradient);
      if (grad_input == nullptr) continue;
      const Derivative<T>& d = derivative[e];
      const Derivative<double> exact =
          is_wide(d.center) ? wide[share.channel(e)] : Derivative<double>{d.center, d.scale, d.factor, d.constant};
      const double off = exact.factor == 0 ? 0.0 : static_cast<double>(value) - exact.center;
      grad_input[offset + e] =
          narrow<Scalar>(static_cast<T>(gradient * exact.scale - off * exact.factor - exact.constant));
    }
  });
}

template <class Scalar, int kPack>
__global__ void __launch_bounds__(kThreads, 1)
    differentiate(Layout layout, bool training, const Scalar* grad_output, const Scalar* input, Gate<Scalar> gate,
                  const Derivative<accumulate_t<Scalar>>* derivatives, const Derivative<double>* wide,
                  Scalar* grad_input, Scalar* grad_residual) {
  using T = accumulate_t<Scalar>;
  const Share<kPack> share(layout, gridDim.x - 1 - blockIdx.x);
  if (!share.exists()) return;
  Derivative<T> derivative[kPack];
  share.for_places(derivative, [&](int64_t channel) { return derivatives[channel]; });
  Affine<T> affine[kPack] = {};
  gate.take_affines(share, affine);
  bool any_wide = false;
#pragma unroll
  for (int e = 0; e < kPack; ++e) any_wide |= is_wide(derivative[e].center);
  if (any_wide) {
    return differentiate_wide(share, grad_output, input, gate, affine, derivative, wide, grad_input, grad_residual);
  }
  share.for_each([&](int64_t offset) {
    T gradients[kPack], values[kPack] = {};
    load_pack(grad_output + offset, gradients);
    if (training || gate.affines != nullptr) load_pack(input + offset, values);
    gate.stop(offset, values, affine, gradients);
    if (grad_residual != nullptr) store_pack(grad_residual + offset, gradients);
    if (grad_input == nullptr) return;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const Derivative<T>& d = derivative[e];
      gradients[e] *= d.scale;
      if (training) gradients[e] -= (values[e] - d.center) * d.factor + d.constant;
    }
    store_pack(grad_input + offset, gradients);
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// run(std::integral_constant<int, pack>(), layout): in packs where they divide the rows of the layout.
template <class Scalar, class Run>
void with_layout(const BatchNormShape& shape, Run&& run) {
  constexpr int size = Pack<Scalar>::size;
  if ((shape.channels_last ? shape.channels : shape.inner) % size == 0) {
    run(std::integral_constant<int, size>(), Layout(shape, size));
  } else {
    run(std::integral_constant<int, 1>(), Layout(shape, 1));
  }
}

template <class Scalar>
void forward_typed(const BatchNormForwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const Scalar* input = static_cast<const Scalar*>(args.input);
  const T *weight = static_cast<const T*>(args.weight), *bias = static_cast<const T*>(args.bias);
  const int64_t channels = args.shape.channels;
  Affine<T>* affines = workspace<Affine<T>>(channels);
  with_layout<Scalar>(args.shape, [&](auto pack, const Layout& layout) {
    if (args.shape.training) {
      Moments* partials = workspace<Moments>(layout.parts, channels);
      launch({layout.blocks(), kThreads, kExchangeBytes<Moments>}, find_moments<Scalar, pack()>, layout, input,
             partials);
      launch({channels, kThreads, kExchangeBytes<Moments>}, finish_moments<Scalar>, layout, input, partials, weight,
             bias, args.eps, args.mean, args.variance, affines);
    } else {
      launch({ceil_div(channels, kThreads), kThreads}, take_moments<T>, channels, weight, bias, args.eps, args.mean,
             args.variance, affines);
    }
    launch({layout.blocks(), kThreads}, normalize<Scalar, pack()>, layout, args.shape.activation, input,
           static_cast<const Scalar*>(args.residual), affines,
           WideAffine<T>{weight, bias, args.mean, args.variance, args.eps}, static_cast<Scalar*>(args.output));
  });
}

template <class Scalar>
void backward_typed(const BatchNormBackwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const Scalar* grad_output = static_cast<const Scalar*>(args.grad_output);
  const Scalar* input = static_cast<const Scalar*>(args.input);
  const T* weight = static_cast<const T*>(args.weight);
  const int64_t channels = args.shape.channels;
  Derivative<T>* derivatives = workspace<Derivative<T>>(channels);
  const T* bias = static_cast<const T*>(args.bias);
  Gate<Scalar> gate = {nullptr, nullptr, {weight, bias, args.mean, args.variance, args.eps}};
  if (args.shape.activation == Activation::relu) gate.output = static_cast<const Scalar*>(args.output);
  if (args.shape.activation == Activation::relu6) {
    Affine<T>* affines = workspace<Affine<T>>(channels);
    launch({ceil_div(channels, kThreads), kThreads}, take_moments<T>, channels, weight, bias, args.eps, args.mean,
           args.variance, affines);
    gate.affines = affines;
  }
  // Only for channels of very large numbers; double has no more range to go to.
  Derivative<double>* wide = sizeof(T) < sizeof(double) ? workspace<Derivative<double>>(channels) : nullptr;
  with_layout<Scalar>(args.shape, [&](auto pack, const Layout& layout) {
    GradientSums* partials = workspace<GradientSums>(layout.parts, channels);
    launch({layout.blocks(), kThreads, kExchangeBytes<GradientSums>}, sum_gradients<Scalar, pack()>, layout,
           grad_output, input, gate, args.mean, partials);
    launch({channels, kThreads, kExchangeBytes<GradientSums>}, finish_gradients<Scalar>, layout, grad_output, input,
           gate, partials, args.shape.training, weight, args.mean, args.variance, args.eps, derivatives, wide,
           static_cast<T*>(args.grad_weight), static_cast<T*>(args.grad_bias));
    if (args.grad_input == nullptr && args.grad_residual == nullptr) return;
    launch({layout.blocks(), kThreads}, differentiate<Scalar, pack()>, layout, args.shape.training, grad_output, input,
           gate, derivatives, wide, static_cast<Scalar*>(args.grad_input), static_cast<Scalar*>(args.grad_residual));
  });
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
