// Convolution on matrix units: the same sum over (tap, channel) as conv2d_dense.cc, with numbers split into bfloat16
// planes (split.h). A task takes a block of output pixels and stages its input window for up to kChannelBlock channels;
// every pixel of the window is split once, whatever the number of taps and of output channels that read it. The depth
// of a product is (tap, 32 channels); a tap moves all left rows by the same number of units.
//
// Sixteen pixels are a tile where they are equally far apart in the window, as within an image row; the others are
// gathered, once for all output channels.
#include "conv2d_parts.h"
#include "gemm.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int64_t kPixelBlock = 192;          // output pixels of a task
constexpr int64_t kOutputChannelBlock = 256;  // output channels of a task

template <int Planes, class Scalar>
class TileConvolution {
  // What is split: bfloat16 that stay one plane move as they are.
  using Staged = std::conditional_t<Planes == 1 && std::is_same_v<Scalar, bfloat16>, bfloat16, float>;
  using Left = LeftUnit<Planes>;
  using Right = RightUnit<Planes>;
  // Of a run that takes the whole depth, so that sums are stored once: of one plane, 64 channels by 3x3.
  static constexpr int64_t kMostUnits = Planes == 1 ? 18 : kRunUnits<Planes>;

 public:
  explicit TileConvolution(const Convolution<Scalar>& convolution)
      : conv_(convolution),
        grid_(convolution.grid),
        in_channels_(convolution.input.C / convolution.groups),
        out_channels_(convolution.output.C / convolution.groups),
        panels_(ceil_div(out_channels_, kSplitColumns)),
        blocks_(conv_.input.N, grid_.rows, grid_.columns, kPixelBlock) {
    const int64_t wanted = channel_block<float>(in_channels_, kChannelBlock, grid_.window_pixels(blocks_));
    channel_block_ = min_of(round_up(wanted, kTileDepth), round_up(in_channels_, kTileDepth));
    out_block_ = min_of(round_up(out_channels_, kSplitColumns), kOutputChannelBlock);
    while (tasks() < kWantedTasks / 2 && out_block_ > kSplitColumns) {
      out_block_ = round_up(ceil_div(out_block_, 2), kSplitColumns);
    }
    blocks_.limit_images(images_that_fit<float>(channel_block_, grid_.window_pixels(blocks_)));
  }

  // False when a number could not be split; the output is then unfinished.
  bool run() {
    const Scratch<Right> weights(conv_.groups, panels_, units(in_channels_), grid_.tap_count);
    weights_ = weights.data();
    split_weights();
    if (can_split_) parallel_for(tasks(), 1, [&](int64_t task) { run_task(task); });
    return can_split_;
  }

 private:
  static int64_t units(int64_t channels) { return ceil_div(channels, kTileDepth); }
  int64_t out_blocks() const { return ceil_div(out_channels_, out_block_); }
  int64_t tasks() const { return blocks_.count() * out_blocks() * conv_.groups; }
  void note(bool split) {
    if (!split) __atomic_store_n(&can_split_, false, __ATOMIC_RELAXED);
  }
  // Units of panel `panel` of group g from channel c, the first of a block, on: tap by tap, unit by unit.
  Right* panel_at(int64_t g, int64_t panel, int64_t c) const {
    return weights_ + ((g * panels_ + panel) * units(in_channels_) + units(c)) * grid_.tap_count;
  }

