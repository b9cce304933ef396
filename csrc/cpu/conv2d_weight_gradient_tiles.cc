// The gradient of a convolution's weight on matrix units: for each tap one product whose depth is the pixels.
//
//   dw[k][c][tap] = sum over output pixels of dout[pixel][k] in[pixel at the tap][c]
//
// Both operands are pixel-major; contiguous images are turned once. The pixels that a tap reads, padding among them,
// are staged as rows of their own; with a single tap at stride one they lie there already.
//
// Where the sums of all taps fit the second-level cache, a task takes some output rows of an image after another: their
// gradient is split once for all taps, and the pixels of each tap are split from the first-level cache. Chunks of rows
// are dealt to a number of parts that follows from the shape; the sums of the parts are added in order.
#include "conv2d_parts.h"
#include "gemm.h"

namespace dlkernels::DLKERNELS_ISA {

namespace {

// The type that pixels are staged in: bfloat16 that stay one plane move as they are.
template <class Scalar>
using staged_t = std::conditional_t<std::is_same_v<Scalar, bfloat16>, bfloat16, float>;

template <class Scalar>
void store_tap(const Conv2dBackwardArgs& args, const Tap& tap, int64_t k, int64_t c, int64_t count,
               const float* values) {
  const auto& strides = args.geometry.grad_weight_strides;
  Scalar* out = static_cast<Scalar*>(args.grad_weight) + tap.weight_offset + k * strides[0];
  if (strides[1] == 1) return narrow_row(values, count, out + c);
  for (int64_t i = 0; i < count; ++i) store_one(out + (c + i) * strides[1], values[i]);
}

// Where a weight's taps are innermost, rows of it are made of all taps at once: from sums[tap][k][c].
bool has_taps_innermost(const Conv2dGeometry& g) {
  const auto& strides = g.grad_weight_strides;
  return strides[3] == 1 && strides[2] == g.kernel_W && strides[1] == g.kernel_H * g.kernel_W;
}
template <class Scalar>
void store_all_taps(const Conv2dBackwardArgs& args, int64_t k, const float* sums) {
  const Conv2dGeometry& g = args.geometry;
  const int64_t taps = g.kernel_H * g.kernel_W;
  Scalar* out = static_cast<Scalar*>(args.grad_weight) + k * g.grad_weight_strides[0];
  transpose(sums + k * g.C, g.K * g.C, taps, g.C, out, taps);
}

template <int Planes, class Scalar>
class AllTaps {
  static constexpr int64_t kChunkPixels = 448, kSumBytes = 768 << 10, kParts = 8;

 public:
  AllTaps(const Conv2dBackwardArgs& args, const Grid& grid, const Images<const Scalar>& input,
          const Images<const Scalar>& gradient)
      : args_(args),
        g_(args.geometry),
        grid_(grid),
        input_(input),
        gradient_(gradient),
        chunk_rows_(max_of(1, min_of(kChunkPixels / g_.output_W, g_.output_H))),
        chunks_of_image_(ceil_div(g_.output_H, chunk_rows_)),
        units_(ceil_div(chunk_rows_ * g_.output_W, kTileDepth)),
        tap_size_(g_.K * g_.C) {}

  static bool suits(const Conv2dGeometry& g) {
    const int64_t taps = g.kernel_H * g.kernel_W;
    return Planes < 3 && taps > 1 && taps * g.K * g.C * 4 <= kSumBytes && g.output_W <= kChunkPixels &&
           g.output_H * g.output_W >= 4 * kTileDepth;
  }

  // False where a number cannot be split.
  bool run() {
    const int64_t chunks = g_.N * chunks_of_image_, parts = min_of(kParts, chunks), size = grid_.tap_count * tap_size_;
    const Scratch<float> sums(parts, size);
    parallel_for(parts, 1, [&](int64_t part) {
      add_chunks(part * chunks / parts, (part + 1) * chunks / parts, sums.data() + part * size);
    });
    if (!is_split_) return false;
    parallel_for(g_.K, 4, [&](int64_t k) {
      for (int64_t t = 0; t < grid_.tap_count; ++t) {
        float* sum = sums.data() + t * tap_size_ + k * g_.C;
        for (int64_t part = 1; part < parts; ++part) add_to(sum, sum + part * size, g_.C);
        if (!has_taps_innermost(g_)) store_tap<Scalar>(args_, grid_.taps[t], k, 0, g_.C, sum);
      }
      if (has_taps_innermost(g_)) store_all_taps<Scalar>(args_, k, sums.data());
    });
    return true;
  }

 private:
  void add_chunks(int64_t first, int64_t last, float* sums) {
    const Scratch<LeftUnit<Planes>> left(round_up(g_.K, kTileHeight), units_);
    const Scratch<RightUnit<Planes>> right(units_);
    const Scratch<staged_t<Scalar>> staged(chunk_rows_, g_.output_W, g_.C);
    Tiles tiles;
    bool split = true;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t n = chunk / chunks_of_image_, row = chunk % chunks_of_image_ * chunk_rows_;
      const int64_t rows = min_of(chunk_rows_, g_.output_H - row), pixels = rows * g_.output_W;
      const Matrix<Scalar> gradient = {gradient_.at(n, 0, row, 0), 1, g_.K};
      split &= split_left(gradient, g_.K, pixels, left.data(), units_);
      for (int64_t t = 0; t < grid_.tap_count; ++t) {
        const Tap& tap = grid_.taps[t];
        const Window window = {row * g_.stride_H + tap.dy, tap.dx, rows, g_.output_W, g_.stride_H, g_.stride_W};
        stage(input_, n, 0, g_.C, window, staged.data());
        split &= add_tap(tiles, left.data(), staged.data(), pixels, right.data(), sums + t * tap_size_, chunk > first);
      }
    }
    if (!split) __atomic_store_n(&is_split_, false, __ATOMIC_RELAXED);
  }

