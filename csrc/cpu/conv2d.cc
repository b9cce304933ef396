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
// A task takes a block of output pixels. It stages the input window of the block, pixel-major and zero-padded
// (window.h), for up to kChannelBlock channels at a time. Then row pointers do what an im2col copy would: the depth of
// a product is (tap, channel), the row of a pixel at tap t is the pixel's place in the window plus an offset that all
// pixels share. Runs of up to kDepthBlock sums stay in the registers of multiply_tile; the weights stand packed in
// panels. The window (a few hundred KB) and a panel's run (64 KB) live in the second-level cache, the sums of the block
// beside them.
//
// The gradient of the weight is a product whose depth is the pixels: the same windows, against grad_output transposed.
// Its chunks of pixels and the groups in which their sums are added follow from the shapes alone.
//
// With one channel per group there is no product: lanes are channels, and each tap is a multiply-add (depthwise).
//
// 2 N K output_H output_W C/groups kernel_H kernel_W operations each way. Both layouts share every sum.
#include "conv2d.h"

#include "gemm.h"
#include "taps.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int64_t kChannelBlock = 128;
constexpr int64_t kPixelBlock = 192;          // output pixels of a task
constexpr int64_t kOutputChannelBlock = 256;  // output channels of a task
constexpr int64_t kGradientPixels = 256;      // pixels of a run of sums in the gradient of the weight
constexpr int64_t kDepthwisePixels = 512;
constexpr int64_t kDepthwiseChannels = 64;
constexpr int64_t kWindowBytes = 2 << 20;    // fewer channels at a time when a window would be larger (wide dilations)
constexpr int64_t kPartialBytes = 32 << 20;  // bound of the gradient of the weight's partial sums
constexpr int64_t kFewChannels = 8;          // input channels up to which they make poor lanes
constexpr int64_t kWantedTasks = 32;
constexpr double kSerialWork = 1 << 18;  // multiply-adds below which threads cost more than they give

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
template <class T>
int64_t images_that_fit(int64_t channels, int64_t window_pixels) {
  return kWindowBytes / (channels * window_pixels * static_cast<int64_t>(sizeof(T)));
}

// ---- dense: products over (tap, channel)
// -----------------------------------------------------------------------------

template <class Scalar>
class DenseConvolution {
  using T = accumulate_t<Scalar>;
  static constexpr int64_t kPanel = kTileColumns<T>;

 public:
  explicit DenseConvolution(const Convolution<Scalar>& convolution)
      : conv_(convolution),
        grid_(convolution.grid),
        in_channels_(convolution.input.C / convolution.groups),
        out_channels_(convolution.output.C / convolution.groups),
        panels_(ceil_div(out_channels_, kPanel)),
        depth_(in_channels_ * grid_.tap_count),
        blocks_(conv_.input.N, grid_.rows, grid_.columns, kPixelBlock) {
    // The channel block is settled before blocks are made smaller for balance, so that it depends on shapes only.
    channel_block_ = channel_block<T>(in_channels_, grid_.tap_count == 1 ? kDepthBlock : kChannelBlock,
                                      grid_.window_pixels(blocks_));
    out_block_ = min_of(out_channels_, kOutputChannelBlock);
    for (int64_t pixels = kPixelBlock; tasks() < kWantedTasks / 2; pixels /= 2) {
      if (out_block_ > kPanel) {
        out_block_ = round_up(ceil_div(out_block_, 2), kPanel);
        continue;
      }
      if (pixels <= 4 * kTileRows) break;
      blocks_ = Blocks(conv_.input.N, grid_.rows, grid_.columns, pixels / 2);
    }
    blocks_.limit_images(images_that_fit<T>(channel_block_, grid_.window_pixels(blocks_)));
  }

  void run() {
    Scratch<T> packed(conv_.groups * panels_ * depth_ * kPanel);
    packed_ = packed.data();
    pack_weights();
    const double work = 1.0 * conv_.input.N * grid_.rows * grid_.columns * conv_.output.C * depth_;
    parallel_for(tasks(), work < kSerialWork ? tasks() : 1, [&](int64_t task) { run_task(task); });
  }

