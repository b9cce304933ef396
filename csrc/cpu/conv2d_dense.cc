// Convolution as products over (tap, channel): forward and the gradient of the input of every convolution that is not
// depthwise.
//
// A task takes a block of output pixels. It stages the input window of the block, pixel-major and zero-padded
// (window.h), for up to kChannelBlock channels at a time. Then row pointers do what an im2col copy would: the depth of
// a product is (tap, channel), the row of a pixel at tap t is the pixel's place in the window plus an offset that all
// pixels share. Runs of up to kDepthBlock sums stay in the registers of multiply_tile; the weights stand packed in
// panels, all packed ahead or, where few tasks read the same, each when it is needed. The window (a few hundred KB) and
// a panel's run (64 KB) live in the second-level cache, the sums of the block beside them.
#include "conv2d_parts.h"
#include "gemm.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int64_t kFewestPaired = 8;  // channels, below which the steps of a pair are too much of the work

// Products are taken in Factor: the type of the sums, or pairs of bfloat16 (pairs.h).
template <class Scalar, class Factor = accumulate_t<Scalar>>
class DenseConvolution {
  using T = accumulate_t<Scalar>;
  static constexpr int64_t kPanel = kTileColumns<Factor>;
  static constexpr int64_t kStep = Step<Factor>::depth;
  // With no more blocks of pixels, every task packs the weights that it needs when it needs them, once.
  static constexpr int64_t kFewBlocks = 2;

 public:
  explicit DenseConvolution(const Convolution<Scalar>& convolution)
      : conv_(convolution),
        grid_(convolution.grid),
        in_channels_(convolution.input.C / convolution.groups),
        out_channels_(convolution.output.C / convolution.groups),
        panels_(ceil_div(out_channels_, kPanel)),
        depth_(round_up(in_channels_, kStep) * grid_.tap_count),
        blocks_(conv_.input.N, grid_.rows, grid_.columns, kPixelBlock) {
    channel_block_ = round_up(channels_of_runs(conv_), kStep);
    out_block_ = min_of(out_channels_, kOutputChannelBlock);
    for (int64_t pixels = kPixelBlock; tasks() < kWantedTasks / 2; pixels /= 2) {
      if (out_block_ > kPanel) {
        out_block_ = round_up(ceil_div(out_block_, 2), kPanel);
        continue;
      }
      if (pixels <= 4 * kTileRows) break;
      blocks_ = Blocks(conv_.input.N, grid_.rows, grid_.columns, pixels / 2);
    }
    blocks_.limit_images(images_that_fit<Factor>(channel_block_, grid_.window_pixels(blocks_)));
  }

  void run() {
    const bool packs_ahead = blocks_.count() > kFewBlocks || grid_.phase_count > 1;
    Scratch<Factor> packed(packs_ahead ? conv_.groups : 0, panels_, depth_, kPanel);
    packed_ = packed.data();
    const auto input = ImagesInLayout<Scalar>::of(conv_.input, true, out_blocks() > 1);
    input_ = input.images;
    if (packs_ahead) pack_weights();
    const double work = 1.0 * conv_.input.N * grid_.rows * grid_.columns * conv_.output.C * depth_;
    parallel_for(tasks(), work < kSerialWork ? tasks() : 1, [&](int64_t task) { run_task(task); });
  }

 private:
  int64_t out_blocks() const { return ceil_div(out_channels_, out_block_); }
  int64_t tasks() const { return blocks_.count() * out_blocks() * conv_.groups; }
  // Packed rows of panel `panel` of group g: for each block of channels, tap by tap, channel by channel.
  Factor* packed_panel(int64_t g, int64_t panel) const { return packed_ + (g * panels_ + panel) * depth_ * kPanel; }

