// Convolution with one channel per group. There is no product: lanes are channels, and each tap is a multiply-add. The
// window of a block of pixels is staged pixel-major (window.h); the gradient of the weight keeps a sum per tap in
// registers over the pixels of a chunk.
#include "conv2d_parts.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int64_t kDepthwisePixels = 512;
constexpr int64_t kDepthwiseChannels = 64;

// out[p] = bias + sum over taps of source[p + tap] * weight[tap], for Pixels pixels and one vector of channels.
template <int Pixels, class T>
DLKERNELS_INLINE void apply_taps(const T* source, int64_t source_stride, const int64_t* tap_offsets, int64_t taps,
                                 const T* weight, int64_t weight_stride, Vec<T> bias, int64_t lanes, T* out,
                                 int64_t out_stride) {
  Vec<T> sum[Pixels];
  for (int p = 0; p < Pixels; ++p) sum[p] = Vec<T>::zero();
  for (int64_t t = 0; t < taps; ++t) {
    const Vec<T> w = load_lanes(weight + t * weight_stride, lanes);
    const T* shifted = source + tap_offsets[t];
    for (int p = 0; p < Pixels; ++p) sum[p] = fma(load_lanes(shifted + p * source_stride, lanes), w, sum[p]);
  }
  for (int p = 0; p < Pixels; ++p) store_lanes(out + p * out_stride, sum[p] + bias, lanes);
}

template <class Scalar>
class DepthwiseConvolution {
  using T = accumulate_t<Scalar>;
  static constexpr int64_t kPixels = 6;  // outputs computed together; they share the loads of the weights

 public:
  explicit DepthwiseConvolution(const Convolution<Scalar>& convolution)
      : conv_(convolution),
        grid_(convolution.grid),
        blocks_(conv_.input.N, grid_.rows, grid_.columns, kDepthwisePixels),
        channels_(channel_block<T>(conv_.input.C, kDepthwiseChannels, grid_.window_pixels(blocks_))) {
    blocks_.limit_images(images_that_fit<T>(channels_, grid_.window_pixels(blocks_)));
  }

  void run() {
    const int64_t C = conv_.input.C, taps = grid_.tap_count;
    Scratch<T> packed(taps * C);  // [tap][channel]
    for (int64_t t = 0; t < taps; ++t) {
      const Scalar* source = conv_.weights.data + grid_.taps[t].weight_offset;
      for (int64_t c = 0; c < C; ++c) packed[t * C + c] = load_one(source + c * conv_.weights.group_stride);
    }
    const int64_t channel_blocks = ceil_div(C, channels_), tasks = blocks_.count() * channel_blocks;
    const double work = 1.0 * conv_.input.N * grid_.rows * grid_.columns * C * taps;
    parallel_for(tasks, work < kSerialWork / 4 ? tasks : 1, [&](int64_t task) {
      const int64_t c = task % channel_blocks * channels_;
      run_block(blocks_.at(task / channel_blocks), c, min_of(channels_, C - c), packed.data() + c);
    });
  }

 private:
  void run_block(const Block& block, int64_t channel, int64_t channels, const T* weight) const {
    const Window window = grid_.input_window(block), output_window = grid_.output_window(block);
    const int64_t taps = grid_.tap_count, C = conv_.input.C;
    // Channels-last results of the type of the sums go straight to the output.
    constexpr bool same_type = sizeof(T) == sizeof(Scalar);
    const bool direct = same_type && conv_.output.channels_last;
    Scratch<T> staged(block.images * window.rows * window.columns * channels);
    Scratch<T> results(direct ? 0 : block.pixels() * channels), bias(channels);
    Scratch<int64_t> offsets(max_of(taps, 1));
    for (int64_t t = 0; t < taps; ++t) offsets[t] = grid_.tap_pixel(grid_.taps[t], window) * channels;
    if (taps > 0) stage_block(conv_.input, block, channel, channels, window, staged.data());
    fill(bias.data(), T(0), channels);
    if (conv_.bias != nullptr) widen_row(conv_.bias + channel, channels, bias.data());
    bool finite = true;
    for (int64_t t = 0; t < taps; ++t) finite = finite && all_finite(weight + t * C, channels);

    for (int64_t row = 0; row < block.images * block.rows; ++row) {
      const int64_t n = row / block.rows, i = row % block.rows;
      const T* source = staged.data() + (n * window.rows + i * grid_.pixel_step_y()) * window.columns * channels;
      T* out = results.data() + row * block.columns * channels;
      int64_t out_stride = channels;
      if constexpr (same_type) {
        if (direct) {
          out = conv_.output.at(block.image + n, channel, output_window.y + i * output_window.step_y, output_window.x);
          out_stride = output_window.step_x * C;
        }
      }
      if (finite) {
        run_row(block.columns, channels, source, offsets.data(), weight, bias.data(), out, out_stride);
      } else {
        run_row_inside(block, row * block.columns, channels, source, offsets.data(), weight, bias.data(), out,
                       out_stride);
      }
    }
    if (!direct) unstage_block(conv_.output, block, channel, channels, output_window, results.data());
  }

