// Convolution on matrix units where the depth of the product is all taps and channels of a pixel, gathered into a row:
// of few input channels, a stem or an image cut into patches, and of few pixels under large weights.
//
//   out[pixel][k] = bias[k] + sum over (tap, c) of in[pixel at the tap][c] w[(tap, c)][k]
//
// In a window staged pixel-major the columns of a row of taps lie side by side. A tile of one tap's few channels would
// be mostly padding: a task gathers and splits the rows of a block of output pixels and multiplies them by all weights,
// split once a call. Where the rows of all pixels are not much more than the input or the weights, one product takes
// them (gemm.h): its blocks read each weight once, where blocks of pixels would read the split weights again and again.
#include "conv2d_parts.h"
#include "gemm.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int64_t kFewestDepth = 96;
constexpr int64_t kWeightBytes = 512 << 10;  // of the split weights, which every block reads
constexpr int64_t kBlockPixels = 256;        // output pixels of a block

// Taps as a kernel of rows of adjoining columns.
struct Kernel {
  int64_t rows = 0, columns = 0;  // none where taps are otherwise

  explicit Kernel(const Grid& grid) {
    const int64_t across = grid.last_dx - grid.first_dx + 1;
    if (grid.tap_count == 0 || grid.tap_count % across != 0) return;
    for (int64_t t = 0; t < grid.tap_count; ++t) {
      const Tap& tap = grid.taps[t];
      if (tap.dx != grid.first_dx + t % across || tap.dy != grid.taps[t / across * across].dy) return;
    }
    rows = grid.tap_count / across, columns = across;
  }
};

