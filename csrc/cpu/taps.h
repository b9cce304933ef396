// A convolution as a sum over taps: which pixels of a window each output pixel reads, and with which weights. See
// conv2d.cc for the idea; forward, both gradients, dense and depthwise all speak of the same grid of taps.
#pragma once

#include "window.h"

namespace dlkernels::DLKERNELS_ISA {

inline int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b, b = rest;
  }
  return a;
}

struct Tap {
  int64_t dy, dx;
  int64_t weight_offset;  // of the tap's matrix, from the first
};

// Columns [first, end) of a block; none where end <= first.
struct Columns {
  int64_t first, end;
};

// Output pixels that the same taps reach: (output_y + i step, output_x + j step) for (i, j) in rows x columns.
struct Phase {
  int64_t rows, columns;
  int64_t output_y, output_x;
  int64_t first_tap, tap_count;
};

// Output pixels in one or more phases; taps read the input at (i s + dy, j s + dx), in every phase.
struct Grid {
  int64_t rows, columns;  // of the largest phase
  int64_t output_step_y, output_step_x;
  int64_t input_step_y, input_step_x;
  const Phase* phases;
  int64_t phase_count;
  const Tap* taps;  // of all phases
  int64_t tap_count;
  int64_t first_dy = 0, last_dy = 0, first_dx = 0, last_dx = 0;

  void set_taps(const Tap* taps_, int64_t count) {
    taps = taps_;
    tap_count = count;
    for (int64_t t = 0; t < count; ++t) {
      first_dy = t == 0 ? taps[t].dy : min_of(first_dy, taps[t].dy);
      last_dy = t == 0 ? taps[t].dy : max_of(last_dy, taps[t].dy);
      first_dx = t == 0 ? taps[t].dx : min_of(first_dx, taps[t].dx);
      last_dx = t == 0 ? taps[t].dx : max_of(last_dx, taps[t].dx);
    }
  }
  // With a single tap along a dimension, the window holds only the pixels that the stride lands on.
  int64_t window_step_y() const { return first_dy == last_dy ? input_step_y : 1; }
  int64_t window_step_x() const { return first_dx == last_dx ? input_step_x : 1; }
  // The largest distance of which all distances between columns of taps are multiples.
  int64_t tap_step_x() const {
    int64_t step = 0;
    for (int64_t t = 0; t < tap_count; ++t) step = greatest_common_divisor(step, taps[t].dx - first_dx);
    return max_of(step, 1);
  }
  // Distance in the window between neighbouring output pixels.
  int64_t pixel_step_y() const { return input_step_y / window_step_y(); }
  int64_t pixel_step_x() const { return input_step_x / window_step_x(); }
  int64_t window_rows(int64_t rows) const { return (rows - 1) * pixel_step_y() + last_dy - first_dy + 1; }
  int64_t window_columns(int64_t columns) const { return (columns - 1) * pixel_step_x() + last_dx - first_dx + 1; }

  Window input_window(const Block& block) const {
    return {block.row * input_step_y + first_dy,
            block.column * input_step_x + first_dx,
            window_rows(block.rows),
            window_columns(block.columns),
            window_step_y(),
            window_step_x()};
  }
  // The block's part of a phase; its rows and columns may be fewer, or none.
  Block phase_block(const Block& block, const Phase& phase) const {
    Block part = block;
    part.rows = max_of(0, min_of(block.rows, phase.rows - block.row));
    part.columns = max_of(0, min_of(block.columns, phase.columns - block.column));
    return part;
  }
  Window output_window(const Block& block, const Phase& phase) const {
    return {phase.output_y + block.row * output_step_y,
            phase.output_x + block.column * output_step_x,
            block.rows,
            block.columns,
            output_step_y,
            output_step_x};
  }
  // Of one image.
  int64_t window_pixels(const Blocks& blocks) const {
    return window_rows(blocks.rows) * window_columns(blocks.columns);
  }
  // Pixel in window w of every output pixel of the block at the first tap; a tap adds tap_pixel to it.
  void place_pixels(const Block& block, const Window& w, int64_t* places) const {
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t i = 0; i < block.rows; ++i) {
        for (int64_t j = 0; j < block.columns; ++j) {
          *places++ = ((n * w.rows) + i * pixel_step_y()) * w.columns + j * pixel_step_x();
        }
      }
    }
  }
  int64_t tap_pixel(const Tap& tap, const Window& w) const {
    return (tap.dy - first_dy) * w.columns + tap.dx - first_dx;
  }
  // Whether the tap of a pixel of the block lies inside an H x W image and not in its padding.
  bool is_inside(const Tap& tap, const Block& block, int64_t pixel, int64_t H, int64_t W) const {
    const int64_t i = pixel / block.columns % block.rows, j = pixel % block.columns;
    const int64_t y = (block.row + i) * input_step_y + tap.dy, x = (block.column + j) * input_step_x + tap.dx;
    return y >= 0 && y < H && x >= 0 && x < W;
  }
  // The columns of row i of a block whose tap lies inside an H x W image.
  Columns inside_columns(const Tap& tap, const Block& block, int64_t i, int64_t H, int64_t W) const {
    const int64_t y = (block.row + i) * input_step_y + tap.dy, x = block.column * input_step_x + tap.dx;
    if (y < 0 || y >= H || x >= W) return {0, 0};
    return {x >= 0 ? 0 : ceil_div(-x, input_step_x), min_of(block.columns, ceil_div(W - x, input_step_x))};
  }
  // Whether some tap of the block lies in the padding of an H x W image.
  bool reads_padding(const Block& block, int64_t H, int64_t W) const {
    const Window w = input_window(block);
    return w.y < 0 || w.x < 0 || w.y + (w.rows - 1) * w.step_y >= H || w.x + (w.columns - 1) * w.step_x >= W;
  }
};

