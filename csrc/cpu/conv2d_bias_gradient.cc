// The gradient of a convolution's bias: grad_output summed over images and pixels, in runs of a fixed length.
#include "conv2d_parts.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int64_t kBiasPixels = 4096;  // pixels of an image summed in one run

// The sum of a run of pixels: pixel p goes to partial sum p % lanes, and these are added in a fixed tree. Written once
// with pixels along the lanes and once with channels along them; the order of every sum is the same.
template <class Scalar, class T = accumulate_t<Scalar>>
T sum_along_lanes(const Scalar* source, int64_t pixels) {
  constexpr int64_t lanes = Vec<T>::size;
  Vec<T> sum = Vec<T>::zero();
  int64_t p = 0;
  for (; p + lanes <= pixels; p += lanes) sum += load(source + p);
  if (p < pixels) sum += load(source + p, pixels - p);
  T partial[lanes];
  store(partial, sum);
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) partial[i] += partial[i + half];
  }
  return partial[0];
}
template <class Scalar, class T = accumulate_t<Scalar>>
Vec<T> sum_across_rows(const Scalar* source, int64_t pixels, int64_t stride, int64_t count) {
  constexpr int64_t lanes = Vec<T>::size;
  Vec<T> partial[lanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < lanes; ++i) partial[i] = Vec<T>::zero();
  int64_t p = 0;
  for (; p + lanes <= pixels; p += lanes) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes; ++i) {
      const Scalar* pixel = source + (p + i) * stride;
      partial[i] += count == lanes ? load(pixel) : load(pixel, count);
    }
  }
  for (int64_t i = 0; p + i < pixels; ++i) partial[i] += load(source + (p + i) * stride, count);
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) partial[i] += partial[i + half];
  }
  return partial[0];
}

}  // namespace

template <class Scalar>
void bias_gradient(const Conv2dBackwardArgs& args) {
  using T = accumulate_t<Scalar>;
  constexpr int64_t lanes = Vec<T>::size;
  const Conv2dGeometry& g = args.geometry;
  const Images<const Scalar> gradient = output_images(g, static_cast<const Scalar*>(args.grad_output));
  const int64_t pixels = g.output_H * g.output_W, runs = ceil_div(pixels, kBiasPixels);
  Scratch<T> partial(g.N, runs, g.K);  // [image][run][channel]
  const int64_t tasks = g.N * runs;
  parallel_for(tasks, 1.0 * g.N * pixels * g.K < kSerialWork / 4 ? tasks : 1, [&](int64_t task) {
    const int64_t n = task / runs, first = task % runs * kBiasPixels, count = min_of(kBiasPixels, pixels - first);
    T* sums = partial.data() + task * g.K;
    if (g.channels_last) {
      for (int64_t k = 0; k < g.K; k += lanes) {
        const int64_t channels = min_of(lanes, g.K - k);
        store(sums + k, sum_across_rows(gradient.at(n, k, 0, 0) + first * g.K, count, g.K, channels), channels);
      }
    } else {
      for (int64_t k = 0; k < g.K; ++k) sums[k] = sum_along_lanes(gradient.at(n, k, 0, 0) + first, count);
    }
  });
  for (int64_t k = 0; k < g.K; ++k) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += partial[task * g.K + k];
    store_one(static_cast<Scalar*>(args.grad_bias) + k, static_cast<T>(sum));
  }
}

template void bias_gradient<float>(const Conv2dBackwardArgs&);
template void bias_gradient<double>(const Conv2dBackwardArgs&);
template void bias_gradient<bfloat16>(const Conv2dBackwardArgs&);
template void bias_gradient<float16>(const Conv2dBackwardArgs&);

}  // namespace dlkernels::DLKERNELS_ISA
