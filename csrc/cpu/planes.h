// Windows of images as planes: [channel][plane of the row][plane of the column][image][row][column], padding written
// out as zeros. What a tap reads for neighbouring output pixels is contiguous in a plane, for every stride. An output
// pixel (n, i, j) of a block stands at `flat` in every plane; a tap adds an offset.
//
// Rows that are the stride apart share a plane. Columns that are the stride apart do too in shared planes, which hold
// every element of the window once and, between the rows, pixels that no output has. Otherwise every column of taps has
// planes of its own, as wide as the block: copies, but nothing between the rows.
#pragma once

#include "taps.h"

namespace dlkernels::DLKERNELS_ISA {

struct Planes {
  Window window;
  int64_t images, planes_y, planes_x;
  int64_t plane_step;     // pixels of the input from the first of one plane of columns to that of the next
  int64_t column_step;    // and between neighbours in a plane
  int64_t rows, columns;  // of one image in one plane
  int64_t plane, channel_stride;
  bool shared;

  Planes(const Grid& grid, const Block& block, bool shared_)
      : window(grid.input_window(block)), images(block.images), planes_y(grid.pixel_step_y()), shared(shared_) {
    if (shared) {
      planes_x = grid.pixel_step_x();
      plane_step = window.step_x;
      columns = ceil_div(window.columns, planes_x);
    } else {
      plane_step = grid.tap_step_x();
      planes_x = (grid.last_dx - grid.first_dx) / plane_step + 1;
      columns = block.columns;
    }
    column_step = grid.input_step_x;
    rows = ceil_div(window.rows, planes_y);
    plane = images * rows * columns;
    channel_stride = round_up(planes_y * planes_x * plane, 16);
    if (channel_stride % 512 == 0) channel_stride += 16;  // channels in different sets of the first-level cache
  }
  int64_t flat(int64_t n, int64_t i, int64_t j) const { return (n * rows + i) * columns + j; }
  // Pixels from the first of the block to the last, those between rows included.
  int64_t flat_pixels(const Block& block) const { return flat(block.images - 1, block.rows - 1, block.columns); }
  int64_t tap_offset(const Tap& tap, const Grid& grid) const {
    const int64_t y = tap.dy - grid.first_dy, x = tap.dx - grid.first_dx;
    const int64_t plane_x = shared ? x % planes_x : x / plane_step, column = shared ? x / planes_x : 0;
    return (y % planes_y * planes_x + plane_x) * plane + y / planes_y * columns + column;
  }
};

namespace detail {

// Every second lane of the 2 * size elements a b.
template <class T, size_t... Lane>
DLKERNELS_INLINE Vec<T> even_lanes(Vec<T> a, Vec<T> b, std::index_sequence<Lane...>) {
  return Vec<T>(__builtin_shufflevector(a.raw, b.raw, static_cast<int>(2 * Lane)...));
}
// Every Step-th of Step * size elements; Step is a power of two.
template <int Step, class Scalar, class T = accumulate_t<Scalar>>
DLKERNELS_INLINE Vec<T> load_every(const Scalar* p) {
  if constexpr (Step == 1) {
    return load(p);
  } else {
    constexpr int64_t half = Step / 2 * Vec<T>::size;
    return even_lanes(load_every<Step / 2>(p), load_every<Step / 2>(p + half),
                      std::make_index_sequence<static_cast<size_t>(Vec<T>::size)>());
  }
}
template <int Step, class Scalar, class T>
inline void gather_row(const Scalar* source, int64_t count, T* destination) {
  int64_t i = 0;
  // The vectors reach Step - 1 elements beyond the last one wanted, so that another one must follow.
  constexpr int64_t lanes = Vec<accumulate_t<T>>::size;
  for (; i + lanes < count; i += lanes) store(destination + i, load_every<Step>(source + i * Step));
  for (; i < count; ++i) copy_one(source + i * Step, destination + i);
}

}  // namespace detail

// destination[i] = source[i * step]
template <class Scalar, class T = accumulate_t<Scalar>>
inline void gather_row(const Scalar* source, int64_t step, int64_t count, T* destination) {
  if (step == 1) {
    detail::copy_row(source, count, destination);
  } else if (step == 2) {
    detail::gather_row<2>(source, count, destination);
  } else if (step == 4) {
    detail::gather_row<4>(source, count, destination);
  } else {
    for (int64_t i = 0; i < count; ++i) detail::copy_one(source + i * step, destination + i);
  }
}

// destination[i * step] = source[i]
template <class T>
inline void scatter_row(const T* source, int64_t step, int64_t count, T* destination) {
  for (int64_t i = 0; i < count; ++i) destination[i * step] = source[i];
}

// Row y of the image, for `channels` channels, in every plane of columns.
template <class Scalar, class T = accumulate_t<Scalar>>
inline void stage_row(const Images<const Scalar>& images, int64_t n, int64_t channel, int64_t channels, int64_t y,
                      const Planes& p, T* destination) {
  const int64_t step = p.column_step;
  const bool inside = y >= 0 && y < images.H && p.window.x >= 0 && p.window.x + p.columns * step <= images.W;
  if (step > 4 && p.planes_x == step && inside && !images.channels_last) {  // neighbours go to neighbouring planes
    for (int64_t c = 0; c < channels; ++c) {
      transpose(images.at(n, channel + c, y, p.window.x), step, p.columns, step, destination + c * p.channel_stride,
                p.plane);
    }
    return;
  }
  for (int64_t plane_x = 0; plane_x < p.planes_x; ++plane_x, destination += p.plane) {
    const int64_t x = p.window.x + plane_x * p.plane_step;
    const int64_t first = x >= 0 ? 0 : min_of(p.columns, ceil_div(-x, step));
    const bool outside = y < 0 || y >= images.H || x >= images.W;
    const int64_t end = outside ? first : max_of(first, min_of(p.columns, ceil_div(images.W - x, step)));
    if (first > 0 || end < p.columns) {
      for (int64_t c = 0; c < channels; ++c) {
        fill(destination + c * p.channel_stride, T{}, first);
        fill(destination + c * p.channel_stride + end, T{}, p.columns - end);
      }
    }
    if (first == end) continue;
    const Scalar* source = images.at(n, channel, y, x + first * step);
    if (images.channels_last && images.C > 1) {
      transpose(source, step * images.C, end - first, channels, destination + first, p.channel_stride);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        gather_row(source + c * images.H * images.W, step, end - first, destination + c * p.channel_stride + first);
      }
    }
  }
}

