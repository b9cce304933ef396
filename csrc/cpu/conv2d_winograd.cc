// Convolution with a 3x3 kernel at stride one by Winograd's minimal filtering (winograd.h).
//
// A tile of Outputs::rows x columns outputs reads a window two pixels larger each way. At every point xi of the tile's
// transform there is one product over channels:
//
//   m[xi][tile][k] = sum over c of v[xi][tile][c] u[xi][c][k],   v from the images, u from the weights
//
// in place of one for each of 9 taps and every output, and the outputs of a tile come from its m. Lanes are channels.
// A task takes up to kTaskTiles tiles and one or all panels of output channels; v, m and the panel's part of u stay in
// the second-level cache, and no transform of the whole batch is written to memory. What the tasks share is transformed
// before: the weights where there are many tiles, the images where there are few, so that nothing large is transformed
// twice. Sums run over at most kMostRunChannels channels in registers; runs are added one after another.
//
// The transforms round too. With tiles of 2 x 4 outputs and runs this short the relative error is 4.3e-7 up to 64
// channels and 5.6e-7 beyond, that of one running float32 sum of 64 and of 108 channels; tiles of 4 x 4 outputs were a
// tenth faster and twice as far off, which is nothing beside the rounding of a result to a half type.
//
// The gradient of the input is the same with the roles of the channels swapped. The gradient of the weight is the
// adjoint: at every point a product whose depth is the tiles, of v and of the transformed gradient of the outputs.
//
// The transforms spread a NaN or an infinity over a tile, and may overflow where a direct sum does not. Whatever is not
// finite reaches an output of its tile, so outputs are looked at; one that is not finite, and the direct convolution
// does the call again.
#include "conv2d_parts.h"
#include "gemm.h"
#include "winograd.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

template <class Scalar>
using OutputsOf = TileFilter<Vec<float>, std::is_same_v<Scalar, float> ? 2 : 4, 4>;

constexpr int64_t kMostRunChannels = 64;
constexpr int64_t kTaskTiles = 96;
constexpr int64_t kTaskBytes = 320 << 10;  // of a task's transformed images or weights
constexpr int64_t kRunTiles = 7;           // tiles staged at a time where channels are not contiguous
constexpr int64_t kGradientTiles = 32;     // tiles of a run of sums in the gradient of the weight
constexpr int64_t kGradientBlock = 64;     // channels in and out of a task there
constexpr int64_t kFewestChannels = 32;
// Pairs of bfloat16 are twice as fast to multiply.
template <class Scalar>
constexpr int64_t kFewestTiles = std::is_same_v<factor_t<Scalar>, accumulate_t<Scalar>> ? 16 : 64;

using V = Vec<float>;

// The tiles of a batch of outputs, numbered image by image and row by row.
template <class Outputs>
struct TileGrid {
  int64_t N, H, W;  // of the outputs
  int64_t rows, columns;

  TileGrid(int64_t N_, int64_t H_, int64_t W_)
      : N(N_), H(H_), W(W_), rows(ceil_div(H_, Outputs::rows)), columns(ceil_div(W_, Outputs::columns)) {}
  int64_t count() const { return N * rows * columns; }

  // Calls body(first, count, image, y, x) for every run of neighbours in a row of tiles among [first, end); y and x are
  // those of the run's first output.
  template <class Body>
  void for_runs(int64_t first, int64_t end, int64_t longest, Body&& body) const {
    while (first < end) {
      const int64_t column = first % columns, row = first / columns % rows;
      const int64_t count = min_of(longest, min_of(columns - column, end - first));
      body(first, count, first / columns / rows, row * Outputs::rows, column * Outputs::columns);
      first += count;
    }
  }
};

// A pixel-major view: the pixel below and the pixel to the right are so many elements away.
template <class Element>
struct Pixels {
  const Element* data;
  int64_t row_stride, column_stride;
};

