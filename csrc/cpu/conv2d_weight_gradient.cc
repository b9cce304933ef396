// The gradient of a convolution's weight: a product whose depth is the pixels. A task takes a region of the gradient
// and a part of the chunks of pixels; chunks, regions and the groups in which sums are added follow from the shapes
// alone.
//
// The lanes lie along the output channels or the input channels. Along the output channels, grad_output is staged
// pixel-major as the right operand, and the input as planes (planes.h): the left row of a tap and an input channel is
// the channel's plane from the tap's offset on, so no tap costs a copy. Along the input channels, the window of the
// input is staged pixel-major (window.h) and grad_output stands against it, a row for each output channel. Both add the
// same products in the same order; what lanes stay empty and what has to be transposed decides. Pairs of bfloat16
// (pairs.h), two neighbouring pixels, go the first way.
#include "conv2d_parts.h"
#include "gemm.h"
#include "planes.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int64_t kGradientPixels = 256;              // pixels of a run of sums
constexpr int64_t kRegionSums = 160 << 10;            // of a task, in the second-level cache beside its operands
constexpr double kCopyCost = 3, kTransposeCost = 20;  // of an element, in multiply-adds

// Products are taken in Factor: the type of the sums, or pairs of bfloat16.
template <class Scalar, class Factor = accumulate_t<Scalar>>
class DenseWeightGradient {
  using T = accumulate_t<Scalar>;
  static constexpr bool kPairs = !std::is_same_v<Factor, T>;
  static constexpr int64_t kStep = Step<Factor>::depth;

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
    in_blocks_ = ceil_div(in_channels_, in_block_);
    out_block_ = balanced(out_channels_, max_of(64, kRegionSums / max_of(1, grid.tap_count * in_block_)));
    while (out_block_ > 64 && regions() * chunks_.count() < kWantedTasks / 2) {
      out_block_ = balanced(out_channels_, max_of(64, out_block_ / 2));
    }
    out_blocks_ = ceil_div(out_channels_, out_block_);
    region_size_ = grid.tap_count * in_block_ * out_block_;
    parts_ = part_count(chunks_.count(), regions(), regions() * region_size_ * static_cast<int64_t>(sizeof(T)));
    // Neighbouring kernel columns are neighbours in the window: one wider product for all of them.
    merged_ = g.kernel_W == 1 || (g.dilation_W == 1 && grid.window_step_x() == 1);
    outputs_are_lanes_ = kPairs || cost_along_outputs() < cost_along_inputs();
    // Pairs that end with every row waste a lane of the last one where rows are odd; planes of their own have no ends.
    shares_planes_ = !kPairs || chunks_.columns % 2 == 0;
  }

  void run(Scalar* grad_weight) {
    const int64_t regions_in_all = regions();
    const auto input = ImagesInLayout<Scalar>::of(input_, !outputs_are_lanes_, out_blocks_ > 1);
    const auto gradient = ImagesInLayout<Scalar>::of(grad_output_, outputs_are_lanes_, in_blocks_ > 1);
    input_ = input.images, grad_output_ = gradient.images;
    const double work = 1.0 * g_.N * g_.output_H * g_.output_W * g_.K * in_channels_ * grid_.tap_count;
    const int64_t tasks = parts_ * regions_in_all;
    if (parts_ == 1) {
      parallel_for(tasks, work < kSerialWork ? tasks : 1, [&](int64_t region) {
        Scratch<T> sums(region_size_);
        run_part(0, region, sums.data());
        write_region(region_at(region), sums.data(), grad_weight);
      });
      return;
    }
    Scratch<T> partial(tasks, region_size_);
    parallel_for(tasks, work < kSerialWork ? tasks : 1, [&](int64_t task) {
      run_part(task / regions_in_all, task % regions_in_all, partial.data() + task * region_size_);
    });
    parallel_for(regions_in_all, work < kSerialWork ? regions_in_all : 1, [&](int64_t region) {
      T* sum = partial.data() + region * region_size_;
      for (int64_t part = 1; part < parts_; ++part) {
        add_to(sum, partial.data() + (part * regions_in_all + region) * region_size_, region_size_);
      }
      write_region(region_at(region), sum, grad_weight);
    });
  }

 private:
  struct Region {
    int64_t group, in, out, in_count, out_count;  // channels within the group
  };
  int64_t regions() const { return g_.groups * in_blocks_ * ceil_div(out_channels_, out_block_); }
  Region region_at(int64_t index) const {
    const int64_t in = index % in_blocks_ * in_block_, out = index / in_blocks_ % out_blocks_ * out_block_;
    return {index / in_blocks_ / out_blocks_, in, out, min_of(in_block_, in_channels_ - in),
            min_of(out_block_, out_channels_ - out)};
  }

  // Of a pixel of a region, in multiply-adds: those of full and of empty lanes, and what staging costs.
  double cost_along_outputs() const {
    return 1.0 * grid_.tap_count * in_block_ * round_up(out_block_, Vec<T>::size) +
           in_block_ * window_share() * (g_.channels_last ? kTransposeCost : kCopyCost) +
           out_block_ * (g_.channels_last ? kCopyCost : kTransposeCost);
  }
  double cost_along_inputs() const {
    const int64_t taps = merged_ ? g_.kernel_W : 1;
    return 1.0 * grid_.tap_count / taps * round_up(taps * in_block_, Vec<T>::size) * out_block_ +
           in_block_ * window_share() * (g_.channels_last ? kCopyCost : kTransposeCost) +
           out_block_ * (g_.channels_last ? kTransposeCost : kCopyCost);
  }
  double window_share() const { return 1.0 * grid_.window_pixels(chunks_) / max_of(1, chunks_.rows * chunks_.columns); }

  // sums: [kernel_H x kernel_W][in][out] where output channels are the lanes. Otherwise [kernel_H][out][kernel_W x in]
  // when merged, or else [kernel_H][kernel_W][out][in].
  void run_part(int64_t part, int64_t index, T* sums) const {
    const Region region = region_at(index);
    const int64_t first = part * chunks_.count() / parts_, end = (part + 1) * chunks_.count() / parts_;
    for (int64_t chunk = first; chunk < end; ++chunk) {
      if (outputs_are_lanes_) {
        add_along_outputs(chunks_.at(chunk), region, sums, chunk > first);
      } else if constexpr (!kPairs) {
        add_along_inputs(chunks_.at(chunk), region, sums, chunk > first);
      }
    }
  }

  // ---- lanes along the output channels ----

  // The pixels of a block that follow one another in both operands.
  struct Lines {
    int64_t count, pixels;
    int64_t left_step;  // from one line to the next in a plane
  };
  static Lines lines_of(const Block& block, const Planes& planes) {
    if (planes.columns != block.columns) return {block.images * block.rows, block.columns, 0};
    if (planes.rows != block.rows) return {block.images, block.rows * block.columns, planes.rows * planes.columns};
    return {1, block.pixels(), 0};
  }

  void add_along_outputs(const Block& block, const Region& region, T* sums, bool accumulate) const {
    const Planes planes(grid_, block, shares_planes_);
    const int64_t columns = region.out_count;
    Scratch<Factor> left(region.in_count, planes.channel_stride);
    stage_planes(input_, block, region.group * in_channels_ + region.in, region.in_count, planes, left.data());
    const Lines lines = lines_of(block, planes);
    const int64_t line_pixels = round_up(lines.pixels, kStep);
    // Pairs are read in whole vectors.
    Scratch<Factor> right(lines.count * line_pixels * columns + kStep * Vec<T>::size);
    stage_right(block, region, lines, right.data());
    Segment segments[kGradientPixels];
    int64_t count = 0;
    for (; count < lines.count; ++count) {
      const int64_t n = count / block.rows, i = count % block.rows;
      const int64_t offset = planes.columns == block.columns ? count * lines.left_step : planes.flat(n, i, 0);
      segments[count] = {lines.pixels, offset, count * line_pixels * columns};
    }
    if (!kPairs && grid_.reads_padding(block, g_.H, g_.W) && !all_finite(right.data(), block.pixels() * columns)) {
      for (int64_t t = 0; t < grid_.tap_count; ++t) {
        count = segments_inside(
            grid_.taps[t], block, [&](int64_t n, int64_t i, int64_t j) { return planes.flat(n, i, j); },
            [&](int64_t n, int64_t i, int64_t j) { return ((n * block.rows + i) * block.columns + j) * columns; },
            segments);
        multiply_planes(planes, t, 1, region, segments, count, left.data(), right.data(), sums, accumulate);
      }
    } else {
      multiply_planes(planes, 0, grid_.tap_count, region, segments, count, left.data(), right.data(), sums, accumulate);
    }
  }

  // grad_output, [pixel][out]; pairs of pixels side by side, lines padded with a zero.
  void stage_right(const Block& block, const Region& region, const Lines& lines, Factor* right) const {
    const int64_t columns = region.out_count, channel = region.group * out_channels_ + region.out;
    const Window window = grid_.output_window(block, grid_.phases[0]);
    if constexpr (!kPairs) {
      stage_block(grad_output_, block, channel, columns, window, right);
    } else {
      Scratch<Factor> pixels(block.pixels(), columns);
      stage_block(grad_output_, block, channel, columns, window, pixels.data());
      for (int64_t line = 0; line < lines.count; ++line) {
        const Factor* source = pixels.data() + line * lines.pixels * columns;
        for (int64_t p = 0; p < lines.pixels; p += 2, right += 2 * columns) {
          const Factor* even = source + p * columns;
          interleave_rows(even, p + 1 < lines.pixels ? even + columns : nullptr, columns, right);
        }
      }
    }
  }

  // sums[tap][in][out] (+)= the segments of `taps` taps from `tap` on.
  void multiply_planes(const Planes& planes, int64_t tap, int64_t taps, const Region& region, const Segment* segments,
                       int64_t count, const Factor* left, const Factor* right, T* sums, bool accumulate) const {
    const int64_t channels = region.in_count, rows = taps * channels, columns = region.out_count;
    const int64_t tiles = ceil_div(rows, kTileRows);
    sums += tap * channels * columns;
    for (int64_t j = 0; j < columns; j += kTileColumns<Factor>) {
      const int64_t tile_columns = min_of(kTileColumns<Factor>, columns - j);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = rows * tile / tiles, tile_rows = rows * (tile + 1) / tiles - first;
        const Factor* pointers[kTileRows];
        for (int64_t r = 0; r < tile_rows; ++r) {
          const int64_t t = tap + (first + r) / channels, c = (first + r) % channels;
          pointers[r] = left + c * planes.channel_stride + planes.tap_offset(grid_.taps[t], grid_);
        }
        multiply_tile(tile_rows, tile_columns, segments, count, pointers, right + kStep * j, columns,
                      sums + first * columns + j, columns, accumulate);
      }
    }
  }

  // The pixels whose tap lies inside the image, alone; left and right say where pixel (n, i, j) is in the operands.
  template <class Left, class Right>
  int64_t segments_inside(const Tap& tap, const Block& block, Left&& left, Right&& right, Segment* segments) const {
    int64_t count = 0;
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t i = 0; i < block.rows; ++i) {
        const Columns columns = grid_.inside_columns(tap, block, i, g_.H, g_.W);
        if (columns.end <= columns.first) continue;
        segments[count++] = {columns.end - columns.first, left(n, i, columns.first), right(n, i, columns.first)};
      }
    }
    return count;
  }

  // ---- lanes along the input channels ----

  void add_along_inputs(const Block& block, const Region& region, T* sums, bool accumulate) const {
    const Window window = grid_.input_window(block);
    const int64_t channels = region.in_count, pixels = block.pixels();
    Scratch<T> staged(block.images, window.rows, window.columns, channels);
    Scratch<T> gradient(pixels, region.out_count);  // [out][pixel]
    stage_block(input_, block, region.group * in_channels_ + region.in, channels, window, staged.data());
    stage_gradient(block, region, gradient.data());
    const bool inside_only =
        grid_.reads_padding(block, g_.H, g_.W) && !all_finite(gradient.data(), pixels * region.out_count);
    const int64_t column_step = grid_.pixel_step_x() * channels;
    auto pixel = [&](int64_t n, int64_t i, int64_t j) { return (n * block.rows + i) * block.columns + j; };
    auto place = [&](int64_t n, int64_t i, int64_t j) {
      return (n * window.rows + i * grid_.pixel_step_y()) * window.columns * channels + j * column_step;
    };
    Segment segments[kGradientPixels];
    int64_t count = 0;
    for (; count < block.images * block.rows; ++count) {
      const int64_t n = count / block.rows, i = count % block.rows;
      segments[count] = {block.columns, pixel(n, i, 0), place(n, i, 0)};
    }
    const int64_t products = merged_ ? 1 : g_.kernel_W, taps = merged_ ? g_.kernel_W : 1, columns = taps * channels;
    for (int64_t product = 0; product < g_.kernel_H * products; ++product) {
      const Tap* first = grid_.taps + product * taps;
      T* out = sums + product * region.out_count * columns;
      for (int64_t tap = 0; tap < (inside_only ? taps : 1); ++tap) {
        if (inside_only) count = segments_inside(first[tap], block, pixel, place, segments);
        const T* shifted = staged.data() + grid_.tap_pixel(first[tap], window) * channels;
        multiply_window(region.out_count, inside_only ? channels : columns, segments, count, gradient.data(), pixels,
                        shifted, column_step, out + tap * channels, columns, accumulate);
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
        if (grad_output_.channels_last) {
          transpose(source, g_.K, run, region.out_count, destination, pixels);
        } else {
          for (int64_t k = 0; k < region.out_count; ++k) {
            widen_row(source + k * grad_output_.channel_stride(), run, destination + k * pixels);
          }
        }
      }
    }
  }

  // out[row][column] (+)= sum over the segments' pixels of left[row][pixel] * right[pixel][column].
  static void multiply_window(int64_t rows, int64_t columns, const Segment* segments, int64_t count, const T* left,
                              int64_t pixels, const T* right, int64_t column_step, T* out, int64_t out_stride,
                              bool accumulate) {
    for (int64_t j = 0; j < columns; j += kTileColumns<T>) {
      for (int64_t k = 0; k < rows; k += kTileRows) {
        const int64_t tile_rows = min_of(kTileRows, rows - k);
        const T* pointers[kTileRows];
        for (int64_t r = 0; r < tile_rows; ++r) pointers[r] = left + (k + r) * pixels;
        multiply_tile(tile_rows, min_of(kTileColumns<T>, columns - j), segments, count, pointers, right + j,
                      column_step, out + k * out_stride + j, out_stride, accumulate);
      }
    }
  }

  // ---- the region's sums to the gradient ----

  void write_region(const Region& region, const T* sums, Scalar* grad_weight) const {
    const int64_t channels = region.in_count, columns = region.out_count, taps = grid_.tap_count;
    Scratch<T> rows(Vec<T>::size, taps, channels);  // [out][tap][in]
    for (int64_t k = 0; k < columns; k += Vec<T>::size) {
      const int64_t count = min_of(Vec<T>::size, columns - k);
      if (outputs_are_lanes_) {
        transpose(sums + k, columns, taps * channels, count, rows.data(), taps * channels);
      } else {
        const int64_t width = merged_ ? g_.kernel_W * channels : channels;  // of a row that lies together
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t piece = 0; piece < taps * channels / width; ++piece) {
            widen_row(sums + (piece * columns + k + r) * width, width,
                      rows.data() + (r * taps * channels + piece * width));
          }
        }
      }
      for (int64_t r = 0; r < count; ++r) write_row(region, k + r, rows.data() + r * taps * channels, grad_weight);
    }
  }

  // [tap][in] of output channel `out` of the region.
  void write_row(const Region& region, int64_t out, const T* row, Scalar* grad_weight) const {
    const int64_t channels = region.in_count, taps = grid_.tap_count;
    const int64_t* strides = g_.grad_weight_strides;
    grad_weight += (region.group * out_channels_ + region.out + out) * strides[0] + region.in * strides[1];
    if (taps > 1 && strides[1] == taps && strides[2] == g_.kernel_W && strides[3] == 1) {
      return transpose(row, channels, taps, channels, grad_weight, taps);
    }
    for (int64_t t = 0; t < taps; ++t, row += channels) {
      Scalar* tap = grad_weight + t / g_.kernel_W * strides[2] + t % g_.kernel_W * strides[3];
      if (strides[1] == 1) {
        narrow_row(row, channels, tap);
      } else {
        for (int64_t c = 0; c < channels; ++c) store_one(tap + c * strides[1], row[c]);
      }
    }
  }

  const Conv2dGeometry& g_;
  const Grid& grid_;
  Images<const Scalar> input_, grad_output_;
  int64_t in_channels_, out_channels_;
  Blocks chunks_;
  int64_t in_block_, out_block_, in_blocks_, out_blocks_, region_size_, parts_;
  bool merged_, outputs_are_lanes_, shares_planes_;
};