 private:
  int64_t out_blocks() const { return ceil_div(out_channels_, out_block_); }
  int64_t tasks() const { return blocks_.count() * out_blocks() * conv_.groups; }
  // Packed rows of panel `panel` of group g: for each block of channels, tap by tap, channel by channel.
  T* packed_panel(int64_t g, int64_t panel) const { return packed_ + (g * panels_ + panel) * depth_ * kPanel; }

  void pack_weights() {
    const int64_t channel_blocks = ceil_div(in_channels_, channel_block_);
    const int64_t tasks = conv_.groups * panels_ * channel_blocks;
    const double work = 1.0 * conv_.groups * depth_ * out_channels_;
    parallel_for(tasks, work < kSerialWork / 16 ? tasks : 1, [&](int64_t task) {
      const int64_t c = task % channel_blocks * channel_block_;
      const int64_t panel = task / channel_blocks % panels_, g = task / channel_blocks / panels_;
      const int64_t channels = min_of(channel_block_, in_channels_ - c);
      const int64_t columns = min_of(kPanel, out_channels_ - panel * kPanel);
      T* destination = packed_panel(g, panel) + c * grid_.tap_count * kPanel;
      const Weights<Scalar>& w = conv_.weights;
      const Scalar* source = w.data + g * w.group_stride + c * w.in_stride + panel * kPanel * w.out_stride;
      for (int64_t t = 0; t < grid_.tap_count; ++t) {
        pack_rows(Matrix<Scalar>{source + grid_.taps[t].weight_offset, w.in_stride, w.out_stride}, channels, columns,
                  destination + t * channels * kPanel, kPanel);
        for (int64_t c2 = 0; c2 < channels; ++c2) {
          if (!all_finite(destination + (t * channels + c2) * kPanel, columns)) {
            __atomic_store_n(&finite_weights_, false, __ATOMIC_RELAXED);
          }
        }
      }
    });
  }

  void run_task(int64_t task) const {
    const Block block = blocks_.at(task / out_blocks() / conv_.groups);
    const int64_t g = task / out_blocks() % conv_.groups;
    const int64_t out_channel = task % out_blocks() * out_block_;
    const int64_t out_channels = min_of(out_block_, out_channels_ - out_channel);
    const Window window = grid_.input_window(block);
    const int64_t first_out = g * out_channels_ + out_channel;
    const bool direct = is_one_matrix(block);
    Scratch<T> staged(block.images * window.rows * window.columns * channel_block_);
    Scratch<T> results(direct ? 0 : block.pixels() * out_channels);
    Scratch<int64_t> places(block.pixels());
    grid_.place_pixels(block, places.data());
    T* sums = results.data();
    int64_t stride = out_channels;
    if constexpr (sizeof(T) == sizeof(Scalar)) {
      if (direct) {
        sums = conv_.output.at(block.image, first_out, grid_.output_y + block.row, grid_.output_x + block.column);
        stride = conv_.output.C;
      }
    }
    start_sums(block.pixels(), first_out, out_channels, sums, stride);
    for (int64_t c = 0; c < in_channels_ && depth_ > 0; c += channel_block_) {
      const int64_t channels = min_of(channel_block_, in_channels_ - c);
      stage_block(conv_.input, block, g * in_channels_ + c, channels, window, staged.data());
      for (int64_t j = 0; j < out_channels; j += kPanel) {
        const T* panel = packed_panel(g, (out_channel + j) / kPanel) + c * grid_.tap_count * kPanel;
        multiply_panel(block, places.data(), window, channels, staged.data(), panel, min_of(kPanel, out_channels - j),
                       sums + j, stride, c > 0 || conv_.bias != nullptr);
      }
    }
    if (!direct) unstage_block(conv_.output, block, first_out, out_channels, grid_.output_window(block), sums);
  }

  // Whether the block's outputs are a matrix [pixel][channel] in place, with a constant distance between pixels.
  bool is_one_matrix(const Block& block) const {
    return sizeof(T) == sizeof(Scalar) && conv_.output.channels_last && grid_.output_step_y == 1 &&
           grid_.output_step_x == 1 && (block.columns == conv_.output.W || (block.rows == 1 && block.images == 1));
  }