  void run_row(int64_t columns, int64_t channels, const T* source, const int64_t* offsets, const T* weight,
               const T* bias, T* out, int64_t out_stride) const {
    const int64_t taps = grid_.tap_count, C = conv_.input.C, step = grid_.pixel_step_x() * channels;
    constexpr int64_t size = Vec<T>::size;
    int64_t j = 0;
    for (; j + kPixels <= columns; j += kPixels) {
      int64_t c = 0;
      for (; c + size <= channels; c += size) {
        apply_taps<kPixels>(source + j * step + c, step, offsets, taps, weight + c, C, load(bias + c), size,
                            out + j * out_stride + c, out_stride);
      }
      if (c < channels) {
        apply_taps<kPixels>(source + j * step + c, step, offsets, taps, weight + c, C, load(bias + c, channels - c),
                            channels - c, out + j * out_stride + c, out_stride);
      }
    }
    for (; j < columns; ++j) {
      for (int64_t c = 0; c < channels; c += size) {
        const int64_t lanes = min_of(size, channels - c);
        apply_taps<1>(source + j * step + c, step, offsets, taps, weight + c, C, load_lanes(bias + c, lanes), lanes,
                      out + j * out_stride + c, out_stride);
      }
    }
  }

  // The same with the taps that lie inside the image alone.
  void run_row_inside(const Block& block, int64_t first_pixel, int64_t channels, const T* source,
                      const int64_t* offsets, const T* weight, const T* bias, T* out, int64_t out_stride) const {
    const int64_t C = conv_.input.C, step = grid_.pixel_step_x() * channels;
    for (int64_t j = 0; j < block.columns; ++j) {
      __builtin_memcpy(out + j * out_stride, bias, static_cast<size_t>(channels) * sizeof(T));
      for (int64_t t = 0; t < grid_.tap_count; ++t) {
        if (!grid_.is_inside(grid_.taps[t], block, first_pixel + j, conv_.input.H, conv_.input.W)) continue;
        for (int64_t c = 0; c < channels; c += Vec<T>::size) {
          const int64_t lanes = min_of(Vec<T>::size, channels - c);
          T* sum = out + j * out_stride + c;
          apply_taps<1>(source + j * step + c, step, offsets + t, 1, weight + t * C + c, C, load_lanes(sum, lanes),
                        lanes, sum, out_stride);
        }
      }
    }
  }

  const Convolution<Scalar>& conv_;
  const Grid& grid_;
  Blocks blocks_;
  int64_t channels_;
};

// ---- gradient of the weight -----------------------------------------------------------------------------------------

// sums[t][lane] += sum over pixels of gradient[pixel] * window[place + tap t], for Taps taps and one vector of
// channels.
template <int Taps, class T>
void add_pixels(int64_t pixels, const T* gradient, const T* staged, const int64_t* places, int64_t channels,
                const int64_t* tap_offsets, int64_t lanes, T* sums, int64_t sums_stride) {
  Vec<T> sum[Taps];
  for (int t = 0; t < Taps; ++t) sum[t] = Vec<T>::zero();
  for (int64_t p = 0; p < pixels; ++p) {
    const Vec<T> g = load_lanes(gradient + p * channels, lanes);
    const T* pixel = staged + places[p] * channels;
    for (int t = 0; t < Taps; ++t) sum[t] = fma(g, load_lanes(pixel + tap_offsets[t], lanes), sum[t]);
  }
  for (int t = 0; t < Taps; ++t) {
    T* out = sums + t * sums_stride;
    store_lanes(out, load_lanes(out, lanes) + sum[t], lanes);
  }
}

template <class Scalar>
class DepthwiseWeightGradient {
  using T = accumulate_t<Scalar>;

 public:
  DepthwiseWeightGradient(const Conv2dGeometry& g, const Grid& grid, const Scalar* input, const Scalar* grad_output)
      : g_(g),
        grid_(grid),
        input_(input_images(g, input)),
        grad_output_(output_images(g, grad_output)),
        chunks_(g.N, g.output_H, g.output_W, kDepthwisePixels),
        channels_(channel_block<T>(g.C, kDepthwiseChannels, grid.window_pixels(chunks_))),
        channel_blocks_(ceil_div(g.C, channels_)) {
    chunks_.limit_images(images_that_fit<T>(channels_, grid.window_pixels(chunks_)));
    parts_ = part_count(chunks_.count(), channel_blocks_, grid.tap_count * g.C * static_cast<int64_t>(sizeof(T)));
  }

