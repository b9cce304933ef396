// Convolution with one channel per group. There is no product: each tap is a multiply-add of a vector, along the
// channels of channels_last images, which are read where they lie, or along the pixels of contiguous ones, a channel at
// a time staged as a plane with its padding (planes.h). Several outputs are computed together, so that an input that
// several of them read is loaded once. Both add the taps in the same order; a tap in the padding adds zero or is left
// out.
//
// The gradient of the weight keeps a sum per tap in registers over the pixels of a chunk.
#include "conv2d_parts.h"
#include "planes.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int64_t kDepthwisePixels = 512;
constexpr int64_t kPlanePixels = 2048;  // output pixels of a plane in the first-level cache
constexpr int64_t kDepthwiseChannels = 64;

// The taps of a phase: rows x columns of them, the first at (dy, dx), the others equal steps away.
struct TapRectangle {
  int64_t rows, columns, dy, dx, step_y, step_x;

  TapRectangle(const Tap* taps, int64_t count) : rows(0), columns(0), dy(0), dx(0), step_y(1), step_x(1) {
    if (count == 0) return;
    while (columns < count && taps[columns].dy == taps[0].dy) ++columns;
    rows = count / columns;
    dy = taps[0].dy, dx = taps[0].dx;
    if (rows > 1) step_y = taps[columns].dy - dy;
    if (columns > 1) step_x = taps[1].dx - dx;
  }
};

// ---- lanes are channels ---------------------------------------------------------------------------------------------

// One vector of channels of Pixels outputs of a row, `taps` rows of Columns taps each: the inputs of a row of taps are
// loaded once for all the outputs. Source rows are row_stride apart, pixels pixel_stride, outputs Step pixels.
template <int Columns, int Step, int Pixels, class Scalar, class T = accumulate_t<Scalar>>
DLKERNELS_INLINE void apply_taps(const Scalar* source, int64_t row_stride, int64_t pixel_stride, int64_t tap_rows,
                                 const T* weight, int64_t weight_stride, Vec<T> bias, int64_t lanes, Scalar* out,
                                 int64_t out_stride) {
  Vec<T> sum[Pixels];
  for (int p = 0; p < Pixels; ++p) sum[p] = Vec<T>::zero();
  for (int64_t row = 0; row < tap_rows; ++row, source += row_stride, weight += Columns * weight_stride) {
    Vec<T> w[Columns], in[(Pixels - 1) * Step + Columns];
    for (int t = 0; t < Columns; ++t) w[t] = load_lanes(weight + t * weight_stride, lanes);
#pragma GCC unroll 32
    for (int i = 0; i < (Pixels - 1) * Step + Columns; ++i) in[i] = load_lanes(source + i * pixel_stride, lanes);
#pragma GCC unroll 8
    for (int t = 0; t < Columns; ++t) {
#pragma GCC unroll 8
      for (int p = 0; p < Pixels; ++p) sum[p] = fma(in[p * Step + t], w[t], sum[p]);
    }
  }
  for (int p = 0; p < Pixels; ++p) store_lanes(out + p * out_stride, sum[p] + bias, lanes);
}

template <class Scalar>
class ChannelLanes {
  using T = accumulate_t<Scalar>;
  static constexpr int64_t kPixels = 8;  // outputs computed together

 public:
  explicit ChannelLanes(const Convolution<Scalar>& convolution)
      : conv_(convolution),
        grid_(convolution.grid),
        blocks_(conv_.input.N, grid_.rows, grid_.columns, kDepthwisePixels) {
    blocks_.limit_images(1);
  }