// Transforms [first, end) of windows of rows x columns at (y + offset_y, x + offset_x) of each tile: transform(tile,
// pixels). What lies inside the image is read in place where channels are contiguous, otherwise from a zero-padded
// copy.
template <class Outputs, class Scalar, class Transform>
void transform_windows(const TileGrid<Outputs>& tiles, const Images<const Scalar>& images, int64_t first, int64_t end,
                       int64_t channel, int64_t channels, int64_t rows, int64_t columns, int64_t offset_y,
                       int64_t offset_x, Transform&& transform) {
  const bool in_place = images.channels_last;
  const int64_t longest = in_place ? 1 : kRunTiles;
  Scratch<float> staged(rows, columns + (longest - 1) * Outputs::columns, channels);
  tiles.for_runs(first, end, longest, [&](int64_t tile, int64_t count, int64_t image, int64_t y, int64_t x) {
    const int64_t width = columns + (count - 1) * Outputs::columns;
    const Window window = {y + offset_y, x + offset_x, rows, width, 1, 1};
    if (in_place && window.y >= 0 && window.x >= 0 && window.y + rows <= images.H && window.x + width <= images.W) {
      transform(tile, Pixels<Scalar>{images.at(image, channel, window.y, window.x), images.W * images.C, images.C});
      return;
    }
    stage(images, image, channel, channels, window, staged.data());
    for (int64_t i = 0; i < count; ++i) {
      transform(tile + i, Pixels<float>{staged.data() + i * Outputs::columns * channels, width * channels, channels});
    }
  });
}

// Whole vectors of channels and then the rest: body(lanes, channel) with lanes a constant where they are full.
template <class Body>
DLKERNELS_INLINE void for_lanes(int64_t channels, Body&& body) {
  int64_t c = 0;
  for (; c + V::size <= channels; c += V::size) body(std::integral_constant<int64_t, V::size>(), c);
  if (c < channels) body(channels - c, c);
}

// out[xi * point_stride + c] for the channels of one tile of the images; of one tile of a gradient of the outputs.
template <class Outputs, class Element>
void transform_input(const Pixels<Element>& in, int64_t channels, float* out, int64_t point_stride) {
  for_lanes(channels, [&](auto lanes, int64_t c) {
    Outputs::input(
        [&](int i, int j) { return load_lanes(in.data + i * in.row_stride + j * in.column_stride + c, lanes); },
        [&](int i, int j, V value) { store(out + (i * Outputs::points_x + j) * point_stride + c, value); });
  });
}
template <class Outputs, class Element>
void transform_gradient(const Pixels<Element>& in, int64_t channels, float* out, int64_t point_stride) {
  for_lanes(channels, [&](auto lanes, int64_t c) {
    Outputs::output_adjoint(
        [&](int i, int j) { return load_lanes(in.data + i * in.row_stride + j * in.column_stride + c, lanes); },
        [&](int i, int j, V value) { store(out + (i * Outputs::points_x + j) * point_stride + c, value); });
  });
}

// ---- forward and gradient of the input ------------------------------------------------------------------------------

template <class Scalar>
class WinogradConvolution {
  using Outputs = OutputsOf<Scalar>;
  static constexpr int64_t kPoints = Outputs::points;