  // The bias; without one, nothing where the products write first.
  void start_sums(int64_t pixels, int64_t first_out, int64_t out_channels, T* sums, int64_t stride) const {
    if (conv_.bias == nullptr && depth_ > 0) return;
    for (int64_t p = 0; p < pixels; ++p) {
      if (conv_.bias == nullptr) {
        fill(sums + p * stride, T(0), out_channels);
      } else {
        widen_row(conv_.bias + first_out, out_channels, sums + p * stride);
      }
    }
  }

  // sums[pixel][0 .. columns) (+)= all taps of `channels` channels.
  void multiply_panel(const Block& block, const int64_t* places, const Window& window, int64_t channels,
                      const T* staged, const T* panel, int64_t columns, T* sums, int64_t sums_stride,
                      bool accumulate) const {
    const int64_t pixels = block.pixels(), taps_per_run = max_of(1, kDepthBlock / channels);
    const int64_t pixels_together = finite_weights_ ? kTileRows : 1;
    Segment segments[kDepthBlock];
    for (int64_t t = 0; t < grid_.tap_count; t += taps_per_run) {
      const int64_t taps = min_of(taps_per_run, grid_.tap_count - t);
      const T* run = panel + t * channels * kPanel;
      int64_t count = 0;
      if (finite_weights_) count = segments_of(t, taps, block, -1, window, channels, segments);
      for (int64_t p = 0; p < pixels; p += pixels_together) {
        const int64_t rows = min_of(pixels_together, pixels - p);
        if (!finite_weights_) count = segments_of(t, taps, block, p, window, channels, segments);
        const T* pointers[kTileRows];
        for (int64_t r = 0; r < rows; ++r) pointers[r] = staged + places[p + r] * channels;
        multiply_tile(rows, columns, segments, count, pointers, run, kPanel, sums + p * sums_stride, sums_stride,
                      accumulate || t > 0);
      }
    }
  }

  // Where taps [first, first + taps) read; with a pixel given, those inside the image alone.
  int64_t segments_of(int64_t first, int64_t taps, const Block& block, int64_t pixel, const Window& window,
                      int64_t channels, Segment* segments) const {
    int64_t count = 0;
    for (int64_t i = 0; i < taps; ++i) {
      const Tap& tap = grid_.taps[first + i];
      if (pixel >= 0 && !grid_.is_inside(tap, block, pixel, conv_.input.H, conv_.input.W)) continue;
      const int64_t a_offset = grid_.tap_pixel(tap, window) * channels, b_offset = i * channels * kPanel;
      Segment* last = segments + count - 1;
      if (count > 0 && last->a_offset + last->depth == a_offset && last->b_offset + last->depth * kPanel == b_offset) {
        last->depth += channels;  // neighbouring taps are neighbours in the window
      } else {
        segments[count++] = {channels, a_offset, b_offset};
      }
    }
    return count;
  }

  const Convolution<Scalar>& conv_;
  const Grid& grid_;
  int64_t in_channels_, out_channels_, panels_, depth_;  // of one group
  Blocks blocks_;
  int64_t channel_block_, out_block_;
  T* packed_ = nullptr;
  bool finite_weights_ = true;
};

// ---- depthwise: lanes are channels
// -----------------------------------------------------------------------------------

template <class T>
DLKERNELS_INLINE Vec<T> load_lanes(const T* p, int64_t count) {
  return count == Vec<T>::size ? load(p) : load(p, count);
}
template <class T>
DLKERNELS_INLINE void store_lanes(T* p, Vec<T> value, int64_t count) {
  count == Vec<T>::size ? store(p, value) : store(p, value, count);
}

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

template <class Scalar>
void convolve(const Convolution<Scalar>& convolution) {
  const int64_t groups = convolution.groups;
  if (convolution.input.C == groups && convolution.output.C == groups && groups > 1) {
    DepthwiseConvolution<Scalar>(convolution).run();
  } else {
    DenseConvolution<Scalar>(convolution).run();
  }
}

// ---- forward
// -----------------------------------------------------------------------------------------------------------