  void run() {
    const int64_t C = conv_.input.C, taps = grid_.tap_count;
    Scratch<T> packed(taps + 1, C);  // [tap][channel], then the bias
    for (int64_t t = 0; t < taps; ++t) {
      const Scalar* source = conv_.weights.data + grid_.taps[t].weight_offset;
      for (int64_t c = 0; c < C; ++c) packed[t * C + c] = load_one(source + c * conv_.weights.group_stride);
    }
    fill(packed.data() + taps * C, T(0), C);
    if (conv_.bias != nullptr) widen_row(conv_.bias, C, packed.data() + taps * C);
    weight_ = packed.data();
    const double work = 1.0 * conv_.input.N * grid_.rows * grid_.columns * C * taps;
    const int64_t tasks = blocks_.count();
    parallel_for(tasks, work < kSerialWork / 4 ? tasks : 1, [&](int64_t task) {
      const Block block = blocks_.at(task);
      for (int64_t index = 0; index < grid_.phase_count; ++index) {
        const Phase& phase = grid_.phases[index];
        const Block part = grid_.phase_block(block, phase);
        const TapRectangle rectangle(grid_.taps + phase.first_tap, phase.tap_count);
        for (int64_t i = 0; i < part.rows; ++i) run_row(part, phase, rectangle, i);
      }
    });
  }

 private:
  // One row of outputs. Taps outside the image are left out: rows of them for the whole row, columns at its two ends.
  void run_row(const Block& block, const Phase& phase, const TapRectangle& taps, int64_t i) const {
    const Images<const Scalar>& input = conv_.input;
    const int64_t y = (block.row + i) * grid_.input_step_y + taps.dy;
    const int64_t first = y >= 0 ? 0 : min_of(taps.rows, ceil_div(-y, taps.step_y));
    const int64_t end = y >= input.H ? first : max_of(first, min_of(taps.rows, ceil_div(input.H - y, taps.step_y)));
    const int64_t x = block.column * grid_.input_step_x + taps.dx, last_x = x + (taps.columns - 1) * taps.step_x;
    const int64_t step = grid_.input_step_x;
    const int64_t inside = x >= 0 ? 0 : min_of(block.columns, ceil_div(-x, step));
    const int64_t inside_end =
        max_of(inside, last_x >= input.W ? 0 : min_of(block.columns, ceil_div(input.W - last_x, step)));
    const Window w = grid_.output_window(block, phase);
    Scalar* out = conv_.output.at(block.image, 0, w.y + i * w.step_y, w.x);
    const int64_t out_step = w.step_x * input.C;
    const T* weight = weight_ + (phase.first_tap + first * taps.columns) * input.C;
    const Scalar* row = input.at(block.image, 0, y + first * taps.step_y, 0);
    for (int64_t j = 0; j < block.columns; ++j) {
      if (j == inside && inside < inside_end) {
        run_inside(taps, end - first, row + (x + j * step) * input.C, weight, inside_end - inside, out + j * out_step,
                   out_step);
        j = inside_end;
        if (j == block.columns) break;
      }
      const int64_t left = x + j * step;
      const int64_t tap = left >= 0 ? 0 : min_of(taps.columns, ceil_div(-left, taps.step_x));
      const int64_t tap_end =
          max_of(tap, left >= input.W ? 0 : min_of(taps.columns, ceil_div(input.W - left, taps.step_x)));
      run_pixel(taps, end - first, row + (left + tap * taps.step_x) * input.C, weight + tap * input.C, tap_end - tap,
                out + j * out_step);
    }
  }

  // One output of `columns` columns of taps.
  void run_pixel(const TapRectangle& taps, int64_t tap_rows, const Scalar* source, const T* weight, int64_t columns,
                 Scalar* out) const {
    const int64_t C = conv_.input.C, row_stride = taps.step_y * conv_.input.W * C;
    for (int64_t c = 0; c < C; c += Vec<T>::size) {
      const int64_t lanes = min_of(Vec<T>::size, C - c);
      Vec<T> sum = Vec<T>::zero();
      for (int64_t row = 0; row < tap_rows; ++row) {
        for (int64_t t = 0; t < columns; ++t) {
          sum = fma(load_lanes(source + row * row_stride + t * taps.step_x * C + c, lanes),
                    load_lanes(weight + (row * taps.columns + t) * C + c, lanes), sum);
        }
      }
      store_lanes(out + c, sum + load_lanes(bias() + c, lanes), lanes);
    }
  }

