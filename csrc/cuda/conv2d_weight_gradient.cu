// The gradients of a convolution's weight, a product over all pixels, and of its bias, a sum over them (conv2d.cu).
#include "cuda/column_sums.cuh"
#include "cuda/conv2d_images.cuh"
#include "cuda/conv2d_parts.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// The gradient of the weight: rows are the output channels of a group, columns (tap, channel).
template <class Scalar>
struct WeightSink {
  Scalar* data;
  int64_t outputs, inputs;  // of a group
  int64_t strides[4];
  Divider channels, tap_columns;

  template <class T>
  __device__ __forceinline__ void operator()(int64_t group, int64_t output, int64_t column, const T (&values)[2],
                                             int count) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Division tap(column + i, channels);
      const Division row(tap.quotient, tap_columns);
      if (i >= count || tap.remainder >= inputs) continue;
      data[(group * outputs + output) * strides[0] + tap.remainder * strides[1] + row.quotient * strides[2] +
           row.remainder * strides[3]] = narrow<Scalar>(values[i]);
    }
  }
};

template <class Scalar>
void weight_gradient_typed(const Conv2dBackwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  const Images<Scalar> grad_output = output_images<Scalar>(g, args.grad_output);
  const Images<Scalar> input = input_images<Scalar>(g, args.input);
  const Patches<Scalar, false> left(grad_output, g.output_H, g.output_W, {1, 0, 1}, {1, 0, 1}, 1, 1);
  const Patches<Scalar, false> right = input_patches<Scalar, false>(g, input);
  WeightSink<Scalar> sink = {static_cast<Scalar*>(args.grad_weight),
                             g.K / g.groups,
                             g.C / g.groups,
                             {},
                             Divider(input.padded),
                             Divider(g.kernel_W)};
  for (int i = 0; i < 4; ++i) sink.strides[i] = g.grad_weight_strides[i];
  multiply(g.K / g.groups, right.length, right.pixels, g.groups, left, right, sink);
}

// Columns of the sum are [group][padded].
template <class Scalar>
struct BiasSink {
  Scalar* data;
  int64_t channels, padded;
  __device__ void operator()(int64_t column, double sum) const {
    if (column % padded >= channels) return;
    data[column / padded * channels + column % padded] = narrow<Scalar>(static_cast<accumulate_t<Scalar>>(sum));
  }
};

template <class Scalar>
void bias_gradient_typed(const Conv2dBackwardArgs& args) {
  Conv2dGeometry g = args.geometry;
  if (is_depthwise(g)) g.groups = 1;  // no zeros after every channel
  const Images<Scalar> grad_output = output_images<Scalar>(g, args.grad_output);
  const int64_t pixels = g.output_H * g.output_W;
  sum_columns(Columns<Scalar>{grad_output.data, g.N * pixels, grad_output.pixel_stride(), grad_output.pixel_stride(), 1,
                              Divider(pixels > 0 ? pixels : 1), grad_output.image_stride},
              BiasSink<Scalar>{static_cast<Scalar*>(args.grad_bias), grad_output.channels, grad_output.padded});
}

}  // namespace

void dense_weight_gradient(const Conv2dBackwardArgs& args) {
  dispatch(args.dtype, [&](auto* type) { weight_gradient_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

void bias_gradient(const Conv2dBackwardArgs& args) {
  dispatch(args.dtype, [&](auto* type) { bias_gradient_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace dlkernels::DLKERNELS_ISA