template <class Scalar>
Images<Scalar> input_images(const Conv2dGeometry& g, Scalar* data) {
  return {data, g.input_image_stride, g.N, g.C, g.H, g.W, g.channels_last};
}
template <class Scalar>
Images<Scalar> output_images(const Conv2dGeometry& g, Scalar* data) {
  return {data, g.output_image_stride, g.N, g.K, g.output_H, g.output_W, g.channels_last};
}

// One tap per kernel position, in the order of the kernel.
Grid forward_grid(const Conv2dGeometry& g, Tap* taps) {
  int64_t count = 0;
  for (int64_t kh = 0; kh < g.kernel_H; ++kh) {
    for (int64_t kw = 0; kw < g.kernel_W; ++kw) {
      taps[count++] = {kh * g.dilation_H - g.padding_top, kw * g.dilation_W - g.padding_left,
                       kh * g.weight_strides[2] + kw * g.weight_strides[3]};
    }
  }
  Grid grid = {g.output_H, g.output_W, 0, 0, 1, 1, g.stride_H, g.stride_W, nullptr, 0};
  grid.set_taps(taps, count);
  return grid;
}

template <class Scalar>
void forward_of(const Conv2dForwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  Scratch<Tap> taps(g.kernel_H * g.kernel_W);
  convolve<Scalar>({input_images(g, static_cast<const Scalar*>(args.input)),
                    {static_cast<const Scalar*>(args.weight), g.K / g.groups * g.weight_strides[0], g.weight_strides[1],
                     g.weight_strides[0]},
                    static_cast<const Scalar*>(args.bias),
                    output_images(g, static_cast<Scalar*>(args.output)),
                    g.groups,
                    forward_grid(g, taps.data())});
}

// ---- gradient of the input
// -----------------------------------------------------------------------------------------------

// Input pixels (q stride + residue): kernel position kh reaches them from output row q + (residue + padding - kh
// dilation) / stride where that is whole.
Grid input_gradient_grid(const Conv2dGeometry& g, int64_t residue_y, int64_t residue_x, Tap* taps) {
  int64_t count = 0;
  for (int64_t kh = g.kernel_H - 1; kh >= 0; --kh) {
    const int64_t y = residue_y + g.padding_top - kh * g.dilation_H;
    if (y % g.stride_H != 0) continue;
    for (int64_t kw = g.kernel_W - 1; kw >= 0; --kw) {
      const int64_t x = residue_x + g.padding_left - kw * g.dilation_W;
      if (x % g.stride_W != 0) continue;
      taps[count++] = {y / g.stride_H, x / g.stride_W, kh * g.weight_strides[2] + kw * g.weight_strides[3]};
    }
  }
  Grid grid = {ceil_div(g.H - residue_y, g.stride_H),
               ceil_div(g.W - residue_x, g.stride_W),
               residue_y,
               residue_x,
               g.stride_H,
               g.stride_W,
               1,
               1,
               nullptr,
               0};
  grid.set_taps(taps, count);
  return grid;
}

template <class Scalar>
void input_gradient(const Conv2dBackwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  Scratch<Tap> taps(g.kernel_H * g.kernel_W);
  for (int64_t y = 0; y < min_of(g.stride_H, g.H); ++y) {
    for (int64_t x = 0; x < min_of(g.stride_W, g.W); ++x) {
      convolve<Scalar>({output_images(g, static_cast<const Scalar*>(args.grad_output)),
                        {static_cast<const Scalar*>(args.weight), g.K / g.groups * g.weight_strides[0],
                         g.weight_strides[0], g.weight_strides[1]},
                        nullptr,
                        {static_cast<Scalar*>(args.grad_input), g.C * g.H * g.W, g.N, g.C, g.H, g.W, g.channels_last},
                        g.groups,
                        input_gradient_grid(g, y, x, taps.data())});
    }
  }
}

// ---- gradient of the weight, dense
// -----------------------------------------------------------------------------------

