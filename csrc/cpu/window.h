// Windows of images. A convolution kernel works on one small pixel-major array, [row][column][channel] in the type of
// the sums with the padding written out as zeros; these functions cut it out of a batch of images in either layout, and
// put results back. The two layouts differ here and nowhere else, so they give the same bits.
#pragma once

#include "pack.h"
#include "parallel.h"

namespace dlkernels::DLKERNELS_ISA {

// A batch of dense images, [H][W][C] (channels_last) or [C][H][W], image_stride elements apart.
template <class Scalar>
struct Images {
  Scalar* data;
  int64_t image_stride;
  int64_t N, C, H, W;
  bool channels_last;

  int64_t column_stride() const { return channels_last ? C : 1; }
  int64_t channel_stride() const { return channels_last ? 1 : H * W; }
  Scalar* at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return data + n * image_stride + (channels_last ? (y * W + x) * C + c : (c * H + y) * W + x);
  }
};

// Pixels (y + i * step_y, x + j * step_x) of one image for i < rows, j < columns; those outside the image are zero.
struct Window {
  int64_t y, x, rows, columns, step_y, step_x;
};

namespace detail {

// A window is in the type of the sums, or in that of the images where products take it so.
template <class Scalar>
inline void copy_row(const Scalar* source, int64_t count, accumulate_t<Scalar>* destination) {
  widen_row(source, count, destination);
}
template <class Scalar>
inline void copy_one(const Scalar* source, accumulate_t<Scalar>* destination) {
  *destination = load_one(source);
}
inline void copy_one(const bfloat16* source, bfloat16* destination) {
  *destination = *source;
}
inline void copy_row(const bfloat16* source, int64_t count, bfloat16* destination) {
  __builtin_memcpy(destination, source, static_cast<size_t>(count) * sizeof(bfloat16));
}

// `count` pixels of one row, `step` apart, from `source` (a channel of the first of them) to pixel-major.
template <class Scalar, class T>
inline void stage_pixels(const Images<const Scalar>& images, const Scalar* source, int64_t count, int64_t step,
                         int64_t channels, T* destination) {
  const int64_t column_stride = step * images.column_stride(), channel_stride = images.channel_stride();
  if (column_stride == channels && (channel_stride == 1 || channels == 1)) {
    copy_row(source, count * channels, destination);
  } else if (channel_stride == 1) {
    for (int64_t j = 0; j < count; ++j) copy_row(source + j * column_stride, channels, destination + j * channels);
  } else if (step == 1) {
    transpose(source, channel_stride, channels, count, destination, channels);
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t j = 0; j < count; ++j) {
        copy_one(source + c * channel_stride + j * column_stride, destination + j * channels + c);
      }
    }
  }
}

template <class Scalar, class T>
inline void unstage_pixels(const Images<Scalar>& images, const T* source, int64_t count, int64_t step, int64_t channels,
                           Scalar* destination) {
  const int64_t column_stride = step * images.column_stride(), channel_stride = images.channel_stride();
  if (column_stride == channels && (channel_stride == 1 || channels == 1)) {
    narrow_row(source, count * channels, destination);
  } else if (channel_stride == 1) {
    for (int64_t j = 0; j < count; ++j) narrow_row(source + j * channels, channels, destination + j * column_stride);
  } else if (step == 1) {
    transpose(source, channels, count, channels, destination, channel_stride);
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t j = 0; j < count; ++j) {
        store_one(destination + c * channel_stride + j * column_stride, source[j * channels + c]);
      }
    }
  }
}

// Whether the window's rows follow one another in memory, so that it is one long row.
template <class Scalar>
inline bool is_one_run(const Images<Scalar>& images, const Window& w) {
  return w.step_y == 1 && w.step_x == 1 && w.x == 0 && w.columns == images.W && w.y >= 0 && w.y + w.rows <= images.H;
}

}  // namespace detail

// destination[i][j][c] = pixel (i, j) of the window, channels [channel, channel + channels), of image n.
template <class Scalar, class T = accumulate_t<Scalar>>
inline void stage(const Images<const Scalar>& images, int64_t n, int64_t channel, int64_t channels, const Window& w,
                  T* destination) {
  if (detail::is_one_run(images, w)) {
    detail::stage_pixels(images, images.at(n, channel, w.y, 0), w.rows * w.columns, 1, channels, destination);
    return;
  }
  const int64_t first = min_of(w.columns, w.x >= 0 ? 0 : ceil_div(-w.x, w.step_x));
  const int64_t end = max_of(first, w.x >= images.W ? 0 : min_of(w.columns, ceil_div(images.W - w.x, w.step_x)));
  for (int64_t i = 0; i < w.rows; ++i, destination += w.columns * channels) {
    const int64_t y = w.y + i * w.step_y;
    if (y < 0 || y >= images.H || first == end) {
      fill(destination, T{}, w.columns * channels);
      continue;
    }
    fill(destination, T{}, first * channels);
    detail::stage_pixels(images, images.at(n, channel, y, w.x + first * w.step_x), end - first, w.step_x, channels,
                         destination + first * channels);
    fill(destination + end * channels, T{}, (w.columns - end) * channels);
  }
}