  // Outputs all of whose columns of taps are inside.
  void run_inside(const TapRectangle& taps, int64_t tap_rows, const Scalar* source, const T* weight, int64_t pixels,
                  Scalar* out, int64_t out_stride) const {
    const int64_t step = taps.step_x == 1 || taps.columns == 1 ? grid_.input_step_x : 0;
    if (step == 1 && taps.columns == 1) return run_tiles<1, 1>(taps, tap_rows, source, weight, pixels, out, out_stride);
    if (step == 1 && taps.columns == 2) return run_tiles<2, 1>(taps, tap_rows, source, weight, pixels, out, out_stride);
    if (step == 1 && taps.columns == 3) return run_tiles<3, 1>(taps, tap_rows, source, weight, pixels, out, out_stride);
    if (step == 1 && taps.columns == 5) return run_tiles<5, 1>(taps, tap_rows, source, weight, pixels, out, out_stride);
    if (step == 1 && taps.columns == 7) return run_tiles<7, 1>(taps, tap_rows, source, weight, pixels, out, out_stride);
    if (step == 2 && taps.columns == 3) return run_tiles<3, 2>(taps, tap_rows, source, weight, pixels, out, out_stride);
    if (step == 2 && taps.columns == 5) return run_tiles<5, 2>(taps, tap_rows, source, weight, pixels, out, out_stride);
    for (int64_t p = 0; p < pixels; ++p) {
      run_pixel(taps, tap_rows, source + p * grid_.input_step_x * conv_.input.C, weight, taps.columns,
                out + p * out_stride);
    }
  }

  template <int Columns, int Step>
  void run_tiles(const TapRectangle& taps, int64_t tap_rows, const Scalar* source, const T* weight, int64_t pixels,
                 Scalar* out, int64_t out_stride) const {
    // The last tile overlaps the one before it: the same results once more.
    int64_t p = 0;
    for (; p + kPixels <= pixels; p += kPixels) {
      run_tile<Columns, Step, kPixels>(taps, tap_rows, source, weight, p, out, out_stride);
    }
    for (; p < pixels && pixels >= kPixels / 2; p += kPixels / 2) {
      run_tile<Columns, Step, kPixels / 2>(taps, tap_rows, source, weight, min_of(p, pixels - kPixels / 2), out,
                                           out_stride);
    }
    for (; p < pixels; ++p) run_tile<Columns, Step, 1>(taps, tap_rows, source, weight, p, out, out_stride);
  }
  template <int Columns, int Step, int Pixels>
  void run_tile(const TapRectangle& taps, int64_t tap_rows, const Scalar* source, const T* weight, int64_t pixel,
                Scalar* out, int64_t out_stride) const {
    constexpr int64_t size = Vec<T>::size;
    const int64_t C = conv_.input.C, row_stride = taps.step_y * conv_.input.W * C;
    source += pixel * Step * C;
    out += pixel * out_stride;
    int64_t c = 0;
    for (; c + size <= C; c += size) {
      apply_taps<Columns, Step, Pixels>(source + c, row_stride, C, tap_rows, weight + c, C, load(bias() + c), size,
                                        out + c, out_stride);
    }
    if (c < C) {
      apply_taps<Columns, Step, Pixels>(source + c, row_stride, C, tap_rows, weight + c, C, load(bias() + c, C - c),
                                        C - c, out + c, out_stride);
    }
  }

  const T* bias() const { return weight_ + grid_.tap_count * conv_.input.C; }

  const Convolution<Scalar>& conv_;
  const Grid& grid_;
  Blocks blocks_;
  const T* weight_ = nullptr;
};

// ---- lanes are pixels -----------------------------------------------------------------------------------------------