// Matrices of the taps: element (in, out) of group g is data[g group_stride + in * in_stride + out * out_stride] and on
// by the tap's weight_offset.
template <class Scalar>
struct Weights {
  const Scalar* data;
  int64_t group_stride, in_stride, out_stride;
  int64_t innermost_taps = 0;  // taps side by side in memory, next to each other as the channels of one of the strides
};

// One convolution as a sum over taps.
template <class Scalar>
struct Convolution {
  Images<const Scalar> input;
  Weights<Scalar> weights;
  const Scalar* bias;  // [output.C] or null
  Images<Scalar> output;
  int64_t groups;
  Grid grid;
};

// destination[t * tap_stride + i * row_stride + j] = element (i, j) of tap t of the grid, for `rows` x `columns`
// channels from `source` on, one of them coming in, the other going out. Taps that are innermost are read with their
// neighbours.
template <class Scalar, class T>
void pack_taps(const Grid& grid, int64_t innermost_taps, Matrix<Scalar> source, int64_t rows, int64_t columns,
               T* destination, int64_t row_stride, int64_t tap_stride) {
  const int64_t taps = grid.tap_count;
  if (innermost_taps != taps || taps == 1) {
    for (int64_t t = 0; t < taps; ++t) {
      pack_rows(Matrix<Scalar>{source.data + grid.taps[t].weight_offset, source.row_stride, source.column_stride}, rows,
                columns, destination + t * tap_stride, row_stride);
    }
    return;
  }
  Scratch<int64_t> offsets(taps);  // of the destination, by the tap's place in memory
  for (int64_t t = 0; t < taps; ++t) offsets[grid.taps[t].weight_offset] = t * tap_stride;
  if (source.row_stride == taps) {
    Scratch<int64_t> row_offsets(rows, taps);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t t = 0; t < taps; ++t) row_offsets[i * taps + t] = i * row_stride + offsets[t];
    }
    transpose_to_rows(source.data, source.column_stride, columns, rows * taps, destination,
                      [&](int64_t row) { return row_offsets[row]; });
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      transpose_to_rows(source.at(i, 0).data, taps, columns, taps, destination + i * row_stride,
                        [&](int64_t t) { return offsets[t]; });
    }
  }
}

template <class Scalar, class T = accumulate_t<Scalar>>
void stage_block(const Images<const Scalar>& images, const Block& block, int64_t channel, int64_t channels,
                 const Window& w, T* destination) {
  for (int64_t n = 0; n < block.images; ++n) {
    stage(images, block.image + n, channel, channels, w, destination + n * w.rows * w.columns * channels);
  }
}

template <class Scalar, class T = accumulate_t<Scalar>>
void unstage_block(const Images<Scalar>& images, const Block& block, int64_t channel, int64_t channels, const Window& w,
                   const T* source) {
  for (int64_t n = 0; n < block.images; ++n) {
    unstage(images, block.image + n, channel, channels, w, source + n * w.rows * w.columns * channels);
  }
}

// Padding times a weight or a gradient that is not finite would be NaN; these (only) meet no pixel outside the image.
template <class Element, class T = accumulate_t<Element>>
bool all_finite(const Element* values, int64_t count) {
  constexpr int64_t lanes = Vec<T>::size;
  Vec<T> sum = Vec<T>::zero();  // zero times anything finite
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) sum = fma(load(values + i), Vec<T>::zero(), sum);
  if (i < count) sum = fma(load(values + i, count - i), Vec<T>::zero(), sum);
  return reduce_add(sum) == T(0);
}

}  // namespace dlkernels::DLKERNELS_ISA