// The reverse, for a window that lies inside the image.
template <class Scalar, class T = accumulate_t<Scalar>>
inline void unstage(const Images<Scalar>& images, int64_t n, int64_t channel, int64_t channels, const Window& w,
                    const T* source) {
  if (detail::is_one_run(images, w)) {
    detail::unstage_pixels(images, source, w.rows * w.columns, 1, channels, images.at(n, channel, w.y, 0));
    return;
  }
  for (int64_t i = 0; i < w.rows; ++i, source += w.columns * channels) {
    detail::unstage_pixels(images, source, w.columns, w.step_x, channels,
                           images.at(n, channel, w.y + i * w.step_y, w.x));
  }
}

// destination = source, in the layout of each.
template <class Scalar>
inline void copy_images(const Images<const Scalar>& source, const Images<Scalar>& destination) {
  const int64_t pixels = source.H * source.W, strip = 64, strips = ceil_div(pixels, strip);
  parallel_for(source.N * strips, ceil_div(1 << 15, strip * source.C), [&](int64_t task) {
    const int64_t n = task / strips, first = task % strips * strip, count = min_of(strip, pixels - first);
    const Scalar* from = source.at(n, 0, 0, 0);
    Scalar* to = destination.at(n, 0, 0, 0);
    if (source.channels_last && destination.channels_last) {
      __builtin_memcpy(to + first * source.C, from + first * source.C,
                       static_cast<size_t>(count * source.C) * sizeof(Scalar));
    } else if (destination.channels_last) {
      transpose(from + first, pixels, source.C, count, to + first * source.C, source.C);
    } else {
      transpose(from + first * source.C, source.C, count, source.C, to + first, pixels);
    }
  });
}

// Whether images follow one another without a gap.
template <class Scalar>
inline bool are_dense(const Images<Scalar>& images) {
  return images.image_stride == images.C * images.H * images.W || images.N == 1;
}

// Images in the layout that is wanted: a copy of those in the other one if they are cut into windows again and again,
// for a transposition of every window costs more.
template <class Scalar>
class ImagesInLayout {
 public:
  static ImagesInLayout of(const Images<const Scalar>& source, bool channels_last, bool used_often) {
    return ImagesInLayout(source, channels_last, used_often && source.channels_last != channels_last && source.C > 1);
  }
  // Pixels as the rows of one matrix.
  static ImagesInLayout as_rows(const Images<const Scalar>& source) {
    return ImagesInLayout(source, true, !source.channels_last || !are_dense(source));
  }

  Images<const Scalar> images;

 private:
  ImagesInLayout(const Images<const Scalar>& source, bool channels_last, bool copies)
      : images(source), copy_(copies ? source.N : 0, source.C, source.H, source.W) {
    if (!copies) return;
    const Images<Scalar> copy = {copy_.data(), source.C * source.H * source.W, source.N, source.C, source.H, source.W,
                                 channels_last};
    copy_images(source, copy);
    images = {copy.data, copy.image_stride, copy.N, copy.C, copy.H, copy.W, channels_last};
  }
  Scratch<Scalar> copy_;
};

// ---- a grid of pixels over a batch, cut into blocks ---------------------------------------------------------------

struct Block {
  int64_t image, row, column;     // of the first pixel
  int64_t images, rows, columns;  // size
  int64_t pixels() const { return images * rows * columns; }
};

// Blocks of about `wanted_pixels`: parts of a row, rows of one image, or whole images. Follows from the sizes alone.
struct Blocks {
  int64_t N, H, W;
  int64_t images, rows, columns;  // size of all blocks but the last ones
  int64_t image_blocks, row_blocks, column_blocks;

  Blocks(int64_t N_, int64_t H_, int64_t W_, int64_t wanted_pixels) : N(N_), H(H_), W(W_) {
    columns = ceil_div(W, ceil_div(W, wanted_pixels));
    rows = ceil_div(H, ceil_div(H, max_of(1, wanted_pixels / columns)));
    set_images(rows == H && columns == W ? max_of(1, wanted_pixels / (rows * columns)) : 1);
    row_blocks = ceil_div(H, rows);
    column_blocks = ceil_div(W, columns);
  }
  // No more images in a block than `most`.
  void limit_images(int64_t most) { set_images(max_of(1, min_of(images, most))); }
  // About as many images in every block.
  void set_images(int64_t most) {
    images = ceil_div(max_of(N, 1), ceil_div(max_of(N, 1), most));
    image_blocks = ceil_div(N, images);
  }
  int64_t count() const { return image_blocks * row_blocks * column_blocks; }
  int64_t pixels() const { return images * rows * columns; }
  Block at(int64_t index) const {
    Block block;
    block.column = index % column_blocks * columns;
    block.row = index / column_blocks % row_blocks * rows;
    block.image = index / column_blocks / row_blocks * images;
    block.columns = min_of(columns, W - block.column);
    block.rows = min_of(rows, H - block.row);
    block.images = min_of(images, N - block.image);
    return block;
  }
};

}  // namespace dlkernels::DLKERNELS_ISA