  void run(Scalar* grad_weight) {
    const int64_t taps = grid_.tap_count, C = g_.C;
    Scratch<T> partial(parts_ * taps * C);  // [part][tap][channel]
    const double work = 1.0 * g_.N * g_.output_H * g_.output_W * C * taps;
    const int64_t tasks = parts_ * channel_blocks_;
    parallel_for(tasks, work < kSerialWork / 4 ? tasks : 1, [&](int64_t task) {
      run_part(task / channel_blocks_, task % channel_blocks_ * channels_,
               partial.data() + task / channel_blocks_ * taps * C);
    });
    for (int64_t part = 1; part < parts_; ++part) add_to(partial.data(), partial.data() + part * taps * C, taps * C);
    const int64_t* strides = g_.grad_weight_strides;
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t c = 0; c < C; ++c) {
        store_one(grad_weight + c * strides[0] + t / g_.kernel_W * strides[2] + t % g_.kernel_W * strides[3],
                  partial[t * C + c]);
      }
    }
  }

 private:
  void run_part(int64_t part, int64_t channel, T* partial) const {
    const int64_t channels = min_of(channels_, g_.C - channel), taps = grid_.tap_count;
    const int64_t first = part * chunks_.count() / parts_, end = (part + 1) * chunks_.count() / parts_;
    Scratch<T> staged(chunks_.images * grid_.window_pixels(chunks_) * channels), gradient(chunks_.pixels() * channels);
    Scratch<int64_t> places(chunks_.pixels()), offsets(taps);
    for (int64_t t = 0; t < taps; ++t) fill(partial + t * g_.C + channel, T(0), channels);
    for (int64_t chunk = first; chunk < end; ++chunk) {
      const Block block = chunks_.at(chunk);
      const Window window = grid_.input_window(block);
      stage_block(input_, block, channel, channels, window, staged.data());
      stage_block(grad_output_, block, channel, channels, grid_.output_window(block), gradient.data());
      grid_.place_pixels(block, places.data());
      for (int64_t t = 0; t < taps; ++t) offsets[t] = grid_.tap_pixel(grid_.taps[t], window) * channels;
      for (int64_t c = 0; c < channels; c += Vec<T>::size) {
        add_vector(block.pixels(), channels, min_of(Vec<T>::size, channels - c), gradient.data() + c, staged.data() + c,
                   places.data(), offsets.data(), partial + channel + c);
      }
    }
  }

  void add_vector(int64_t pixels, int64_t channels, int64_t lanes, const T* gradient, const T* staged,
                  const int64_t* places, const int64_t* offsets, T* partial) const {
    const int64_t taps = grid_.tap_count, C = g_.C;
    int64_t t = 0;
    for (; t + 9 <= taps; t += 9) {
      if (lanes == Vec<T>::size) {
        add_pixels<9>(pixels, gradient, staged, places, channels, offsets + t, Vec<T>::size, partial + t * C, C);
      } else {
        add_pixels<9>(pixels, gradient, staged, places, channels, offsets + t, lanes, partial + t * C, C);
      }
    }
    for (; t + 4 <= taps; t += 4) {
      add_pixels<4>(pixels, gradient, staged, places, channels, offsets + t, lanes, partial + t * C, C);
    }
    for (; t < taps; ++t) {
      add_pixels<1>(pixels, gradient, staged, places, channels, offsets + t, lanes, partial + t * C, C);
    }
  }

  const Conv2dGeometry& g_;
  const Grid& grid_;
  Images<const Scalar> input_, grad_output_;
  Blocks chunks_;
  int64_t channels_, channel_blocks_, parts_;
};

}  // namespace

template <class Scalar>
void convolve_depthwise(const Convolution<Scalar>& convolution) {
  DepthwiseConvolution<Scalar>(convolution).run();
}

template <class Scalar>
void depthwise_weight_gradient(const Conv2dBackwardArgs& args) {
  Scratch<Tap> taps(args.geometry.kernel_H * args.geometry.kernel_W);
  const Grid grid = forward_grid(args.geometry, taps.data());
  DepthwiseWeightGradient<Scalar>(args.geometry, grid, static_cast<const Scalar*>(args.input),
                                  static_cast<const Scalar*>(args.grad_output))
      .run(static_cast<Scalar*>(args.grad_weight));
}

template void convolve_depthwise(const Convolution<float>&);
template void convolve_depthwise(const Convolution<double>&);
template void convolve_depthwise(const Convolution<bfloat16>&);
template void convolve_depthwise(const Convolution<float16>&);
template void depthwise_weight_gradient<float>(const Conv2dBackwardArgs&);
template void depthwise_weight_gradient<double>(const Conv2dBackwardArgs&);
template void depthwise_weight_gradient<bfloat16>(const Conv2dBackwardArgs&);
template void depthwise_weight_gradient<float16>(const Conv2dBackwardArgs&);

}  // namespace dlkernels::DLKERNELS_ISA