// Parts that the pixel chunks are dealt to in order; each part's sums are added up apart, and the parts in order.
inline int64_t part_count(int64_t chunks, int64_t tasks_per_part, int64_t bytes_per_part) {
  const int64_t wanted = max_of(1, kWantedTasks / tasks_per_part);
  return max_of(1, min_of(min_of(chunks, wanted), kPartialBytes / max_of(1, bytes_per_part)));
}

template <class Scalar>
class DenseWeightGradient {
  using T = accumulate_t<Scalar>;

 public:
  DenseWeightGradient(const Conv2dGeometry& g, const Grid& grid, const Scalar* input, const Scalar* grad_output)
      : g_(g),
        grid_(grid),
        input_(input_images(g, input)),
        grad_output_(output_images(g, grad_output)),
        in_channels_(g.C / g.groups),
        out_channels_(g.K / g.groups),
        chunks_(g.N, g.output_H, g.output_W, kGradientPixels) {
    const bool pointwise = grid.tap_count == 1;
    in_block_ =
        channel_block<T>(in_channels_, pointwise ? 2 * kChannelBlock : kChannelBlock, grid.window_pixels(chunks_));
    chunks_.limit_images(images_that_fit<T>(in_block_, grid.window_pixels(chunks_)));
    out_block_ = balanced(out_channels_, pointwise ? 128 : 64);
    // Neighbouring kernel columns are neighbours in the window: one wider product for all of them.
    merged_ = g.kernel_W == 1 || (g.dilation_W == 1 && grid.window_step_x() == 1);
    swapped_ = merged_ && in_block_ == in_channels_ && in_channels_ <= kFewChannels && out_channels_ >= Vec<T>::size;
    in_blocks_ = ceil_div(in_channels_, in_block_);
    out_blocks_ = ceil_div(out_channels_, out_block_);
    regions_ = g.groups * in_blocks_ * out_blocks_;
    region_size_ = grid.tap_count * in_block_ * out_block_;
    parts_ = part_count(chunks_.count(), regions_, regions_ * region_size_ * static_cast<int64_t>(sizeof(T)));
  }

  void run(Scalar* grad_weight) {
    Scratch<T> partial(parts_ * regions_ * region_size_);
    const double work = 1.0 * g_.N * g_.output_H * g_.output_W * g_.K * in_channels_ * grid_.tap_count;
    const int64_t tasks = parts_ * regions_;
    parallel_for(tasks, work < kSerialWork ? tasks : 1, [&](int64_t task) {
      run_part(task / regions_, task % regions_, partial.data() + task * region_size_);
    });
    parallel_for(regions_, work < kSerialWork ? regions_ : 1, [&](int64_t region) {
      T* sum = partial.data() + region * region_size_;
      for (int64_t part = 1; part < parts_; ++part) {
        add_to(sum, partial.data() + (part * regions_ + region) * region_size_, region_size_);
      }
      write_region(region_at(region), sum, grad_weight);
    });
  }

 private:
  struct Region {
    int64_t group, in, out, in_count, out_count;  // channels within the group
  };
  Region region_at(int64_t index) const {
    const int64_t in = index % in_blocks_ * in_block_, out = index / in_blocks_ % out_blocks_ * out_block_;
    return {index / in_blocks_ / out_blocks_, in, out, min_of(in_block_, in_channels_ - in),
            min_of(out_block_, out_channels_ - out)};
  }

  // sums: [kernel_H][out][kernel_W x in] when merged, [kernel_H][kernel_W x in][out] when swapped (few input channels,
  // so that the output channels are the lanes), otherwise [kernel_H][kernel_W][out][in].
  void run_part(int64_t part, int64_t index, T* sums) const {
    const Region region = region_at(index);
    const int64_t first = part * chunks_.count() / parts_, end = (part + 1) * chunks_.count() / parts_;
    Scratch<T> staged(chunks_.images * grid_.window_pixels(chunks_) * region.in_count);
    Scratch<T> gradient(chunks_.pixels() * region.out_count);  // [out][pixel]
    fill(sums, T(0), region_size_);
    for (int64_t chunk = first; chunk < end; ++chunk) {
      const Block block = chunks_.at(chunk);
      const Window window = grid_.input_window(block);
      stage_block(input_, block, region.group * in_channels_ + region.in, region.in_count, window, staged.data());
      if (swapped_) {
        stage_block(grad_output_, block, region.group * out_channels_ + region.out, region.out_count,
                    grid_.output_window(block), gradient.data());
        add_chunk_swapped(block, window, region, staged.data(), gradient.data(), sums);
      } else {
        stage_gradient(block, region, gradient.data());
        add_chunk(block, window, region, staged.data(), gradient.data(), sums);
      }
    }
  }

