// Convolution as products whose columns are pixels: the sums of conv2d_dense.cc in the same order, with the lanes along
// the pixels. It fills the lanes where a group has few output channels, and takes contiguous images as they lie.
//
// A task takes a block of output pixels and stages its input window as planes (planes.h), for up to kChannelBlock
// channels at a time. Row (tap, channel) of the right operand is then a plane of the window from the tap's offset on;
// the left operand is the weight, [output channel][tap][channel]. Pixels between the rows of the block are multiplied
// too and never stored. A tile of pixels stays in the first- and second-level cache while all output channels go over
// it.
//
// The gradient of the input at a stride above one has a phase for each residue of the columns; their rows are put
// together before they are stored.
#include "conv2d_parts.h"
#include "planes.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int64_t kPlanarPixels = 512;  // output pixels of a task
constexpr int64_t kGroupChannels = 32;  // groups with fewer channels are taken together

// A stretch of the depth: `depth` elements of each row of the left operand from `offset` on.
struct Stretch {
  int64_t depth, offset;
};

// c[i][p] (+)= sum over the stretches' k of a[i][k] * b[offsets[k] + p], starting from start[i] unless that is null;
// the offsets count through the stretches. Reads whole vectors of b, writes `last_lanes` lanes of the last one of c.
template <class T, int Rows, int Vectors>
void tile(const Stretch* stretches, int64_t stretch_count, const T* a_data, int64_t a_row_stride, const T* b,
          const int64_t* offsets, const T* start, T* c, int64_t c_row_stride, int64_t last_lanes, bool accumulate) {
  constexpr int64_t lanes = Vec<T>::size;
  Vec<T> sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec<T>::zero();
  }
  for (const Stretch* stretch = stretches; stretch != stretches + stretch_count; ++stretch) {
    const T* a = a_data + stretch->offset;
    for (int64_t k = 0; k < stretch->depth; ++k) {
      const T* b_row = b + *offsets++;
      Vec<T> pixels[Vectors];
      for (int v = 0; v < Vectors; ++v) pixels[v] = load(b_row + v * lanes);
      for (int r = 0; r < Rows; ++r) {
        const Vec<T> weight = a[r * a_row_stride + k];
        for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(weight, pixels[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    T* out = c + r * c_row_stride;
    const Vec<T> first = start == nullptr ? Vec<T>::zero() : Vec<T>(start[r]);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors - 1; ++v) {
      store(out + v * lanes, accumulate ? load(out + v * lanes) + sum[r][v] : first + sum[r][v]);
    }
    T* last = out + (Vectors - 1) * lanes;
    store_lanes(last, (accumulate ? load_lanes(last, last_lanes) : first) + sum[r][Vectors - 1], last_lanes);
  }
}

template <class T>
using TileFunction = void (*)(const Stretch*, int64_t, const T*, int64_t, const T*, const int64_t*, const T*, T*,
                              int64_t, int64_t, bool);

// functions[rows - 1][vectors - 1]
template <class T>
struct TileTable {
  TileFunction<T> functions[kTileRows][kTileVectors];
  constexpr TileTable() : functions() { fill_rows<kTileRows>(); }
  template <int Rows>
  constexpr void fill_rows() {
    fill_vectors<Rows, kTileVectors>();
    if constexpr (Rows > 1) fill_rows<Rows - 1>();
  }
  template <int Rows, int Vectors>
  constexpr void fill_vectors() {
    functions[Rows - 1][Vectors - 1] = tile<T, Rows, Vectors>;
    if constexpr (Vectors > 1) fill_vectors<Rows, Vectors - 1>();
  }
};
template <class T>
constexpr TileTable<T> tile_table;

template <class Scalar>
class PlanarConvolution {
  using T = accumulate_t<Scalar>;

 public:
  explicit PlanarConvolution(const Convolution<Scalar>& convolution)
      : conv_(convolution),
        grid_(convolution.grid),
        in_channels_(convolution.input.C / convolution.groups),
        out_channels_(convolution.output.C / convolution.groups),
        depth_(in_channels_ * grid_.tap_count),
        blocks_(conv_.input.N, grid_.rows, grid_.columns, pixels_wanted()),
        channel_block_(channels_of_runs(conv_)),
        group_block_(max_of(1, min_of(conv_.groups, kGroupChannels / max_of(in_channels_, out_channels_)))),
        out_block_(min_of(out_channels_, kOutputChannelBlock)) {
    for (int64_t pixels = pixels_wanted(); tasks() < kWantedTasks / 4; pixels /= 2) {
      if (out_block_ >= 4 * kTileRows && group_block_ == 1) {
        out_block_ = round_up(ceil_div(out_block_, 2), kTileRows);
        continue;
      }
      if (pixels <= kTileColumns<T>) break;
      blocks_ = Blocks(conv_.input.N, grid_.rows, grid_.columns, pixels / 2);
    }
    blocks_.limit_images(images_that_fit<T>(group_block_ * channel_block_, grid_.window_pixels(blocks_)));
    const Block block = blocks_.at(0);
    const double pixels = static_cast<double>(block.pixels());
    const Planes shared(grid_, block, true), separate(grid_, block, false);
    auto cost_of = [&](const Planes& planes) {
      const double staging = conv_.input.channels_last ? 16 : 8;  // of a vector, in multiply-adds
      return round_up(planes.flat_pixels(block), Vec<T>::size) / pixels +
             staging * planes.channel_stride / pixels / (out_block_ * max_of(grid_.tap_count, 1));
    };
    shares_planes_ = cost_of(shared) <= cost_of(separate);
    cost_ = cost_of(shares_planes_ ? shared : separate);
  }

  // Multiply-adds for one that is wanted, those in the lanes that are not.
  double cost() const { return cost_; }

  bool run() {
    const bool in_place = std::is_same_v<T, Scalar> && conv_.weights.in_stride == 1;
    Scratch<T> packed(in_place ? 0 : conv_.output.C, depth_);
    if constexpr (std::is_same_v<T, Scalar>) {
      if (in_place) left_ = conv_.weights;
    }
    if (!in_place) {
      left_ = {packed.data(), out_channels_ * depth_, 1, depth_};
      pack_weights(packed.data());
    }
    if (!is_finite()) return false;
    const double work = 1.0 * conv_.input.N * grid_.rows * grid_.columns * conv_.output.C * depth_;
    parallel_for(tasks(), work < kSerialWork ? tasks() : 1, [&](int64_t task) { run_task(task); });
    return true;
  }

 private:
  // Fewer where the sums of all phases of a row would not stay in the second-level cache.
  int64_t pixels_wanted() const { return max_of(kTileColumns<T>, kPlanarPixels / min_of(4, grid_.output_step_x)); }
  int64_t out_blocks() const { return ceil_div(out_channels_, out_block_); }
  int64_t group_blocks() const { return ceil_div(conv_.groups, group_block_); }
  int64_t tasks() const { return blocks_.count() * out_blocks() * group_blocks(); }
  bool is_in_place() const { return left_.data == static_cast<const void*>(conv_.weights.data); }

  // A row for each output channel: for each block of channels, tap by tap, channel by channel.
  void pack_weights(T* packed) const {
    const int64_t out_step = 64, out_steps = ceil_div(out_channels_, out_step);
    const double work = 1.0 * conv_.output.C * depth_;
    const int64_t tasks = conv_.groups * out_steps;
    parallel_for(tasks, work < kSerialWork / 16 ? tasks : 1, [&](int64_t task) {
      const int64_t g = task / out_steps, k = task % out_steps * out_step;
      const Weights<Scalar>& w = conv_.weights;
      const Scalar* source = w.data + g * w.group_stride + k * w.out_stride;
      for (int64_t c = 0; c < in_channels_; c += channel_block_) {
        const int64_t channels = min_of(channel_block_, in_channels_ - c);
        pack_taps(grid_, w.innermost_taps, Matrix<Scalar>{source + c * w.in_stride, w.out_stride, w.in_stride},
                  min_of(out_step, out_channels_ - k), channels,
                  packed + (g * out_channels_ + k) * depth_ + c * grid_.tap_count, depth_, channels);
      }
    });
  }

  bool is_finite() const {
    bool finite = true;
    const int64_t row_depth = is_in_place() ? in_channels_ : depth_, pieces = is_in_place() ? grid_.tap_count : 1;
    parallel_for(conv_.output.C, ceil_div(1 << 15, max_of(depth_, 1)), [&](int64_t k) {
      const T* row = left_.data + k / out_channels_ * left_.group_stride + k % out_channels_ * left_.out_stride;
      for (int64_t t = 0; t < pieces; ++t) {
        if (all_finite(row + (is_in_place() ? grid_.taps[t].weight_offset : 0), row_depth)) continue;
        __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
      }
    });
    return finite;
  }

  struct Task {
    Block block;
    Planes planes;
    int64_t group, groups, out_channel, out_channels;  // out_channels of each of the groups
    const T* bias;
    int64_t sums_stride;  // from one output channel's sums to the next
  };

  void run_task(int64_t index) const {
    const Block block = blocks_.at(index / out_blocks() / group_blocks());
    const int64_t group = index / out_blocks() % group_blocks() * group_block_;
    const int64_t out_channel = index % out_blocks() * out_block_;
    Task task = {block,       Planes(grid_, block, shares_planes_),
                 group,       min_of(group_block_, conv_.groups - group),
                 out_channel, min_of(out_block_, out_channels_ - out_channel),
                 nullptr,     0};
    const bool direct = is_output_flat(task);
    task.sums_stride =
        direct ? conv_.output.H * conv_.output.W : round_up(task.planes.flat_pixels(block), Vec<T>::size);
    const int64_t phases_together = phases_of_row();
    const int64_t outputs = task.groups * task.out_channels;
    Scratch<T> results(direct ? 0 : phases_together, outputs, task.sums_stride), bias(outputs);
    Scratch<T> staged(task.groups * channel_block_ * task.planes.channel_stride + kTileColumns<T>);
    Scratch<int64_t> offsets(grid_.tap_count, channel_block_);
    if (conv_.bias != nullptr) {
      for (int64_t g = 0; g < task.groups; ++g) {
        widen_row(conv_.bias + (group + g) * out_channels_ + out_channel, task.out_channels,
                  bias.data() + g * task.out_channels);
      }
      task.bias = bias.data();
    }
    T* sums = results.data();
    if constexpr (sizeof(T) == sizeof(Scalar)) {
      if (direct) sums = conv_.output.at(block.image, group * out_channels_ + out_channel, block.row, block.column);
    }
    bool is_staged = false;
    for (int64_t phase = 0; phase < grid_.phase_count; phase += phases_together) {
      for (int64_t c = 0; c < in_channels_; c += channel_block_) {
        const int64_t channels = min_of(channel_block_, in_channels_ - c);
        if (!is_staged) stage_groups(task, c, channels, staged.data(), offsets.data());
        is_staged = channel_block_ == in_channels_;
        for (int64_t p = 0; p < phases_together; ++p) {
          multiply_phase(task, grid_.phases[phase + p], c, channels, staged.data(), offsets.data(),
                         sums + p * outputs * task.sums_stride);
        }
      }
      if (!direct) store_phases(task, phase, phases_together, sums);
    }
  }

  // Whether the planes' pixels are the output's own, row after row.
  bool is_output_flat(const Task& task) const {
    return sizeof(T) == sizeof(Scalar) && (!conv_.output.channels_last || conv_.output.C == 1) &&
           grid_.phase_count == 1 && task.block.images == 1 && task.groups == 1 &&
           (task.block.rows == 1 || task.planes.columns == conv_.output.W);
  }
  // Phases come row by row of residues; those of one row are stored together.
  int64_t phases_of_row() const {
    int64_t count = 1;
    while (count < grid_.phase_count && grid_.phases[count].output_y == grid_.phases[0].output_y) ++count;
    return count;
  }

  // The window's planes, and where in them the right operand's rows begin: [tap][channel].
  void stage_groups(const Task& task, int64_t c, int64_t channels, T* staged, int64_t* offsets) const {
    const Planes& planes = task.planes;
    if (channels == in_channels_) {
      stage_planes(conv_.input, task.block, task.group * in_channels_, task.groups * channels, planes, staged);
    } else {
      for (int64_t g = 0; g < task.groups; ++g) {
        stage_planes(conv_.input, task.block, (task.group + g) * in_channels_ + c, channels, planes,
                     staged + g * channels * planes.channel_stride);
      }
    }
    fill(staged + task.groups * channels * planes.channel_stride, T(0), kTileColumns<T>);
    for (int64_t t = 0; t < grid_.tap_count; ++t) {
      const int64_t offset = planes.tap_offset(grid_.taps[t], grid_);
      for (int64_t i = 0; i < channels; ++i) *offsets++ = offset + i * planes.channel_stride;
    }
  }
  // sums[group][out][pixel] (+)= the phase's taps of `channels` channels from c on.
  void multiply_phase(const Task& task, const Phase& phase, int64_t c, int64_t channels, const T* staged,
                      const int64_t* offsets, T* sums) const {
    const Block part = grid_.phase_block(task.block, phase);
    if (part.pixels() == 0) return;
    const int64_t outputs = task.groups * task.out_channels, pixels = task.planes.flat_pixels(part);
    if (phase.tap_count == 0) {
      for (int64_t k = 0; k < outputs; ++k) {
        fill(sums + k * task.sums_stride, task.bias == nullptr ? T(0) : task.bias[k], pixels);
      }
      return;
    }
    const int64_t taps_per_run = max_of(1, kDepthBlock / channels);
    for (int64_t t = 0; t < phase.tap_count; t += taps_per_run) {
      const int64_t tap = phase.first_tap + t, taps = min_of(taps_per_run, phase.tap_count - t);
      Stretch stretches[kDepthBlock];
      const int64_t count = stretches_of(c, channels, tap, taps, stretches);
      for (int64_t g = 0; g < task.groups; ++g) {
        multiply_run(task, g, pixels, stretches, count, staged + g * channels * task.planes.channel_stride,
                     offsets + tap * channels, sums, c > 0 || t > 0);
      }
    }
  }

  // Where the run's weights stand in a row of the left operand.
  int64_t stretches_of(int64_t c, int64_t channels, int64_t tap, int64_t taps, Stretch* stretches) const {
    if (!is_in_place()) {
      stretches[0] = {taps * channels, c * grid_.tap_count + tap * channels};
      return 1;
    }
    int64_t count = 0;
    for (int64_t t = tap; t < tap + taps; ++t) {
      const int64_t offset = grid_.taps[t].weight_offset + c;
      if (count > 0 && stretches[count - 1].offset + stretches[count - 1].depth == offset) {
        stretches[count - 1].depth += channels;
      } else {
        stretches[count++] = {channels, offset};
      }
    }
    return count;
  }

  void multiply_run(const Task& task, int64_t g, int64_t pixels, const Stretch* stretches, int64_t count,
                    const T* staged, const int64_t* offsets, T* sums, bool accumulate) const {
    const int64_t outputs = task.out_channels, rows_most = balanced(outputs, kTileRows);
    const T* left = left_.data + (task.group + g) * left_.group_stride + task.out_channel * left_.out_stride;
    const T* bias = task.bias == nullptr ? nullptr : task.bias + g * outputs;
    sums += g * outputs * task.sums_stride;
    const int64_t all_vectors = ceil_div(pixels, Vec<T>::size), tiles = ceil_div(all_vectors, kTileVectors);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = all_vectors * tile / tiles, vectors = all_vectors * (tile + 1) / tiles - first;
      const int64_t p = first * Vec<T>::size, columns = min_of(vectors * Vec<T>::size, pixels - p);
      for (int64_t k = 0; k < outputs; k += rows_most) {
        const int64_t rows = min_of(rows_most, outputs - k);
        tile_table<T>.functions[rows - 1][vectors - 1](stretches, count, left + k * left_.out_stride, left_.out_stride,
                                                       staged + p, offsets, bias == nullptr ? nullptr : bias + k,
                                                       sums + k * task.sums_stride + p, task.sums_stride,
                                                       columns - (vectors - 1) * Vec<T>::size, accumulate);
      }
    }
  }

  // The sums of `count` phases that make up whole rows, [phase][channel][pixel], to the output.
  void store_phases(const Task& task, int64_t first, int64_t count, const T* sums) const {
    const int64_t outputs = task.groups * task.out_channels;
    const int64_t first_out = task.group * out_channels_ + task.out_channel;
    const Phase& phase = grid_.phases[first];
    const int64_t rows = grid_.phase_block(task.block, phase).rows;
    Scratch<T> row(count > 1 ? count : 0, task.block.columns);
    for (int64_t n = 0; n < task.block.images; ++n) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t y = phase.output_y + (task.block.row + i) * grid_.output_step_y;
        const T* source = sums + task.planes.flat(n, i, 0);
        if (conv_.output.channels_last && conv_.output.C > 1) {
          for (int64_t p = 0; p < count; ++p) {
            const Window w = grid_.output_window(task.block, grid_.phases[first + p]);
            transpose(source + p * outputs * task.sums_stride, task.sums_stride, outputs,
                      grid_.phase_block(task.block, grid_.phases[first + p]).columns,
                      conv_.output.at(task.block.image + n, first_out, y, w.x), grid_.output_step_x * conv_.output.C);
          }
        } else {
          for (int64_t k = 0; k < outputs; ++k) {
            store_row(
                task, first, count, source + k * task.sums_stride, outputs * task.sums_stride, row.data(),
                conv_.output.at(task.block.image + n, first_out + k, y, grid_.output_window(task.block, phase).x));
          }
        }
      }
    }
  }

  void store_row(const Task& task, int64_t first, int64_t count, const T* source, int64_t phase_stride, T* row,
                 Scalar* output) const {
    if (count == 1) return narrow_row(source, grid_.phase_block(task.block, grid_.phases[first]).columns, output);
    int64_t columns = 0;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t phase_columns = grid_.phase_block(task.block, grid_.phases[first + p]).columns;
      scatter_row(source + p * phase_stride, count, phase_columns, row + p);
      columns += phase_columns;
    }
    narrow_row(row, columns, output);
  }

  const Convolution<Scalar>& conv_;
  const Grid& grid_;
  int64_t in_channels_, out_channels_, depth_;  // of one group
  Blocks blocks_;
  int64_t channel_block_, group_block_, out_block_;
  bool shares_planes_;
  double cost_;
  Weights<T> left_ = {};
};

}  // namespace