  // A panel's weights of the block of channels from c on; false where one is not finite.
  bool pack_panel_of(int64_t g, int64_t panel, int64_t c, Factor* destination) const {
    const int64_t channels = min_of(channel_block_, in_channels_ - c), rows = ceil_div(channels, kStep);
    const int64_t columns = min_of(kPanel, out_channels_ - panel * kPanel);
    const Weights<Scalar>& w = conv_.weights;
    const Matrix<Scalar> source = {w.data + g * w.group_stride + c * w.in_stride + panel * kPanel * w.out_stride,
                                   w.in_stride, w.out_stride};
    if constexpr (kStep == 1) {
      pack_taps(grid_, w.innermost_taps, source, channels, columns, destination, kPanel, channels * kPanel);
    } else if (w.innermost_taps == grid_.tap_count && grid_.tap_count > 1) {
      Scratch<Factor> raw(grid_.tap_count, channels, kPanel);
      pack_taps(grid_, w.innermost_taps, source, channels, columns, raw.data(), kPanel, channels * kPanel);
      for (int64_t t = 0; t < grid_.tap_count; ++t) {
        pack_pairs({raw.data() + t * channels * kPanel, kPanel, 1}, channels, columns,
                   destination + t * rows * kStep * kPanel, kStep * kPanel);
      }
    } else {
      for (int64_t t = 0; t < grid_.tap_count; ++t) {
        pack_pairs({source.data + grid_.taps[t].weight_offset, source.row_stride, source.column_stride}, channels,
                   columns, destination + t * rows * kStep * kPanel, kStep * kPanel);
      }
    }
    bool finite = true;
    for (int64_t row = 0; row < grid_.tap_count * rows; ++row, destination += kStep * kPanel) {
      finite &= all_finite(destination, kStep * columns);
    }
    return finite;
  }