  // gradient[out][pixel], pixels in the order of the block.
  void stage_gradient(const Block& block, const Region& region, T* gradient) const {
    const int64_t pixels = block.pixels(), channel = region.group * out_channels_ + region.out;
    const bool whole_rows = block.columns == g_.output_W;
    const int64_t runs = whole_rows ? 1 : block.rows, run = whole_rows ? block.rows * block.columns : block.columns;
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t i = 0; i < runs; ++i) {
        const Scalar* source = grad_output_.at(block.image + n, channel, block.row + i, block.column);
        T* destination = gradient + n * block.rows * block.columns + i * run;
        if (g_.channels_last) {
          transpose(source, g_.K, run, region.out_count, destination, pixels);
        } else {
          for (int64_t k = 0; k < region.out_count; ++k) {
            widen_row(source + k * grad_output_.channel_stride(), run, destination + k * pixels);
          }
        }
      }
    }
  }

  void add_chunk(const Block& block, const Window& window, const Region& region, const T* staged, const T* gradient,
                 T* sums) const {
    const int64_t channels = region.in_count, pixels = block.pixels();
    const int64_t row_step = grid_.pixel_step_y() * window.columns * channels;
    const int64_t column_step = grid_.pixel_step_x() * channels;
    Segment segments[kGradientPixels];
    int64_t count = 0;
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t pixel = (n * block.rows + i) * block.columns;
        const int64_t offset = n * window.rows * window.columns * channels + i * row_step;
        if (count > 0 && segments[count - 1].b_offset + segments[count - 1].depth * column_step == offset) {
          segments[count - 1].depth += block.columns;
        } else {
          segments[count++] = {block.columns, pixel, offset};
        }
      }
    }
    const int64_t products = merged_ ? 1 : g_.kernel_W, columns = merged_ ? g_.kernel_W * channels : channels;
    for (int64_t kh = 0; kh < g_.kernel_H; ++kh) {
      for (int64_t product = 0; product < products; ++product) {
        const Tap& tap = grid_.taps[kh * g_.kernel_W + product];
        const T* shifted = staged + grid_.tap_pixel(tap, window) * channels;
        T* out = sums + (kh * products + product) * region.out_count * columns;
        multiply_chunk(region.out_count, columns, segments, count, gradient, pixels, shifted, column_step, out);
      }
    }
  }

  void add_chunk_swapped(const Block& block, const Window& window, const Region& region, const T* staged,
                         const T* gradient, T* sums) const {
    const int64_t channels = region.in_count, pixels = block.pixels(), rows = g_.kernel_W * channels;
    const int64_t column_step = grid_.pixel_step_x() * channels;
    Scratch<T> patches(rows * pixels);  // [kernel_W x in][pixel]
    for (int64_t kh = 0; kh < g_.kernel_H; ++kh) {
      const T* shifted = staged + grid_.tap_pixel(grid_.taps[kh * g_.kernel_W], window) * channels;
      for (int64_t row = 0; row < block.images * block.rows; ++row) {
        const int64_t window_row = row / block.rows * window.rows + row % block.rows * grid_.pixel_step_y();
        transpose(shifted + window_row * window.columns * channels, column_step, block.columns, rows,
                  patches.data() + row * block.columns, pixels);
      }
      const Segment segment = {pixels, 0, 0};
      multiply_chunk(rows, region.out_count, &segment, 1, patches.data(), pixels, gradient, region.out_count,
                     sums + kh * rows * region.out_count);
    }
  }

  // out[row][column] += sum over the segments' pixels of left[row][pixel] * right[pixel][column].
  static void multiply_chunk(int64_t rows, int64_t columns, const Segment* segments, int64_t count, const T* left,
                             int64_t pixels, const T* right, int64_t column_step, T* out) {
    for (int64_t j = 0; j < columns; j += kTileColumns<T>) {
      for (int64_t k = 0; k < rows; k += kTileRows) {
        const int64_t tile_rows = min_of(kTileRows, rows - k);
        const T* pointers[kTileRows];
        for (int64_t r = 0; r < tile_rows; ++r) pointers[r] = left + (k + r) * pixels;
        multiply_tile(tile_rows, min_of(kTileColumns<T>, columns - j), segments, count, pointers, right + j,
                      column_step, out + k * columns + j, columns, true);
      }
    }
  }

  void write_region(const Region& region, const T* sums, Scalar* grad_weight) const {
    if (swapped_) return write_region_swapped(region, sums, grad_weight);
    const int64_t products = merged_ ? 1 : g_.kernel_W, taps_per_product = merged_ ? g_.kernel_W : 1;
    for (int64_t kh = 0; kh < g_.kernel_H; ++kh) {
      for (int64_t product = 0; product < products; ++product) {
        for (int64_t k = 0; k < region.out_count; ++k) {
          for (int64_t tap = 0; tap < taps_per_product; ++tap, sums += region.in_count) {
            const int64_t* strides = g_.grad_weight_strides;
            Scalar* out = grad_weight + (region.group * out_channels_ + region.out + k) * strides[0] +
                          region.in * strides[1] + kh * strides[2] + (product + tap) * strides[3];
            for (int64_t c = 0; c < region.in_count; ++c) store_one(out + c * strides[1], sums[c]);
          }
        }
      }
    }
  }

  void write_region_swapped(const Region& region, const T* sums, Scalar* grad_weight) const {
    const int64_t* strides = g_.grad_weight_strides;
    for (int64_t t = 0; t < grid_.tap_count; ++t) {
      for (int64_t c = 0; c < region.in_count; ++c, sums += region.out_count) {
        Scalar* out = grad_weight + (region.group * out_channels_ + region.out) * strides[0] + c * strides[1] +
                      t / g_.kernel_W * strides[2] + t % g_.kernel_W * strides[3];
        for (int64_t k = 0; k < region.out_count; ++k) store_one(out + k * strides[0], sums[k]);
      }
    }
  }

  const Conv2dGeometry& g_;
  const Grid& grid_;
  Images<const Scalar> input_, grad_output_;
  int64_t in_channels_, out_channels_;
  Blocks chunks_;
  int64_t in_block_, out_block_, in_blocks_, out_blocks_, regions_, region_size_, parts_;
  bool merged_, swapped_;
};