// Rows x Vectors outputs of one channel from a plane whose rows are row_stride apart: tap_rows x columns taps, TapRows
// rows of them at a time; tap (0, t) reads at offsets[t], the rows of taps follow one another as the rows of the plane
// do (or TapRows is 1). An input row is loaded once for all the output rows that it reaches.
template <int TapRows, int Rows, int Vectors, class T>
void apply_tap_rows(const T* source, int64_t row_stride, const int64_t* offsets, int64_t tap_rows, int64_t columns,
                    const T* weight, T bias, T* out, int64_t out_stride) {
  Vec<T> sum[Rows][Vectors];
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) sum[i][v] = Vec<T>::zero();
  }
  for (int64_t first = 0; first < tap_rows; first += TapRows, weight += TapRows * columns, offsets += columns) {
#pragma GCC unroll 16
    for (int row = 0; row < Rows + TapRows - 1; ++row) {
      for (int64_t t = 0; t < columns; ++t) {
        const T* in = source + row * row_stride + offsets[t];
        Vec<T> pixels[Vectors];
        for (int v = 0; v < Vectors; ++v) pixels[v] = load(in + v * Vec<T>::size);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
          if (row - i < 0 || row - i >= TapRows) continue;
          const Vec<T> w = weight[(row - i) * columns + t];
          for (int v = 0; v < Vectors; ++v) sum[i][v] = fma(pixels[v], w, sum[i][v]);
        }
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) store(out + i * out_stride + v * Vec<T>::size, sum[i][v] + Vec<T>(bias));
  }
}

template <class Scalar>
class PixelLanes {
  using T = accumulate_t<Scalar>;
  static constexpr int64_t kRows = 4, kVectors = 2;  // outputs computed together
  static constexpr int64_t kChannels = 16;           // of a task

 public:
  explicit PixelLanes(const Convolution<Scalar>& convolution)
      : conv_(convolution),
        grid_(convolution.grid),
        blocks_(conv_.input.N, grid_.rows, grid_.columns, kPlanePixels / (grid_.phase_count > 1 ? 4 : 1)) {
    blocks_.limit_images(1);
  }

  void run() const {
    const int64_t C = conv_.input.C, channel_blocks = ceil_div(C, kChannels), tasks = blocks_.count() * channel_blocks;
    const double work = 1.0 * conv_.input.N * grid_.rows * grid_.columns * C * grid_.tap_count;
    parallel_for(tasks, work < kSerialWork / 4 ? tasks : 1, [&](int64_t task) {
      const int64_t c = task % channel_blocks * kChannels;
      run_block(blocks_.at(task / channel_blocks), c, min_of(C, c + kChannels));
    });
  }

 private:
  // A part of a row of the input and its place in the planes; the elements are `step` apart in the input.
  struct RowCopy {
    int64_t source, destination, count;
  };
  struct Task {
    Block block;
    Planes planes;
    int64_t phases_of_row, results_stride;
    const int64_t* offsets;  // of the taps in the planes
    const TapRectangle* rectangles;
    T *weight, *results, *row;
  };

  void run_block(const Block& block, int64_t channel, int64_t channel_end) const {
    Task task = {block,           Planes(grid_, block, true),
                 phases_of_row(), round_up(block.columns, kVectors * Vec<T>::size),
                 nullptr,         nullptr,
                 nullptr,         nullptr,
                 nullptr};
    const Planes& planes = task.planes;
    const int64_t taps = grid_.tap_count, slack = (kRows - 1) * planes.columns + kVectors * Vec<T>::size;
    Scratch<T> staged(planes.channel_stride + slack), weight(taps), row(conv_.output.W);
    Scratch<T> results(kRows, task.results_stride, task.phases_of_row);
    Scratch<int64_t> offsets(taps);
    Scratch<RowCopy> copies(planes.planes_y, planes.planes_x, planes.rows);
    Scratch<TapRectangle> rectangles(grid_.phase_count);
    for (int64_t t = 0; t < taps; ++t) offsets[t] = planes.tap_offset(grid_.taps[t], grid_);
    for (int64_t p = 0; p < grid_.phase_count; ++p) {
      rectangles[p] = TapRectangle(grid_.taps + grid_.phases[p].first_tap, grid_.phases[p].tap_count);
    }
    task.offsets = offsets.data(), task.rectangles = rectangles.data();
    task.weight = weight.data(), task.results = results.data(), task.row = row.data();
    const int64_t copy_count = taps == 0 ? 0 : list_copies(planes, copies.data());
    fill(staged.data(), T(0), planes.channel_stride + slack);  // the padding is the same for every channel
    for (int64_t c = channel; c < channel_end; ++c) {
      for (int64_t t = 0; t < taps; ++t) {
        weight[t] = load_one(conv_.weights.data + grid_.taps[t].weight_offset + c * conv_.weights.group_stride);
      }
      if (taps > 0 && !all_finite(weight.data(), taps)) {
        run_inside(block, c, weight.data());
        continue;
      }
      const Scalar* source = conv_.input.at(block.image, c, 0, 0);
      for (int64_t i = 0; i < copy_count; ++i) {
        gather_row(source + copies[i].source, planes.column_step, copies[i].count,
                   staged.data() + copies[i].destination);
      }
      for (int64_t phase = 0; phase < grid_.phase_count; phase += task.phases_of_row) {
        for (int64_t i = 0; i < block.rows; i += kRows) run_rows(task, phase, i, c, staged.data());
      }
    }
  }