  void pack_weights() {
    const int64_t channel_blocks = ceil_div(in_channels_, channel_block_);
    const int64_t tasks = conv_.groups * panels_ * channel_blocks;
    const double work = 1.0 * conv_.groups * depth_ * out_channels_;
    parallel_for(tasks, work < kSerialWork / 16 ? tasks : 1, [&](int64_t task) {
      const int64_t c = task % channel_blocks * channel_block_;
      const int64_t panel = task / channel_blocks % panels_, g = task / channel_blocks / panels_;
      if (!pack_panel_of(g, panel, c, packed_panel(g, panel) + c * grid_.tap_count * kPanel)) {
        __atomic_store_n(&finite_weights_, false, __ATOMIC_RELAXED);
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
    const Factor* pixels = pixels_in_place(block, g, window);
    Scratch<Factor> staged(pixels != nullptr ? 0 : block.images, window.rows, window.columns, channel_block_);
    Scratch<T> results(is_one_matrix(conv_, block) ? 0 : block.pixels(), out_channels);
    Scratch<Factor> own_panel(packed_ == nullptr ? channel_block_ : 0, grid_.tap_count, kPanel);
    Scratch<int64_t> places(block.pixels());
    bool is_staged = pixels != nullptr;
    if (!is_staged) pixels = staged.data();
    for (int64_t index = 0; index < grid_.phase_count; ++index) {
      const Phase& phase = grid_.phases[index];
      const Block part = grid_.phase_block(block, phase);
      if (part.pixels() == 0) continue;
      const bool direct = is_one_matrix(conv_, part);
      const auto [sums, stride] = place_sums(conv_, part, phase, first_out, out_channels, results.data());
      grid_.place_pixels(part, window, places.data());
      // Without a bias, nothing where products write first.
      if (conv_.bias != nullptr || in_channels_ * phase.tap_count == 0) {
        start_sums(conv_, part.pixels(), first_out, out_channels, sums, stride);
      }
      for (int64_t c = 0; c < in_channels_ && phase.tap_count > 0; c += channel_block_) {
        const int64_t channels = min_of(channel_block_, in_channels_ - c);
        if (!is_staged) stage_block(input_, block, g * in_channels_ + c, channels, window, staged.data());
        is_staged |= channel_block_ == in_channels_;
        for (int64_t j = 0; j < out_channels; j += kPanel) {
          const int64_t index_of_panel = (out_channel + j) / kPanel;
          const Factor* panel = own_panel.data();
          bool finite_weights = finite_weights_;
          if (packed_ == nullptr) {
            finite_weights = pack_panel_of(g, index_of_panel, c, own_panel.data());
          } else {
            panel = packed_panel(g, index_of_panel) + c * grid_.tap_count * kPanel;
          }
          multiply_panel(part, phase, places.data(), window, channels, pixels, panel, finite_weights,
                         min_of(kPanel, out_channels - j), sums + j, stride, c > 0 || conv_.bias != nullptr);
        }
      }
      if (!direct) {
        unstage_block(conv_.output, part, first_out, out_channels, grid_.output_window(part, phase), sums);
      }
    }
  }

  // The block's window where the images hold it as it would be staged, or null.
  const Factor* pixels_in_place(const Block& block, int64_t g, const Window& window) const {
    if constexpr (std::is_same_v<Factor, Scalar>) {
      const bool whole_images = window.rows == input_.H && input_.image_stride == input_.C * input_.H * input_.W;
      if (input_.channel_stride() == 1 && input_.C == channel_block_ && (block.images == 1 || whole_images) &&
          detail::is_one_run(input_, window)) {
        return input_.at(block.image, g * in_channels_, window.y, 0);
      }
    }
    return nullptr;
  }

  // sums[pixel][0 .. columns) (+)= all taps of the phase, of `channels` channels.
  void multiply_panel(const Block& block, const Phase& phase, const int64_t* places, const Window& window,
                      int64_t channels, const Factor* staged, const Factor* panel, bool finite_weights, int64_t columns,
                      T* sums, int64_t sums_stride, bool accumulate) const {
    const int64_t pixels = block.pixels(), taps_per_run = max_of(1, kDepthBlock / channels);
    const int64_t tap_rows = round_up(channels, kStep);
    const int64_t pixels_together = finite_weights ? kTileRows : 1;
    Segment segments[kDepthBlock];
    for (int64_t t = 0; t < phase.tap_count; t += taps_per_run) {
      const int64_t first = phase.first_tap + t, taps = min_of(taps_per_run, phase.tap_count - t);
      const Factor* run = panel + first * tap_rows * kPanel;
      int64_t count = 0;
      if (finite_weights) count = segments_of(first, taps, block, -1, window, channels, segments);
      for (int64_t p = 0; p < pixels; p += pixels_together) {
        const int64_t rows = min_of(pixels_together, pixels - p);
        if (!finite_weights) count = segments_of(first, taps, block, p, window, channels, segments);
        const Factor* pointers[kTileRows];
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
      const int64_t a_offset = grid_.tap_pixel(tap, window) * channels;
      const int64_t b_offset = i * round_up(channels, kStep) * kPanel;
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
  Images<const Scalar> input_ = {};
  int64_t in_channels_, out_channels_, panels_, depth_;  // of one group
  Blocks blocks_;
  int64_t channel_block_, out_block_;
  Factor* packed_ = nullptr;
  bool finite_weights_ = true;
};

}  // namespace

template <class Scalar>
void convolve_dense(const Convolution<Scalar>& convolution) {
  DenseConvolution<Scalar>(convolution).run();
}

template <class Scalar>
bool convolve_in_pairs(const Convolution<Scalar>& convolution) {
  using Factor = factor_t<Scalar>;
  if constexpr (std::is_same_v<Factor, accumulate_t<Scalar>>) {
    return false;
  } else {
    const int64_t in_channels = convolution.input.C / convolution.groups;
    const int64_t out_channels = convolution.output.C / convolution.groups;
    if (in_channels < kFewestPaired || out_channels < Vec<accumulate_t<Scalar>>::size) return false;
    DenseConvolution<Scalar, Factor>(convolution).run();
    return true;
  }
}

template void convolve_dense(const Convolution<float>&);
template void convolve_dense(const Convolution<double>&);
template void convolve_dense(const Convolution<bfloat16>&);
template void convolve_dense(const Convolution<float16>&);
template bool convolve_in_pairs(const Convolution<float>&);
template bool convolve_in_pairs(const Convolution<double>&);
template bool convolve_in_pairs(const Convolution<bfloat16>&);
template bool convolve_in_pairs(const Convolution<float16>&);

}  // namespace dlkernels::DLKERNELS_ISA