 public:
  explicit WinogradConvolution(const Convolution<Scalar>& convolution)
      : conv_(convolution),
        grid_(convolution.grid),
        tiles_(conv_.input.N, grid_.rows, grid_.columns),
        in_channels_(conv_.input.C / conv_.groups),
        out_channels_(conv_.output.C / conv_.groups),
        in_pitch_(round_up(in_channels_, V::size)),
        run_channels_(min_of(kMostRunChannels, round_up(in_channels_ / 2, V::size))),
        weights_first_(tiles_.count() > 2 * out_channels_) {
    for (int64_t t = 0; t < grid_.tap_count; ++t) {
      const Tap& tap = grid_.taps[t];
      order_[tap.dy - grid_.first_dy][tap.dx - grid_.first_dx] = t;
    }
    panel_ = min_of(kTileColumns<float>, round_up(out_channels_, V::size));
    if (weights_first_) {
      const int64_t fitting = kTaskBytes / (kPoints * in_pitch_ * static_cast<int64_t>(sizeof(float)));
      task_tiles_ = max_of(2 * kTileRows, min_of(kTaskTiles, fitting / kTileRows * kTileRows));
      task_tiles_ = min_of(task_tiles_, round_up(ceil_div(tiles_.count() * conv_.groups, kWantedTasks), kTileRows));
      channel_block_ = in_channels_;
    } else {
      task_tiles_ = balanced(tiles_.count(), kTaskTiles);
      while (panel_ > V::size && ceil_div(out_channels_, panel_) * conv_.groups < kWantedTasks / 4)
        panel_ = round_up(panel_ / 2, V::size);
      channel_block_ = balanced(in_channels_, round_up(kTaskBytes / (kPoints * panel_ * 4), run_channels_));
    }
    panels_ = ceil_div(out_channels_, panel_);
    tile_blocks_ = ceil_div(tiles_.count(), task_tiles_);
  }

  // False where an output is not finite.
  bool run() {
    const int64_t weights = conv_.groups * panels_ * kPoints * in_channels_ * panel_;
    const int64_t images = conv_.groups * tiles_.count() * kPoints * in_pitch_;
    Scratch<float> shared(weights_first_ ? weights : images);
    shared_ = shared.data();
    if (weights_first_) {
      parallel_for(conv_.groups * panels_, 1, [&](int64_t task) {
        transform_weights(task / panels_, task % panels_, 0, in_channels_, shared_panel(task));
      });
      parallel_for(conv_.groups * tile_blocks_, 1,
                   [&](int64_t task) { run_tiles(task % conv_.groups, task / conv_.groups); });
    } else {
      const int64_t block = 4 * kTileRows, blocks = ceil_div(tiles_.count(), block);
      parallel_for(conv_.groups * blocks, 1, [&](int64_t task) {
        const int64_t first = task / conv_.groups * block, end = min_of(first + block, tiles_.count());
        transform_images(task % conv_.groups, first, end, shared_tile(task % conv_.groups, first));
      });
      parallel_for(conv_.groups * tile_blocks_ * panels_, 1, [&](int64_t task) {
        run_panel(task / panels_ % conv_.groups, task / panels_ / conv_.groups, task % panels_);
      });
    }
    return finite_;
  }

 private:
  float* shared_panel(int64_t index) const { return shared_ + index * kPoints * in_channels_ * panel_; }
  float* shared_tile(int64_t group, int64_t tile) const {
    return shared_ + (group * tiles_.count() + tile) * kPoints * in_pitch_;
  }
  int64_t panel_columns(int64_t panel) const { return min_of(panel_, out_channels_ - panel * panel_); }
  int64_t last_tile(int64_t block) const { return min_of((block + 1) * task_tiles_, tiles_.count()); }

  // Many tiles: the block's images are transformed here, and every panel of the weights passes by.
  void run_tiles(int64_t group, int64_t block) {
    const int64_t first = block * task_tiles_, count = last_tile(block) - first;
    Scratch<float> images(count, kPoints, in_pitch_), products(count, kPoints, panel_);
    transform_images(group, first, first + count, images.data());
    for (int64_t panel = 0; panel < panels_; ++panel) {
      multiply_points(images.data(), count, shared_panel(group * panels_ + panel), in_channels_, panel_columns(panel),
                      products.data(), false);
      write_outputs(group, panel, first, count, products.data());
    }
  }