  // Everything of the window that is inside the image.
  int64_t list_copies(const Planes& p, RowCopy* copies) const {
    const Images<const Scalar>& input = conv_.input;
    const Window& w = p.window;
    int64_t count = 0;
    for (int64_t row = 0; row < p.planes_y * p.rows; ++row) {
      const int64_t y = w.y + row * w.step_y;
      if (y < 0 || y >= input.H) continue;
      for (int64_t plane_x = 0; plane_x < p.planes_x; ++plane_x) {
        const int64_t x = w.x + plane_x * p.plane_step, step = p.column_step;
        const int64_t first = x >= 0 ? 0 : ceil_div(-x, step);
        const int64_t end = x >= input.W ? 0 : min_of(p.columns, ceil_div(input.W - x, step));
        if (first >= end) continue;
        copies[count++] = {y * input.W + x + first * step,
                           (row % p.planes_y * p.planes_x + plane_x) * p.plane + p.flat(0, row / p.planes_y, first),
                           end - first};
      }
    }
    return count;
  }

  int64_t phases_of_row() const {
    int64_t count = 1;
    while (count < grid_.phase_count && grid_.phases[count].output_y == grid_.phases[0].output_y) ++count;
    return count;
  }

  // Rows [i, i + kRows) of the phases that make up whole rows of one channel.
  void run_rows(const Task& task, int64_t first, int64_t i, int64_t channel, const T* staged) const {
    const int64_t count = task.phases_of_row, stride = task.results_stride;
    const T bias = conv_.bias == nullptr ? T(0) : load_one(conv_.bias + channel);
    const Block part = grid_.phase_block(task.block, grid_.phases[first]);
    const int64_t rows = min_of(kRows, part.rows - i);
    if (rows <= 0) return;
    for (int64_t p = 0; p < count; ++p) {
      const TapRectangle& taps = task.rectangles[first + p];
      const int64_t tap = grid_.phases[first + p].first_tap;
      const Tile tile = tile_for(taps.rows, task.planes.planes_y == 1 && taps.step_y == 1, task.block.columns);
      for (int64_t j = 0; j < task.block.columns; j += kVectors * Vec<T>::size) {
        tile(staged + task.planes.flat(0, i, j), task.planes.columns, task.offsets + tap, taps.rows, taps.columns,
             task.weight + tap, bias, task.results + p * kRows * stride + j, stride);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Window w = grid_.output_window(part, grid_.phases[first]);
      Scalar* out = conv_.output.at(task.block.image, channel, w.y + (i + r) * w.step_y, w.x);
      if (count == 1) {
        narrow_row(task.results + r * stride, part.columns, out);
        continue;
      }
      int64_t columns = 0;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t phase_columns = grid_.phase_block(task.block, grid_.phases[first + p]).columns;
        scatter_row(task.results + (p * kRows + r) * stride, count, phase_columns, task.row + p);
        columns += phase_columns;
      }
      narrow_row(task.row, columns, out);
    }
  }

