// The gradient of a convolution's weight: a product whose depth is the pixels. The windows of the input, staged
// pixel-major (window.h), stand against grad_output transposed. The chunks of pixels and the groups in which their sums
// are added follow from the shapes alone.
#include "conv2d_parts.h"
#include "gemm.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int64_t kGradientPixels = 256;  // pixels of a run of sums
constexpr int64_t kFewChannels = 8;       // input channels up to which they make poor lanes

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
                    grid_.output_window(block, grid_.phases[0]), gradient.data());
      } else {
        stage_gradient(block, region, gradient.data());
      }
      const bool inside_only =
          grid_.reads_padding(block, g_.H, g_.W) && !all_finite(gradient.data(), block.pixels() * region.out_count);
      if (swapped_) {
        add_chunk_swapped(block, window, region, staged.data(), gradient.data(), inside_only, sums);
      } else {
        add_chunk(block, window, region, staged.data(), gradient.data(), inside_only, sums);
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

  // The block's pixels as depth of a product: rows of pixels, pixel j of row (n, i) at row_offset(n, i) + j * step of
  // the right operand. With a tap given, those whose tap lies inside the image alone.
  template <class RowOffset>
  int64_t segments_of(const Block& block, const Tap* tap, RowOffset&& row_offset, int64_t step,
                      Segment* segments) const {
    int64_t count = 0;
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t i = 0; i < block.rows; ++i) {
        const Columns columns =
            tap == nullptr ? Columns{0, block.columns} : grid_.inside_columns(*tap, block, i, g_.H, g_.W);
        if (columns.end <= columns.first) continue;
        const int64_t pixel = (n * block.rows + i) * block.columns + columns.first;
        const int64_t offset = row_offset(n, i) + columns.first * step, depth = columns.end - columns.first;
        Segment* last = segments + count - 1;
        if (count > 0 && last->a_offset + last->depth == pixel && last->b_offset + last->depth * step == offset) {
          last->depth += depth;
        } else {
          segments[count++] = {depth, pixel, offset};
        }
      }
    }
    return count;
  }

  void add_chunk(const Block& block, const Window& window, const Region& region, const T* staged, const T* gradient,
                 bool inside_only, T* sums) const {
    const int64_t channels = region.in_count, pixels = block.pixels();
    const int64_t column_step = grid_.pixel_step_x() * channels;
    auto row_offset = [&](int64_t n, int64_t i) {
      return (n * window.rows + i * grid_.pixel_step_y()) * window.columns * channels;
    };
    Segment segments[kGradientPixels];
    int64_t count = segments_of(block, nullptr, row_offset, column_step, segments);
    const int64_t products = merged_ ? 1 : g_.kernel_W, taps = merged_ ? g_.kernel_W : 1, columns = taps * channels;
    for (int64_t product = 0; product < g_.kernel_H * products; ++product) {
      const Tap* first = grid_.taps + product * taps;
      T* out = sums + product * region.out_count * columns;
      for (int64_t tap = 0; tap < (inside_only ? taps : 1); ++tap) {
        if (inside_only) count = segments_of(block, first + tap, row_offset, column_step, segments);
        const T* shifted = staged + grid_.tap_pixel(first[tap], window) * channels;
        multiply_chunk(region.out_count, inside_only ? channels : columns, segments, count, gradient, pixels, shifted,
                       column_step, out + tap * channels, columns);
      }
    }
  }

  void add_chunk_swapped(const Block& block, const Window& window, const Region& region, const T* staged,
                         const T* gradient, bool inside_only, T* sums) const {
    const int64_t channels = region.in_count, pixels = block.pixels(), rows = g_.kernel_W * channels;
    const int64_t column_step = grid_.pixel_step_x() * channels, columns = region.out_count;
    auto row_offset = [&](int64_t n, int64_t i) { return (n * block.rows + i) * block.columns * columns; };
    Segment segments[kGradientPixels];
    int64_t count = segments_of(block, nullptr, row_offset, columns, segments);
    Scratch<T> patches(rows * pixels);  // [kernel_W x in][pixel]
    for (int64_t kh = 0; kh < g_.kernel_H; ++kh) {
      const Tap* first = grid_.taps + kh * g_.kernel_W;
      const T* shifted = staged + grid_.tap_pixel(*first, window) * channels;
      for (int64_t row = 0; row < block.images * block.rows; ++row) {
        const int64_t window_row = row / block.rows * window.rows + row % block.rows * grid_.pixel_step_y();
        transpose(shifted + window_row * window.columns * channels, column_step, block.columns, rows,
                  patches.data() + row * block.columns, pixels);
      }
      for (int64_t tap = 0; tap < (inside_only ? g_.kernel_W : 1); ++tap) {
        if (inside_only) count = segments_of(block, first + tap, row_offset, columns, segments);
        multiply_chunk(inside_only ? channels : rows, columns, segments, count,
                       patches.data() + tap * channels * pixels, pixels, gradient, columns,
                       sums + (kh * rows + tap * channels) * columns, columns);
      }
    }
  }

  // out[row][column] += sum over the segments' pixels of left[row][pixel] * right[pixel][column].
  static void multiply_chunk(int64_t rows, int64_t columns, const Segment* segments, int64_t count, const T* left,
                             int64_t pixels, const T* right, int64_t column_step, T* out, int64_t out_stride) {
    for (int64_t j = 0; j < columns; j += kTileColumns<T>) {
      for (int64_t k = 0; k < rows; k += kTileRows) {
        const int64_t tile_rows = min_of(kTileRows, rows - k);
        const T* pointers[kTileRows];
        for (int64_t r = 0; r < tile_rows; ++r) pointers[r] = left + (k + r) * pixels;
        multiply_tile(tile_rows, min_of(kTileColumns<T>, columns - j), segments, count, pointers, right + j,
                      column_step, out + k * out_stride + j, out_stride, true);
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

}  // namespace

template <class Scalar>
void dense_weight_gradient(const Conv2dBackwardArgs& args) {
  Scratch<Tap> taps(args.geometry.kernel_H * args.geometry.kernel_W);
  Phase phase;
  const Grid grid = forward_grid(args.geometry, args.geometry.weight_strides, taps.data(), &phase);
  DenseWeightGradient<Scalar>(args.geometry, grid, static_cast<const Scalar*>(args.input),
                              static_cast<const Scalar*>(args.grad_output))
      .run(static_cast<Scalar*>(args.grad_weight));
}

template void dense_weight_gradient<float>(const Conv2dBackwardArgs&);
template void dense_weight_gradient<double>(const Conv2dBackwardArgs&);
template void dense_weight_gradient<bfloat16>(const Conv2dBackwardArgs&);
template void dense_weight_gradient<float16>(const Conv2dBackwardArgs&);

}  // namespace dlkernels::DLKERNELS_ISA