  // Few tiles: one panel of the weights is transformed here, some channels at a time, and all tiles pass by.
  void run_panel(int64_t group, int64_t block, int64_t panel) {
    const int64_t first = block * task_tiles_, count = last_tile(block) - first;
    Scratch<float> weights(kPoints, channel_block_, panel_), products(count, kPoints, panel_);
    for (int64_t c = 0; c < in_channels_; c += channel_block_) {
      const int64_t channels = min_of(channel_block_, in_channels_ - c);
      transform_weights(group, panel, c, channels, weights.data());
      multiply_points(shared_tile(group, first) + c, count, weights.data(), channels, panel_columns(panel),
                      products.data(), c > 0);
    }
    write_outputs(group, panel, first, count, products.data());
  }

  // out: [tile][point][in channel]
  void transform_images(int64_t group, int64_t first, int64_t end, float* out) const {
    transform_windows(tiles_, conv_.input, first, end, group * in_channels_, in_channels_, Outputs::rows + 2,
                      Outputs::columns + 2, grid_.first_dy, grid_.first_dx, [&](int64_t tile, const auto& pixels) {
                        transform_input<Outputs>(pixels, in_channels_, out + (tile - first) * kPoints * in_pitch_,
                                                 in_pitch_);
                      });
  }

  // out: [point][channel][panel_], the panel's columns beyond the last output channel unused.
  void transform_weights(int64_t group, int64_t panel, int64_t channel, int64_t channels, float* out) const {
    const int64_t columns = panel_columns(panel);
    constexpr int64_t together = V::size;
    const Weights<Scalar>& w = conv_.weights;
    const Scalar* first = w.data + group * w.group_stride + channel * w.in_stride + panel * panel_ * w.out_stride;
    Scratch<float> staged(together, 9, columns);  // [tap][channel][column]
    for (int64_t c = 0; c < channels; c += together) {
      const int64_t block = min_of(together, channels - c);
      pack_taps(grid_, w.innermost_taps, Matrix<Scalar>{first + c * w.in_stride, w.in_stride, w.out_stride}, block,
                columns, staged.data(), columns, block * columns);
      for (int64_t i = 0; i < block; ++i) {
        const float* taps = staged.data() + i * columns;
        float* destination = out + (c + i) * panel_;
        for_lanes(columns, [&](auto lanes, int64_t k) {
          Outputs::weight([&](int y, int x) { return load_lanes(taps + order_[y][x] * block * columns + k, lanes); },
                          [&](int y, int x, V value) {
                            store(destination + (y * Outputs::points_x + x) * channels * panel_ + k, value);
                          });
        });
      }
    }
  }

  // products[tile][point][column] (+)= images[tile][point] times weights[point], over `channels` channels.
  void multiply_points(const float* images, int64_t count, const float* weights, int64_t channels, int64_t columns,
                       float* products, bool accumulate) const {
    for (int64_t point = 0; point < kPoints; ++point) {
      for (int64_t c = 0; c < channels; c += run_channels_) {
        const int64_t depth = min_of(run_channels_, channels - c);
        const float* run = weights + (point * channels + c) * panel_;
        for (int64_t tile = 0; tile < count; tile += kTileRows) {
          const int64_t rows = min_of(kTileRows, count - tile);
          const float* pointers[kTileRows];
          for (int64_t r = 0; r < rows; ++r) pointers[r] = images + ((tile + r) * kPoints + point) * in_pitch_ + c;
          multiply_tile(rows, columns, depth, pointers, run, panel_, products + (tile * kPoints + point) * panel_,
                        kPoints * panel_, accumulate || c > 0);
        }
      }
    }
  }

  void write_outputs(int64_t group, int64_t panel, int64_t first, int64_t count, const float* products) {
    const int64_t columns = panel_columns(panel), channel = group * out_channels_ + panel * panel_;
    const Images<Scalar>& images = conv_.output;
    Scratch<float> results(images.channels_last ? 0 : kRunTiles, Outputs::rows, Outputs::columns, columns);
    auto write_run = [&](int64_t tile, int64_t run, int64_t image, int64_t y, int64_t x) {
      const int64_t rows = min_of(Outputs::rows, tiles_.H - y), width = min_of(run * Outputs::columns, tiles_.W - x);
      const float* values = products + (tile - first) * kPoints * panel_;
      if (images.channels_last) {
        write_tiles(values, run, channel, columns, images.at(image, channel, y, x), images.W * images.C, images.C, rows,
                    width);
      } else {
        write_tiles(values, run, channel, columns, results.data(), width * columns, columns, rows, width);
        unstage(images, image, channel, columns, Window{y, x, rows, width, 1, 1}, results.data());
      }
    };
    tiles_.for_runs(first, first + count, kRunTiles, write_run);
  }

