// Images as the products of a convolution read them: channels side by side, and the patches under a kernel.
#pragma once

#include "cpu/conv2d.h"
#include "cuda/lay_out.cuh"
#include "cuda/multiply.cuh"

namespace dlkernels::DLKERNELS_ISA {

// ---- images with their channels side by side -----------------------------------------------------------------------

// [N][H][W][groups][padded]: the channels of a group, zeros after them.
template <class Scalar>
struct Images {
  const Scalar* data;
  int64_t N, H, W, groups, channels, padded;  // channels: of a group
  int64_t image_stride;

  int64_t pixel_stride() const { return groups * padded; }
};

// How images were given.
template <class Scalar>
struct GivenImages {
  const Scalar* data;
  int64_t N, C, H, W, groups, image_stride;
  bool channels_last;
};

template <class Scalar>
Images<Scalar> side_by_side(const GivenImages<Scalar>& given) {
  const int64_t channels = given.C / given.groups, pixels = given.H * given.W;
  Images<Scalar> images = {given.data, given.N, given.H, given.W, given.groups, channels, channels, given.image_stride};
  if (given.channels_last && channels % Pack<Scalar>::size == 0 && is_aligned(given.data, given.image_stride)) {
    return images;
  }
  images.padded = whole_chunks<Scalar>(channels);
  images.image_stride = pixels * images.pixel_stride();
  images.data = lay_out(Strided<Scalar>{given.data, given.N, pixels, given.groups, channels, given.image_stride,
                                        given.channels_last ? given.C : 1, given.channels_last ? 1 : pixels});
  return images;
}

// ---- patches -------------------------------------------------------------------------------------------------------

// The position in an image, in one dimension, that a product's pixel i and tap t meet.
struct Walk {
  int stride, origin, tap_step;  // i * stride + origin + t * tap_step
};

// The numbers under a kernel at every pixel: line: a pixel, along it (tap, channel). Zero outside of the image.
template <class Scalar_, bool kAlongDepth>
struct Patches {
  using Scalar = Scalar_;
  static constexpr bool along_depth = kAlongDepth;
  const Scalar* data;
  int64_t image_stride, row_stride, pixel_stride;
  int H, W;
  int64_t pixels, length;  // of all images; numbers in a patch
  Divider pixels_of_image, pixels_of_row, channels, tap_columns;
  Walk walk_H, walk_W;

  Patches(const Images<Scalar>& images, int64_t rows, int64_t columns, const Walk& h, const Walk& w, int64_t tap_rows,
          int64_t tap_columns_)
      : data(images.data),
        image_stride(images.image_stride),
        row_stride(images.W * images.pixel_stride()),
        pixel_stride(images.pixel_stride()),
        H(static_cast<int>(images.H)),
        W(static_cast<int>(images.W)),
        pixels(images.N * rows * columns),
        length(tap_rows * tap_columns_ * images.padded),
        pixels_of_image(rows * columns),
        pixels_of_row(columns),
        channels(images.padded),
        tap_columns(tap_columns_),
        walk_H(h),
        walk_W(w) {}

  __device__ __forceinline__ Patches of_group(int64_t group) const {
    Patches moved = *this;
    moved.data += group * channels.divisor();
    return moved;
  }

  struct Line {
    const Scalar* image;
    int h, w;
  };
  struct Along {
    int64_t channel;
    int h, w;
  };
  static constexpr int kNowhere = -(1 << 30);

  __device__ __forceinline__ Line line(int64_t pixel) const {
    const Division image(pixel, pixels_of_image);
    const Division place(image.remainder, pixels_of_row);
    if (pixel >= pixels) return {data, kNowhere, 0};
    return {data + image.quotient * image_stride, static_cast<int>(place.quotient) * walk_H.stride + walk_H.origin,
            static_cast<int>(place.remainder) * walk_W.stride + walk_W.origin};
  }
  __device__ __forceinline__ Along along(int64_t place) const {
    const Division tap(place, channels);
    const Division row(tap.quotient, tap_columns);
    return {tap.remainder, place < length ? static_cast<int>(row.quotient) * walk_H.tap_step : kNowhere,
            static_cast<int>(row.remainder) * walk_W.tap_step};
  }
  __device__ __forceinline__ Chunk<Scalar> chunk(const Line& line, const Along& along) const {
    const int h = line.h + along.h, w = line.w + along.w;
    const bool inside = h >= 0 && h < H && w >= 0 && w < W;
    return {inside ? line.image + (h * row_stride + w * pixel_stride + along.channel) : data,
            inside ? Pack<Scalar>::size : 0};
  }
};

// ---- the images of a call -------------------------------------------------------------------------------------------

inline int as_int(int64_t value) {
  return static_cast<int>(value);
}

template <class Scalar>
Images<Scalar> input_images(const Conv2dGeometry& g, const void* input) {
  return side_by_side<Scalar>(
      {static_cast<const Scalar*>(input), g.N, g.C, g.H, g.W, g.groups, g.input_image_stride, g.channels_last});
}
template <class Scalar>
Images<Scalar> output_images(const Conv2dGeometry& g, const void* output) {
  return side_by_side<Scalar>({static_cast<const Scalar*>(output), g.N, g.K, g.output_H, g.output_W, g.groups,
                               g.output_image_stride, g.channels_last});
}

template <class Scalar, bool kAlongDepth>
Patches<Scalar, kAlongDepth> input_patches(const Conv2dGeometry& g, const Images<Scalar>& input) {
  return {input,
          g.output_H,
          g.output_W,
          {as_int(g.stride_H), as_int(-g.padding_top), as_int(g.dilation_H)},
          {as_int(g.stride_W), as_int(-g.padding_left), as_int(g.dilation_W)},
          g.kernel_H,
          g.kernel_W};
}

}  // namespace dlkernels::DLKERNELS_ISA