  using Tile = void (*)(const T*, int64_t, const int64_t*, int64_t, int64_t, const T*, T, T*, int64_t);
  static Tile tile_for(int64_t tap_rows, bool rows_follow, int64_t columns) {
    if (columns <= Vec<T>::size) return tile_of_width<1>(rows_follow ? tap_rows : 1);
    return tile_of_width<kVectors>(rows_follow ? tap_rows : 1);
  }
  template <int Vectors>
  static Tile tile_of_width(int64_t tap_rows) {
    switch (tap_rows) {
      case 2:
        return apply_tap_rows<2, kRows, Vectors, T>;
      case 3:
        return apply_tap_rows<3, kRows, Vectors, T>;
      case 5:
        return apply_tap_rows<5, kRows, Vectors, T>;
      case 7:
        return apply_tap_rows<7, kRows, Vectors, T>;
      default:
        return apply_tap_rows<1, kRows, Vectors, T>;
    }
  }

  // With a weight that is not finite: the taps inside the image alone.
  void run_inside(const Block& block, int64_t channel, const T* weight) const {
    const Vec<T> bias = conv_.bias == nullptr ? T(0) : load_one(conv_.bias + channel);
    for (int64_t index = 0; index < grid_.phase_count; ++index) {
      const Phase& phase = grid_.phases[index];
      const Block part = grid_.phase_block(block, phase);
      const Window w = grid_.output_window(part, phase);
      for (int64_t pixel = 0; pixel < part.pixels(); ++pixel) {
        const int64_t i = pixel / part.columns, j = pixel % part.columns;
        Vec<T> sum = Vec<T>::zero();
        for (int64_t t = phase.first_tap; t < phase.first_tap + phase.tap_count; ++t) {
          const Tap& tap = grid_.taps[t];
          if (!grid_.is_inside(tap, part, pixel, conv_.input.H, conv_.input.W)) continue;
          const Vec<T> in = load_one(conv_.input.at(block.image, channel, (part.row + i) * grid_.input_step_y + tap.dy,
                                                    (part.column + j) * grid_.input_step_x + tap.dx));
          sum = fma(in, Vec<T>(weight[t]), sum);
        }
        store(conv_.output.at(block.image, channel, w.y + i * w.step_y, w.x + j * w.step_x), sum + bias, 1);
      }
    }
  }

  const Convolution<Scalar>& conv_;
  const Grid& grid_;
  Blocks blocks_;
};

// Small contiguous images, whose rows do not fill a vector: channels_last copies of some channels of an image.
template <class Scalar>
void convolve_transposed(const Convolution<Scalar>& convolution) {
  const Images<const Scalar>& input = convolution.input;
  const Images<Scalar>& output = convolution.output;
  const int64_t C = input.C, channel_blocks = ceil_div(C, kDepthwiseChannels), tasks = input.N * channel_blocks;
  const int64_t in_pixels = input.H * input.W, out_pixels = output.H * output.W;
  const double work = 1.0 * input.N * out_pixels * C * convolution.grid.tap_count;
  parallel_for(tasks, work < kSerialWork / 4 ? tasks : 1, [&](int64_t task) {
    const int64_t n = task / channel_blocks, c = task % channel_blocks * kDepthwiseChannels;
    const int64_t channels = min_of(kDepthwiseChannels, C - c);
    Scratch<Scalar> in(channels, in_pixels), out(channels, out_pixels);
    transpose(input.at(n, c, 0, 0), in_pixels, channels, in_pixels, in.data(), channels);
    Convolution<Scalar> part = convolution;
    part.input = {in.data(), 0, 1, channels, input.H, input.W, true};
    part.output = {out.data(), 0, 1, channels, output.H, output.W, true};
    part.weights.data += c * convolution.weights.group_stride;
    if (convolution.bias != nullptr) part.bias += c;
    part.groups = channels;
    ChannelLanes<Scalar>(part).run();
    transpose(out.data(), channels, out_pixels, channels, output.at(n, c, 0, 0), out_pixels);
  });
}

// ---- gradient of the weight -----------------------------------------------------------------------------------------

constexpr int64_t kRunPixels = 32;  // summed by themselves, so that few additions round at the size of the whole sum