  // The rows x width outputs of a run of tiles, pixel-major.
  template <class Element>
  void write_tiles(const float* products, int64_t run, int64_t channel, int64_t columns, Element* out,
                   int64_t row_stride, int64_t column_stride, int64_t rows, int64_t width) {
    for (int64_t i = 0; i < run; ++i) {
      write_tile(products + i * kPoints * panel_, channel, columns, out + i * Outputs::columns * column_stride,
                 row_stride, column_stride, rows, min_of(Outputs::columns, width - i * Outputs::columns));
    }
  }
  template <class Element>
  void write_tile(const float* products, int64_t channel, int64_t columns, Element* out, int64_t row_stride,
                  int64_t column_stride, int64_t rows, int64_t width) {
    V finite = V::zero();  // zero times every output
    for_lanes(columns, [&](auto lanes, int64_t k) {
      const V bias = conv_.bias != nullptr ? load_lanes(conv_.bias + channel + k, lanes) : V::zero();
      Outputs::output(
          [&](int i, int j) { return load_lanes(products + (i * Outputs::points_x + j) * panel_ + k, lanes); },
          [&](int i, int j, V value) {
            if (i >= rows || j >= width) return;
            value += bias;
            finite = fma(value, V::zero(), finite);
            store_lanes(out + i * row_stride + j * column_stride + k, value, lanes);
          });
    });
    if (reduce_add(finite) != 0.0f) __atomic_store_n(&finite_, false, __ATOMIC_RELAXED);
  }

  const Convolution<Scalar>& conv_;
  const Grid& grid_;
  TileGrid<Outputs> tiles_;
  int64_t in_channels_, out_channels_;  // of one group
  int64_t in_pitch_;                    // from one point of a transformed tile to the next
  int64_t run_channels_;                // of one run of sums
  bool weights_first_;                  // what the tasks share: weights, or images
  int64_t order_[3][3];                 // tap (y, x) among those of the grid
  int64_t panel_, panels_, task_tiles_, tile_blocks_, channel_block_;
  float* shared_ = nullptr;
  bool finite_ = true;
};

bool is_filter(const Grid& grid) {
  return grid.tap_count == 9 && grid.last_dy - grid.first_dy == 2 && grid.last_dx - grid.first_dx == 2 &&
         grid.input_step_y == 1 && grid.input_step_x == 1 && grid.output_step_y == 1 && grid.output_step_x == 1;
}
bool is_worthwhile(int64_t in_channels, int64_t out_channels) {
  return in_channels >= kFewestChannels && out_channels >= kFewestChannels;
}

// ---- gradient of the weight -----------------------------------------------------------------------------------------

// A task takes one part of the tiles and one block of channels in and out; its sums at every point stay in the
// second-level cache and become the 9 taps when the part ends.
template <class Scalar>
class WinogradWeightGradient {
  using Outputs = OutputsOf<Scalar>;
  static constexpr int64_t kPoints = Outputs::points;