  void split_weights() {
    const int64_t channel_blocks = ceil_div(in_channels_, channel_block_);
    parallel_for(conv_.groups * panels_ * channel_blocks, 1, [&](int64_t task) {
      const int64_t block = task % channel_blocks * channel_block_;
      const int64_t panel = task / channel_blocks % panels_, g = task / channel_blocks / panels_;
      const int64_t channels = min_of(channel_block_, in_channels_ - block);
      const int64_t columns = min_of(kSplitColumns, out_channels_ - panel * kSplitColumns);
      const Weights<Scalar>& w = conv_.weights;
      const Matrix<Scalar> source = {
          w.data + g * w.group_stride + block * w.in_stride + panel * kSplitColumns * w.out_stride, w.in_stride,
          w.out_stride};
      Scratch<Staged> taps(grid_.tap_count, channels, columns);
      pack_taps(grid_, w.innermost_taps, source, channels, columns, taps.data(), columns, channels * columns);
      // Splitting finds what is not finite, which must not meet the padding; what is not split is looked at.
      if constexpr (std::is_same_v<Staged, bfloat16>) {
        note(all_finite(taps.data(), grid_.tap_count * channels * columns));
      }
      Right* destination = panel_at(g, panel, block);
      for (int64_t t = 0; t < grid_.tap_count; ++t) {
        const Matrix<Staged> tap = {taps.data() + t * channels * columns, columns, 1};
        note(split_right(tap, channels, columns, destination + t * units(channels)));
      }
    });
  }

  void run_task(int64_t task) {
    const Block block = blocks_.at(task / out_blocks() / conv_.groups);
    const int64_t g = task / out_blocks() % conv_.groups;
    const int64_t out_channel = task % out_blocks() * out_block_;
    const int64_t out_channels = min_of(out_block_, out_channels_ - out_channel);
    const int64_t first_out = g * out_channels_ + out_channel;
    const Window window = grid_.input_window(block);
    const int64_t window_pixels = block.images * window.rows * window.columns, block_units = units(channel_block_);
    const Scratch<Staged> staged(window_pixels, channel_block_);
    const Scratch<float> results(is_one_matrix(conv_, block) ? 0 : block.pixels(), out_channels);
    const Scratch<Left> split(round_up(window_pixels, kTileHeight), block_units);
    const Scratch<int64_t> places(block.pixels());
    Tiles tiles;
    bool is_staged = false;
    for (const Phase* phase = grid_.phases; phase != grid_.phases + grid_.phase_count; ++phase) {
      const Block part = grid_.phase_block(block, *phase);
      if (part.pixels() == 0) continue;
      grid_.place_pixels(part, window, places.data());
      const auto [sums, stride] = place_sums(conv_, part, *phase, first_out, out_channels, results.data());
      const bool starts = conv_.bias != nullptr || phase->tap_count == 0;  // else products write first
      if (starts) start_sums(conv_, part.pixels(), first_out, out_channels, sums, stride);
      for (int64_t c = 0; c < in_channels_ && phase->tap_count > 0; c += channel_block_) {
        const int64_t channels = min_of(channel_block_, in_channels_ - c);
        if (!is_staged) {
          stage_window(block, g * in_channels_ + c, channels, window, staged.data(), split.data());
        }
        is_staged = channel_block_ >= in_channels_;
        multiply_taps(tiles, *phase, places.data(), part.pixels(), window, units(channels), split.data(),
                      panel_at(g, out_channel / kSplitColumns, c), units(in_channels_) * grid_.tap_count, out_channels,
                      sums, stride, starts || c > 0);
      }
      if (!is_one_matrix(conv_, part)) {
        unstage_block(conv_.output, part, first_out, out_channels, grid_.output_window(part, *phase), sums);
      }
    }
  }

  // The window's pixels as units.
  void stage_window(const Block& block, int64_t channel, int64_t channels, const Window& window, Staged* staged,
                    Left* split) {
    if constexpr (std::is_same_v<Staged, bfloat16>) {
      if (channels % kTileDepth == 0) {  // as they lie
        return stage_block(conv_.input, block, channel, channels, window, reinterpret_cast<Staged*>(split));
      }
    }
    stage_block(conv_.input, block, channel, channels, window, staged);
    const Matrix<Staged> pixels = {staged, channels, 1};
    note(split_left(pixels, block.images * window.rows * window.columns, channels, split, units(channels)));
  }