// sums[t][lane] += sum over pixels of gradient[pixel] * window[place + tap t], for Taps taps and one vector of
// channels.
template <int Taps, class T>
void add_pixels(int64_t pixels, const T* gradient, const T* staged, const int64_t* places, int64_t channels,
                const int64_t* tap_offsets, int64_t lanes, T* sums, int64_t sums_stride) {
  for (int64_t first = 0; first < pixels; first += kRunPixels) {
    Vec<T> sum[Taps];
    for (int t = 0; t < Taps; ++t) sum[t] = Vec<T>::zero();
    for (int64_t p = first; p < min_of(pixels, first + kRunPixels); ++p) {
      const Vec<T> g = load_lanes(gradient + p * channels, lanes);
      const T* pixel = staged + places[p] * channels;
      for (int t = 0; t < Taps; ++t) sum[t] = fma(g, load_lanes(pixel + tap_offsets[t], lanes), sum[t]);
    }
    for (int t = 0; t < Taps; ++t) {
      T* out = sums + t * sums_stride;
      store_lanes(out, load_lanes(out, lanes) + sum[t], lanes);
    }
  }
}

template <class Scalar>
class DepthwiseWeightGradient {
  using T = accumulate_t<Scalar>;

 public:
  DepthwiseWeightGradient(const Conv2dGeometry& g, const Grid& grid, const Scalar* input, const Scalar* grad_output)
      : g_(g),
        grid_(grid),
        input_(input_images(g, input)),
        grad_output_(output_images(g, grad_output)),
        chunks_(g.N, g.output_H, g.output_W, kDepthwisePixels),
        channels_(channel_block<T>(g.C, kDepthwiseChannels, grid.window_pixels(chunks_))),
        channel_blocks_(ceil_div(g.C, channels_)) {
    chunks_.limit_images(images_that_fit<T>(channels_, grid.window_pixels(chunks_)));
    parts_ = part_count(chunks_.count(), channel_blocks_, grid.tap_count * g.C * static_cast<int64_t>(sizeof(T)));
  }