  // sums[k][c] (+)= sum over the chunk's pixels of gradient[pixel][k] staged[pixel][c].
  bool add_tap(Tiles& tiles, const LeftUnit<Planes>* left, const staged_t<Scalar>* staged, int64_t pixels,
               RightUnit<Planes>* right, float* sums, bool accumulate) const {
    bool split = true;
    const int64_t units = ceil_div(pixels, kTileDepth);
    for (int64_t c = 0; c < g_.C; c += kSplitColumns) {
      const int64_t columns = min_of(kSplitColumns, g_.C - c);
      split &= split_right(Matrix<staged_t<Scalar>>{staged + c, g_.C, 1}, pixels, columns, right);
      const UnitSegment segment = {units, 0, 0};
      for (int64_t k = 0; k < g_.K; k += kSplitRows) {
        multiply_split<Planes>(tiles, min_of(kSplitRows, g_.K - k), columns, {left + k * units_, units_}, right,
                               &segment, 1, sums + k * g_.C + c, g_.C, accumulate);
      }
    }
    return split;
  }

  const Conv2dBackwardArgs& args_;
  const Conv2dGeometry& g_;
  const Grid& grid_;
  Images<const Scalar> input_, gradient_;  // channels last
  int64_t chunk_rows_, chunks_of_image_, units_, tap_size_;
  bool is_split_ = true;
};

}  // namespace

template <class Scalar>
bool weight_gradient_on_tiles(const Conv2dBackwardArgs& args) {
  const Conv2dGeometry& g = args.geometry;
  const int64_t pixels = g.N * g.output_H * g.output_W;
  if (g.groups > 1 || g.C < kFewestTileChannels || g.K < kFewestTileChannels || pixels < kFewestTilePixels) {
    return false;
  }
  if constexpr (kHasTiles && !std::is_same_v<Scalar, double>) {
    Scratch<Tap> taps(g.kernel_H, g.kernel_W);
    Phase phase;
    const Grid grid = forward_grid(g, g.grad_weight_strides, taps.data(), &phase);
    const auto* grad_output = static_cast<const Scalar*>(args.grad_output);
    const Images<const Scalar> outputs = output_images(g, grad_output);
    if (spoils_padding(g, grid, grad_output)) return false;
    const Images<const Scalar> inputs = input_images(g, static_cast<const Scalar*>(args.input));
    const auto input = ImagesInLayout<Scalar>::as_rows(inputs), gradient = ImagesInLayout<Scalar>::as_rows(outputs);
    const bool in_place =
        grid.tap_count == 1 && g.stride_H == 1 && g.stride_W == 1 && g.output_H == g.H && g.output_W == g.W;
    const bool takes_all_taps = with_planes<Scalar>([&](auto planes) {
      using Sums = AllTaps<planes(), Scalar>;
      return Sums::suits(g) && Sums(args, grid, input.images, gradient.images).run();
    });
    if (takes_all_taps) return true;
    using Staged = staged_t<Scalar>;
    const Scratch<Staged> staged(in_place ? 0 : pixels, g.C);
    const Matrix<Scalar> left = {gradient.images.data, 1, g.K};
    const bool stores_later = grid.tap_count > 1 && has_taps_innermost(g);
    const Scratch<float> sums(stores_later ? grid.tap_count : 0, g.K, g.C);
    for (const Tap* tap = grid.taps; tap != grid.taps + grid.tap_count; ++tap) {
      auto store_rows = [&](int64_t k, int64_t c, int64_t count, const float* values) {
        if (!stores_later) return store_tap<Scalar>(args, *tap, k, c, count, values);
        widen_row(values, count, sums.data() + ((tap - grid.taps) * g.K + k) * g.C + c);
      };
      if (in_place) {
        gemm<float>(g.K, g.C, pixels, left, Matrix<Scalar>{input.images.data, g.C, 1}, store_rows);
        continue;
      }
      const Window window = {tap->dy, tap->dx, g.output_H, g.output_W, g.stride_H, g.stride_W};
      parallel_for(g.N, 1, [&](int64_t n) {
        stage(input.images, n, 0, g.C, window, staged.data() + n * g.output_H * g.output_W * g.C);
      });
      gemm<float>(g.K, g.C, pixels, left, Matrix<Staged>{staged.data(), g.C, 1}, store_rows);
    }
    if (stores_later) {
      parallel_for(g.K, 4, [&](int64_t k) { store_all_taps<Scalar>(args, k, sums.data()); });
    }
    return true;
  }
  return false;
}

template bool weight_gradient_on_tiles<float>(const Conv2dBackwardArgs&);
template bool weight_gradient_on_tiles<double>(const Conv2dBackwardArgs&);
template bool weight_gradient_on_tiles<bfloat16>(const Conv2dBackwardArgs&);
template bool weight_gradient_on_tiles<float16>(const Conv2dBackwardArgs&);

}  // namespace dlkernels::DLKERNELS_ISA