template <class Scalar>
bool is_planar_better(const Convolution<Scalar>& convolution) {
  const int64_t outputs = convolution.output.C / convolution.groups, lanes = Vec<accumulate_t<Scalar>>::size;
  const bool contiguous = !convolution.output.channels_last;
  // With more output channels, panels of weights are read faster than pixels at the places of many taps.
  const int64_t most = !contiguous ? lanes / 2 : convolution.grid.tap_count == 1 ? outputs : 8 * lanes;
  if (convolution.input.C == 0 || outputs > most) return false;
  const double dense = static_cast<double>(round_up(outputs, lanes)) / outputs;
  return PlanarConvolution<Scalar>(convolution).cost() < (contiguous ? 1.2 : 1.1) * dense;
}

template <class Scalar>
bool convolve_planar(const Convolution<Scalar>& convolution) {
  return PlanarConvolution<Scalar>(convolution).run();
}

template bool is_planar_better(const Convolution<float>&);
template bool is_planar_better(const Convolution<double>&);
template bool is_planar_better(const Convolution<bfloat16>&);
template bool is_planar_better(const Convolution<float16>&);
template bool convolve_planar(const Convolution<float>&);
template bool convolve_planar(const Convolution<double>&);
template bool convolve_planar(const Convolution<bfloat16>&);
template bool convolve_planar(const Convolution<float16>&);

}  // namespace dlkernels::DLKERNELS_ISA