  void run(Scalar* grad_weight) {
    const int64_t taps = grid_.tap_count, C = g_.C;
    Scratch<T> partial(parts_, taps, C);  // [part][tap][channel]
    const double work = 1.0 * g_.N * g_.output_H * g_.output_W * C * taps;
    const int64_t tasks = parts_ * channel_blocks_;
    parallel_for(tasks, work < kSerialWork / 4 ? tasks : 1, [&](int64_t task) {
      run_part(task / channel_blocks_, task % channel_blocks_ * channels_,
               partial.data() + task / channel_blocks_ * taps * C);
    });
    for (int64_t part = 1; part < parts_; ++part) add_to(partial.data(), partial.data() + part * taps * C, taps * C);
    const int64_t* strides = g_.grad_weight_strides;
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t c = 0; c < C; ++c) {
        store_one(grad_weight + c * strides[0] + t / g_.kernel_W * strides[2] + t % g_.kernel_W * strides[3],
                  partial[t * C + c]);
      }
    }
  }

 private:
  void run_part(int64_t part, int64_t channel, T* partial) const {
    const int64_t channels = min_of(channels_, g_.C - channel), taps = grid_.tap_count;
    const int64_t first = part * chunks_.count() / parts_, end = (part + 1) * chunks_.count() / parts_;
    Scratch<T> staged(chunks_.images, grid_.window_pixels(chunks_), channels), gradient(chunks_.pixels(), channels);
    Scratch<int64_t> places(chunks_.pixels()), offsets(taps);
    for (int64_t t = 0; t < taps; ++t) fill(partial + t * g_.C + channel, T(0), channels);
    for (int64_t chunk = first; chunk < end; ++chunk) {
      const Block block = chunks_.at(chunk);
      const Window window = grid_.input_window(block);
      stage_block(input_, block, channel, channels, window, staged.data());
      stage_block(grad_output_, block, channel, channels, grid_.output_window(block, grid_.phases[0]), gradient.data());
      grid_.place_pixels(block, window, places.data());
      for (int64_t t = 0; t < taps; ++t) offsets[t] = grid_.tap_pixel(grid_.taps[t], window) * channels;
      const bool inside_only =
          grid_.reads_padding(block, g_.H, g_.W) && !all_finite(gradient.data(), block.pixels() * channels);
      for (int64_t c = 0; c < channels; c += Vec<T>::size) {
        const int64_t lanes = min_of(Vec<T>::size, channels - c);
        if (inside_only) {
          add_vector_inside(block, channels, lanes, gradient.data() + c, staged.data() + c, places.data(),
                            offsets.data(), partial + channel + c);
        } else {
          add_vector(block.pixels(), channels, lanes, gradient.data() + c, staged.data() + c, places.data(),
                     offsets.data(), partial + channel + c);
        }
      }
    }
  }

  void add_vector(int64_t pixels, int64_t channels, int64_t lanes, const T* gradient, const T* staged,
                  const int64_t* places, const int64_t* offsets, T* partial) const {
    const int64_t taps = grid_.tap_count, C = g_.C;
    int64_t t = 0;
    for (; t + 9 <= taps; t += 9) {
      if (lanes == Vec<T>::size) {
        add_pixels<9>(pixels, gradient, staged, places, channels, offsets + t, Vec<T>::size, partial + t * C, C);
      } else {
        add_pixels<9>(pixels, gradient, staged, places, channels, offsets + t, lanes, partial + t * C, C);
      }
    }
    for (; t + 4 <= taps; t += 4) {
      add_pixels<4>(pixels, gradient, staged, places, channels, offsets + t, lanes, partial + t * C, C);
    }
    for (; t < taps; ++t) {
      add_pixels<1>(pixels, gradient, staged, places, channels, offsets + t, lanes, partial + t * C, C);
    }
  }

  // The same with the taps that lie inside the image alone.
  void add_vector_inside(const Block& block, int64_t channels, int64_t lanes, const T* gradient, const T* staged,
                         const int64_t* places, const int64_t* offsets, T* partial) const {
    for (int64_t t = 0; t < grid_.tap_count; ++t) {
      for (int64_t row = 0; row < block.images * block.rows; ++row) {
        const Columns columns = grid_.inside_columns(grid_.taps[t], block, row % block.rows, g_.H, g_.W);
        if (columns.end <= columns.first) continue;
        const int64_t pixel = row * block.columns + columns.first;
        add_pixels<1>(columns.end - columns.first, gradient + pixel * channels, staged, places + pixel, channels,
                      offsets + t, lanes, partial + t * g_.C, g_.C);
      }
    }
  }

  const Conv2dGeometry& g_;
  const Grid& grid_;
  Images<const Scalar> input_, grad_output_;
  Blocks chunks_;
  int64_t channels_, channel_blocks_, parts_;
};

}  // namespace

template <class Scalar>
void convolve_depthwise(const Convolution<Scalar>& convolution) {
  if (convolution.output.channels_last) {
    ChannelLanes<Scalar>(convolution).run();
  } else if (convolution.output.W <= Vec<accumulate_t<Scalar>>::size) {
    convolve_transposed(convolution);
  } else {
    PixelLanes<Scalar>(convolution).run();
  }
}

template <class Scalar>
void depthwise_weight_gradient(const Conv2dBackwardArgs& args) {
  Scratch<Tap> taps(args.geometry.kernel_H, args.geometry.kernel_W);
  Phase phase;
  const Grid grid = forward_grid(args.geometry, args.geometry.weight_strides, taps.data(), &phase);
  DepthwiseWeightGradient<Scalar>(args.geometry, grid, static_cast<const Scalar*>(args.input),
                                  static_cast<const Scalar*>(args.grad_output))
      .run(static_cast<Scalar*>(args.grad_weight));
}

template void convolve_depthwise(const Convolution<float>&);
template void convolve_depthwise(const Convolution<double>&);
template void convolve_depthwise(const Convolution<bfloat16>&);
template void convolve_depthwise(const Convolution<float16>&);
template void depthwise_weight_gradient<float>(const Conv2dBackwardArgs&);
template void depthwise_weight_gradient<double>(const Conv2dBackwardArgs&);
template void depthwise_weight_gradient<bfloat16>(const Conv2dBackwardArgs&);
template void depthwise_weight_gradient<float16>(const Conv2dBackwardArgs&);

}  // namespace dlkernels::DLKERNELS_ISA