template <class Scalar>
class GatheredConvolution {
  // What is gathered: bfloat16 that stay what they are, or the type of the sums.
  using Staged = std::conditional_t<std::is_same_v<Scalar, bfloat16>, bfloat16, float>;
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Staged));  // elements that move at once

 public:
  explicit GatheredConvolution(const Convolution<Scalar>& convolution)
      : conv_(convolution),
        grid_(convolution.grid),
        kernel_(convolution.grid),
        C_(convolution.input.C),
        K_(convolution.output.C),
        depth_(grid_.tap_count * C_),
        row_stride_(round_up(depth_, kLine) + kLine) {}

  bool suits() const {
    return conv_.groups == 1 && grid_.phase_count == 1 && grid_.output_step_y == 1 && grid_.output_step_x == 1 &&
           K_ >= kFewestTileChannels && depth_ >= kFewestDepth && kernel_.rows > 0 && pixels() >= kFewestTilePixels &&
           (C_ < kFewestTileChannels || has_few_pixels());
  }

  // False when a number could not be split; the output is then unfinished.
  bool run() {
    if (takes_all_rows() && has_gathered_weights()) {
      if (!all_finite(conv_.weights.data, depth_ * K_)) return false;  // must not meet the padding
      return multiply_rows(Matrix<Scalar>{conv_.weights.data, 1, depth_});
    }
    const Scratch<Staged> weights(depth_, K_);
    if (takes_all_rows() && has_inner_taps()) {
      turn_weights(weights.data());
      return all_finite(weights.data(), depth_ * K_) && multiply_rows(Matrix<Staged>{weights.data(), 1, depth_});
    }
    pack_weights(weights.data());
    if (!all_finite(weights.data(), depth_ * K_)) return false;
    return with_planes<Scalar>([&](auto planes) {
      if (takes_all_rows()) return multiply_rows(Matrix<Staged>{weights.data(), K_, 1});
      // Six products of so few output channels wait for the second-level cache: multiply-adds are as fast.
      const bool pays = planes() < 3 && depth_ * K_ * 2 * planes() <= kWeightBytes;
      return pays && multiply_blocks<planes()>(weights.data());
    });
  }

 private:
  int64_t pixels() const { return conv_.output.N * conv_.output.H * conv_.output.W; }
  bool is_cut_into_patches() const {
    return grid_.input_step_y >= grid_.last_dy - grid_.first_dy + 1 &&
           grid_.input_step_x >= grid_.last_dx - grid_.first_dx + 1;
  }
  // Where more pixels read the weights, splitting these ahead costs less. Six products lose to Winograd's filtering at
  // stride one.
  bool has_few_pixels() const {
    if (grid_.tap_count == 1 || 2 * pixels() > K_) return false;
    if (planes_of<Scalar>() < 3) return true;
    return grid_.input_step_y > 1 || grid_.input_step_x > 1;
  }
  bool takes_all_rows() const { return is_cut_into_patches() || has_few_pixels(); }
  // Whether the weights lie as [out][tap][in], as wide as the rows; or as [out][in][tap].
  bool has_gathered_weights() const {
    if (conv_.weights.in_stride != 1 || conv_.weights.out_stride != depth_) return false;
    for (int64_t t = 0; t < grid_.tap_count; ++t) {
      if (grid_.taps[t].weight_offset != t * C_) return false;
    }
    return true;
  }
  bool has_inner_taps() const {
    return conv_.weights.innermost_taps == grid_.tap_count && conv_.weights.in_stride == grid_.tap_count &&
           conv_.weights.out_stride == depth_;
  }
  // From [out][in][tap] to [out][tap][in].
  void turn_weights(Staged* turned) const {
    const Scratch<int64_t> offsets(grid_.tap_count);  // of the destination, by the tap's place in memory
    for (int64_t t = 0; t < grid_.tap_count; ++t) offsets[grid_.taps[t].weight_offset] = t * C_;
    parallel_for(K_, ceil_div(1 << 14, depth_), [&](int64_t k) {
      transpose_to_rows(conv_.weights.data + k * depth_, grid_.tap_count, C_, grid_.tap_count, turned + k * depth_,
                        [&](int64_t tap) { return offsets[tap]; });
    });
  }
  // From any order to [tap][in][out].
  void pack_weights(Staged* packed) const {
    constexpr int64_t channels = 16;
    const Matrix<Scalar> source = {conv_.weights.data, conv_.weights.in_stride, conv_.weights.out_stride};
    parallel_for(ceil_div(C_, channels), ceil_div(1 << 14, channels * grid_.tap_count * K_), [&](int64_t block) {
      const int64_t c = block * channels;
      pack_taps(grid_, conv_.weights.innermost_taps, source.at(c, 0), min_of(channels, C_ - c), K_, packed + c * K_, K_,
                C_ * K_);
    });
  }

  // Rows of the depth for the pixels of a block, row_stride_ apart, zeros beyond the depth. `staged` holds the window
  // and room for a line more.
  void gather(const Block& block, Staged* staged, Staged* rows) const {
    const Window w = grid_.input_window(block);
    const int64_t run = kernel_.columns * C_;
    const Staged zeros[kLine] = {};
    stage_block(conv_.input, block, 0, C_, w, staged);
    move_line(zeros, staged + block.images * w.rows * w.columns * C_);
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t i = 0; i < block.rows; ++i) {
        for (int64_t j = 0; j < block.columns; ++j, rows += row_stride_) {
          for (int64_t k = 0; k < kernel_.rows; ++k) {
            const int64_t y = i * grid_.pixel_step_y() + grid_.taps[k * kernel_.columns].dy - grid_.first_dy;
            const Staged* source = staged + ((n * w.rows + y) * w.columns + j * grid_.pixel_step_x()) * C_;
            // What is written beyond the run is written again by the next.
            for (int64_t e = 0; e < run; e += kLine) move_line(source + e, rows + k * run + e);
          }
          move_line(zeros, rows + depth_);
        }
      }
    }
  }
  static void move_line(const Staged* source, Staged* destination) {
    store(reinterpret_cast<float*>(destination), load(reinterpret_cast<const float*>(source)));
  }
  int64_t staged_size(const Blocks& blocks) const { return blocks.images * grid_.window_pixels(blocks) * C_ + kLine; }

  template <int Planes>
  bool multiply_blocks(const Staged* weights) {
    const int64_t units = ceil_div(depth_, kTileDepth), panels = ceil_div(K_, kSplitColumns);
    const Scratch<RightUnit<Planes>> right(panels, units);
    bool split = true;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t k = panel * kSplitColumns;
      split &= split_right(Matrix<Staged>{weights + k, K_, 1}, depth_, min_of(kSplitColumns, K_ - k),
                           right.data() + panel * units);
    }
    if (!split) return false;
    const Blocks blocks(conv_.input.N, grid_.rows, grid_.columns, kBlockPixels);
    parallel_for(blocks.count(), 1, [&](int64_t index) {
      const Block block = blocks.at(index);
      const Scratch<Staged> staged(staged_size(blocks)), rows(blocks.pixels(), row_stride_);
      const Scratch<LeftUnit<Planes>> left(round_up(blocks.pixels(), kTileHeight), units);
      const Scratch<float> results(is_one_matrix(conv_, block) ? 0 : blocks.pixels(), K_);
      gather(block, staged.data(), rows.data());
      if (!split_left(Matrix<Staged>{rows.data(), row_stride_, 1}, block.pixels(), depth_, left.data(), units)) {
        __atomic_store_n(&is_split_, false, __ATOMIC_RELAXED);
      }
      multiply_block<Planes>(block, {left.data(), units}, right.data(), units, results.data());
    });
    return is_split_;
  }

  template <class Weight>
  bool multiply_rows(Matrix<Weight> weights) const {
    const Blocks blocks(conv_.input.N, grid_.rows, grid_.columns, kBlockPixels);
    if (blocks.columns < grid_.columns) return false;  // its pixels would not follow one another
    const Scratch<Staged> rows(pixels(), row_stride_);
    parallel_for(blocks.count(), 1, [&](int64_t index) {
      const Block block = blocks.at(index);
      const Scratch<Staged> staged(staged_size(blocks));
      gather(block, staged.data(), rows.data() + (block.image * grid_.rows + block.row) * grid_.columns * row_stride_);
    });
    multiply_all_pixels(conv_, Matrix<Staged>{rows.data(), row_stride_, 1}, weights, depth_);
    return true;
  }

  template <int Planes>
  void multiply_block(const Block& block, LeftRows<Planes> left, const RightUnit<Planes>* right, int64_t units,
                      float* results) const {
    const auto [sums, stride] = place_sums(conv_, block, grid_.phases[0], 0, K_, results);
    const bool starts = conv_.bias != nullptr;
    if (starts) start_sums(conv_, block.pixels(), 0, K_, sums, stride);
    Tiles tiles;
    multiply_units<Planes>(tiles, block.pixels(), K_, units, left, right, units, sums, stride, starts);
    if (!is_one_matrix(conv_, block)) {
      unstage_block(conv_.output, block, 0, K_, grid_.output_window(block, grid_.phases[0]), sums);
    }
  }

  const Convolution<Scalar>& conv_;
  const Grid& grid_;
  Kernel kernel_;
  int64_t C_, K_, depth_, row_stride_;
  bool is_split_ = true;
};

}  // namespace

template <class Scalar>
bool convolve_gathered(const Convolution<Scalar>& convolution) {
  if constexpr (kHasTiles && !std::is_same_v<Scalar, double>) {
    GatheredConvolution<Scalar> gathered(convolution);
    return gathered.suits() && gathered.run();
  }
  return false;
}

template bool convolve_gathered(const Convolution<float>&);
template bool convolve_gathered(const Convolution<double>&);
template bool convolve_gathered(const Convolution<bfloat16>&);
template bool convolve_gathered(const Convolution<float16>&);

}  // namespace dlkernels::DLKERNELS_ISA