 public:
  WinogradWeightGradient(const Conv2dGeometry& g, const Scalar* input, const Scalar* grad_output)
      : g_(g),
        input_(input_images(g, input)),
        grad_output_(output_images(g, grad_output)),
        tiles_(g.N, g.output_H, g.output_W),
        in_channels_(g.C / g.groups),
        out_channels_(g.K / g.groups),
        in_block_(min_of(round_up(in_channels_, V::size), kGradientBlock)),
        out_block_(min_of(round_up(out_channels_, V::size), kGradientBlock)),
        in_blocks_(ceil_div(in_channels_, in_block_)),
        out_blocks_(ceil_div(out_channels_, out_block_)),
        regions_(g.groups * in_blocks_ * out_blocks_),
        region_size_(9 * in_block_ * out_block_),
        chunks_(ceil_div(tiles_.count(), kGradientTiles)),
        parts_(part_count(chunks_, regions_, regions_ * region_size_ * static_cast<int64_t>(sizeof(float)))) {}

  // False where a sum is not finite.
  bool run(Scalar* grad_weight) {
    Scratch<float> partial(parts_, regions_, region_size_);
    parallel_for(parts_ * regions_, 1, [&](int64_t task) {
      run_part(task / regions_, region_at(task % regions_), partial.data() + task * region_size_);
    });
    bool finite = true;
    parallel_for(regions_, 1, [&](int64_t index) {
      float* sum = partial.data() + index * region_size_;
      for (int64_t part = 1; part < parts_; ++part) {
        add_to(sum, partial.data() + (part * regions_ + index) * region_size_, region_size_);
      }
      if (!write_region(region_at(index), sum, grad_weight)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
    return finite;
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

  // taps[tap][out][in]
  void run_part(int64_t part, const Region& region, float* taps) const {
    const int64_t first = part * chunks_ / parts_ * kGradientTiles;
    const int64_t end = min_of((part + 1) * chunks_ / parts_ * kGradientTiles, tiles_.count());
    Scratch<float> images(kPoints, kGradientTiles, in_block_), gradients(kPoints, kGradientTiles, out_block_);
    Scratch<float> sums(kPoints, out_block_, in_block_);
    for (int64_t tile = first; tile < end; tile += kGradientTiles) {
      const int64_t last = min_of(tile + kGradientTiles, end);
      transform_windows(tiles_, input_, tile, last, region.group * in_channels_ + region.in, region.in_count,
                        Outputs::rows + 2, Outputs::columns + 2, -g_.padding_top, -g_.padding_left,
                        [&](int64_t t, const auto& pixels) {
                          transform_input<Outputs>(pixels, region.in_count, images.data() + (t - tile) * in_block_,
                                                   kGradientTiles * in_block_);
                        });
      transform_windows(tiles_, grad_output_, tile, last, region.group * out_channels_ + region.out, region.out_count,
                        Outputs::rows, Outputs::columns, 0, 0, [&](int64_t t, const auto& pixels) {
                          transform_gradient<Outputs>(pixels, region.out_count,
                                                      gradients.data() + (t - tile) * out_block_,
                                                      kGradientTiles * out_block_);
                        });
      multiply_points(region, last - tile, gradients.data(), images.data(), sums.data(), tile > first);
    }
    for (int64_t k = 0; k < region.out_count; ++k) {
      for (int64_t c = 0; c < in_block_; c += V::size) {
        const float* source = sums.data() + k * in_block_ + c;
        float* out = taps + k * in_block_ + c;
        Outputs::weight_adjoint(
            [&](int i, int j) { return load(source + (i * Outputs::points_x + j) * out_block_ * in_block_); },
            [&](int i, int j, V value) { store(out + (3 * i + j) * out_block_ * in_block_, value); });
      }
    }
  }

  // sums[point][out][in] (+)= sum over `depth` tiles of gradients[point][tile][out] images[point][tile][in].
  void multiply_points(const Region& region, int64_t depth, const float* gradients, const float* images, float* sums,
                       bool accumulate) const {
    const Segment segment = {depth, 0, 0, out_block_};
    for (int64_t point = 0; point < kPoints; ++point) {
      const float* left = gradients + point * kGradientTiles * out_block_;
      const float* right = images + point * kGradientTiles * in_block_;
      float* out = sums + point * out_block_ * in_block_;
      for (int64_t c = 0; c < region.in_count; c += kTileColumns<float>) {
        const int64_t columns = min_of(kTileColumns<float>, round_up(region.in_count, V::size) - c);
        for (int64_t k = 0; k < region.out_count; k += kTileRows) {
          const int64_t rows = min_of(kTileRows, region.out_count - k);
          const float* pointers[kTileRows];
          for (int64_t r = 0; r < rows; ++r) pointers[r] = left + k + r;
          multiply_tile(rows, columns, &segment, 1, pointers, right + c, in_block_, out + k * in_block_ + c, in_block_,
                        accumulate);
        }
      }
    }
  }

  // Whether every sum is finite.
  bool write_region(const Region& region, const float* sums, Scalar* grad_weight) const {
    bool finite = true;
    const int64_t* strides = g_.grad_weight_strides;
    for (int64_t tap = 0; tap < 9; ++tap) {
      for (int64_t k = 0; k < region.out_count; ++k) {
        const float* source = sums + (tap * out_block_ + k) * in_block_;
        Scalar* out = grad_weight + (region.group * out_channels_ + region.out + k) * strides[0] +
                      region.in * strides[1] + tap / 3 * strides[2] + tap % 3 * strides[3];
        for (int64_t c = 0; c < region.in_count; ++c) store_one(out + c * strides[1], source[c]);
        finite &= all_finite(source, region.in_count);
      }
    }
    return finite;
  }

  const Conv2dGeometry& g_;
  Images<const Scalar> input_, grad_output_;
  TileGrid<Outputs> tiles_;
  int64_t in_channels_, out_channels_;
  int64_t in_block_, out_block_, in_blocks_, out_blocks_, regions_, region_size_, chunks_, parts_;
};

}  // namespace

template <class Scalar>
bool convolve_winograd(const Convolution<Scalar>& convolution) {
  if constexpr (std::is_same_v<accumulate_t<Scalar>, float>) {
    const Grid& grid = convolution.grid;
    const int64_t tiles = TileGrid<OutputsOf<Scalar>>(convolution.input.N, grid.rows, grid.columns).count();
    const int64_t groups = convolution.groups;
    if (is_filter(grid) && tiles >= kFewestTiles<Scalar> &&
        is_worthwhile(convolution.input.C / groups, convolution.output.C / groups)) {
      return WinogradConvolution<Scalar>(convolution).run();
    }
  }
  return false;
}

template <class Scalar>
bool winograd_weight_gradient(const Conv2dBackwardArgs& args) {
  if constexpr (std::is_same_v<accumulate_t<Scalar>, float>) {
    const Conv2dGeometry& g = args.geometry;
    const int64_t tiles = TileGrid<OutputsOf<Scalar>>(g.N, g.output_H, g.output_W).count();
    if (g.kernel_H == 3 && g.kernel_W == 3 && g.stride_H == 1 && g.stride_W == 1 && g.dilation_H == 1 &&
        g.dilation_W == 1 && tiles >= kFewestTiles<Scalar> && is_worthwhile(g.C / g.groups, g.K / g.groups)) {
      return WinogradWeightGradient<Scalar>(g, static_cast<const Scalar*>(args.input),
                                            static_cast<const Scalar*>(args.grad_output))
          .run(static_cast<Scalar*>(args.grad_weight));
    }
  }
  return false;
}

template bool convolve_winograd(const Convolution<float>&);
template bool convolve_winograd(const Convolution<double>&);
template bool convolve_winograd(const Convolution<bfloat16>&);
template bool convolve_winograd(const Convolution<float16>&);
template bool winograd_weight_gradient<float>(const Conv2dBackwardArgs&);
template bool winograd_weight_gradient<double>(const Conv2dBackwardArgs&);
template bool winograd_weight_gradient<bfloat16>(const Conv2dBackwardArgs&);
template bool winograd_weight_gradient<float16>(const Conv2dBackwardArgs&);

}  // namespace dlkernels::DLKERNELS_ISA