// ---- gradient of the weight, depthwise
// -------------------------------------------------------------------------------

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

template <class Scalar>
void weight_gradient(const Conv2dBackwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  Scratch<Tap> taps(g.kernel_H * g.kernel_W);
  const Grid grid = forward_grid(g, taps.data());
  const Scalar* input = static_cast<const Scalar*>(args.input);
  const Scalar* grad_output = static_cast<const Scalar*>(args.grad_output);
  if (g.C == g.groups && g.K == g.groups && g.groups > 1) {
    DepthwiseWeightGradient<Scalar>(g, grid, input, grad_output).run(static_cast<Scalar*>(args.grad_weight));
  } else {
    DenseWeightGradient<Scalar>(g, grid, input, grad_output).run(static_cast<Scalar*>(args.grad_weight));
  }
}

// ---- gradient of the bias
// ----------------------------------------------------------------------------------------------

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

template <class Scalar>
void bias_gradient(const Conv2dBackwardArgs& args) {
  using T = accumulate_t<Scalar>;
  constexpr int64_t lanes = Vec<T>::size;
  const Conv2dGeometry& g = args.geometry;
  const Images<const Scalar> gradient = output_images(g, static_cast<const Scalar*>(args.grad_output));
  const int64_t pixels = g.output_H * g.output_W, runs = ceil_div(pixels, kBiasPixels);
  Scratch<T> partial(g.N * runs * g.K);  // [image][run][channel]
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

// ---- table
// -------------------------------------------------------------------------------------------------------------

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