// Pairs need output channels for their lanes, and cannot leave out the padding where a gradient is not finite.
template <class Scalar>
bool can_take_pairs(const Conv2dGeometry& g, const Grid& grid, const Scalar* grad_output) {
  return g.K / g.groups >= Vec<accumulate_t<Scalar>>::size && !spoils_padding(g, grid, grad_output);
}

}  // namespace

template <class Scalar>
void dense_weight_gradient(const Conv2dBackwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  Scratch<Tap> taps(g.kernel_H, g.kernel_W);
  Phase phase;
  const Grid grid = forward_grid(g, g.weight_strides, taps.data(), &phase);
  const auto* input = static_cast<const Scalar*>(args.input);
  const auto* grad_output = static_cast<const Scalar*>(args.grad_output);
  auto* grad_weight = static_cast<Scalar*>(args.grad_weight);
  using Factor = factor_t<Scalar>;
  if constexpr (!std::is_same_v<Factor, accumulate_t<Scalar>>) {
    if (can_take_pairs(g, grid, grad_output)) {
      return DenseWeightGradient<Scalar, Factor>(g, grid, input, grad_output).run(grad_weight);
    }
  }
  DenseWeightGradient<Scalar>(g, grid, input, grad_output).run(grad_weight);
}

template void dense_weight_gradient<float>(const Conv2dBackwardArgs&);
template void dense_weight_gradient<double>(const Conv2dBackwardArgs&);
template void dense_weight_gradient<bfloat16>(const Conv2dBackwardArgs&);
template void dense_weight_gradient<float16>(const Conv2dBackwardArgs&);

}  // namespace dlkernels::DLKERNELS_ISA