// destination = the planes of channels [channel, channel + channels) of the block's images.
template <class Scalar, class T = accumulate_t<Scalar>>
inline void stage_planes(const Images<const Scalar>& images, const Block& block, int64_t channel, int64_t channels,
                         const Planes& p, T* destination) {
  const bool one_run =
      p.planes_y == 1 && p.planes_x == 1 && p.columns == images.W && detail::is_one_run(images, p.window);
  for (int64_t n = 0; n < block.images; ++n) {
    if (one_run) {
      const Scalar* source = images.at(block.image + n, channel, p.window.y, 0);
      const int64_t pixels = p.rows * p.columns;
      if (images.channels_last && images.C > 1) {
        transpose(source, images.C, pixels, channels, destination + p.flat(n, 0, 0), p.channel_stride);
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        detail::copy_row(source + c * images.H * images.W, pixels,
                         destination + c * p.channel_stride + p.flat(n, 0, 0));
      }
      continue;
    }
    for (int64_t plane_y = 0; plane_y < p.planes_y; ++plane_y) {
      for (int64_t i = 0; i < p.rows; ++i) {
        stage_row(images, block.image + n, channel, channels, p.window.y + (i * p.planes_y + plane_y) * p.window.step_y,
                  p, destination + plane_y * p.planes_x * p.plane + p.flat(n, i, 0));
      }
    }
  }
}

}  // namespace dlkernels::DLKERNELS_ISA