  // sums[pixel][0 .. out_channels) (+)= all taps of the phase, of `channel_units` units of channels.
  void multiply_taps(Tiles& tiles, const Phase& phase, const int64_t* places, int64_t pixels, const Window& window,
                     int64_t channel_units, const Left* split, const Right* panels, int64_t panel_stride,
                     int64_t out_channels, float* sums, int64_t stride, bool accumulate) const {
    // A run of sums takes some taps whole, or a part of the channels of one; of few channels, all taps.
    const int64_t most_units = phase.tap_count * channel_units <= kMostUnits ? kMostUnits : kRunUnits<Planes>;
    const int64_t parts = ceil_div(channel_units, most_units), end = phase.first_tap + phase.tap_count;
    const int64_t taps_per_run = max_of(1, most_units / channel_units);
    Scratch<Left> gathered(kSplitRows, taps_per_run, ceil_div(channel_units, parts));
    UnitSegment segments[kMostUnits];
    for (int64_t run = phase.first_tap * parts; run < end * parts; run += taps_per_run) {
      const int64_t t = run / parts, first = channel_units * (run % parts) / parts;
      const int64_t units = channel_units * (run % parts + 1) / parts - first, taps = min_of(taps_per_run, end - t);
      for (int64_t p = 0; p < pixels; p += kSplitRows) {
        const int64_t rows = min_of(kSplitRows, pixels - p);
        LeftRows<Planes> left = {split + places[p] * channel_units, channel_units * pixel_step(places + p, rows)};
        const bool in_place = left.unit_stride > 0;
        if (!in_place) left = {gathered.data(), taps * units};
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t offset = grid_.tap_pixel(grid_.taps[t + tap], window) * channel_units + first;
          if (!in_place) {
            gather(places + p, rows, channel_units, split + offset, units, tap * units, taps * units, gathered.data());
          }
          segments[tap] = {units, in_place ? offset : tap * units, (t + tap) * channel_units + first};
        }
        for (int64_t j = 0; j < out_channels; j += kSplitColumns) {
          multiply_split(tiles, rows, min_of(kSplitColumns, out_channels - j), left,
                         panels + j / kSplitColumns * panel_stride, segments, taps, sums + p * stride + j, stride,
                         accumulate || run > phase.first_tap * parts);
        }
      }
    }
  }

  // The distance of neighbouring pixels in the window when they are a whole number of tiles equally far apart, else 0.
  static int64_t pixel_step(const int64_t* places, int64_t rows) {
    if (rows % kTileHeight != 0) return 0;
    const int64_t step = places[1] - places[0];
    for (int64_t r = 2; r < rows; ++r) {
      if (places[r] - places[r - 1] != step) return 0;
    }
    return step;
  }

  // `units` units of every pixel's channels, to `offset` in its row.
  static void gather(const int64_t* places, int64_t rows, int64_t channel_units, const Left* split, int64_t units,
                     int64_t offset, int64_t row_units, Left* gathered) {
    const int64_t lanes = units * static_cast<int64_t>(sizeof(Left) / sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
      const float* source = reinterpret_cast<const float*>(split + places[r] * channel_units);
      float* destination = reinterpret_cast<float*>(gathered + r * row_units + offset);
      for (int64_t i = 0; i < lanes; i += VecF::size) store(destination + i, load(source + i));  // a line each
    }
  }

  const Convolution<Scalar>& conv_;
  const Grid& grid_;
  int64_t in_channels_, out_channels_, panels_;  // of one group
  Blocks blocks_;
  int64_t channel_block_, out_block_;
  Right* weights_ = nullptr;
  bool can_split_ = true;
};

}  // namespace

template <class Scalar>
bool convolve_on_tiles(const Convolution<Scalar>& convolution) {
  if constexpr (kHasTiles && !std::is_same_v<Scalar, double>) {
    const int64_t groups = convolution.groups;
    if (convolution.input.C / groups < kFewestTileChannels || convolution.output.C / groups < kFewestTileChannels)
      return false;
    return with_planes<Scalar>([&](auto planes) { return TileConvolution<planes(), Scalar>(convolution).run(); });
  }
  return false;
}

template bool convolve_on_tiles(const Convolution<float>&);
template bool convolve_on_tiles(const Convolution<double>&);
template bool convolve_on_tiles(const Convolution<bfloat16>&);
template bool convolve_on_tiles(const Convolution<float16>&);

}  // namespace dlkernels::DLKERNELS_ISA
