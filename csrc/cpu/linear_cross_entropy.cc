// Softmax cross-entropy of the logits x = W h + b, without ever holding the logits.
//
//   m = max_c x_c,  s = log sum_c exp(x_c - m),  log p_c = (x_c - m) - s
//   loss = - sum_c t_c log p_c,   t_c = w_c ((1 - eps) q_c + eps / C)
//   g_c = scale (M p_c - t_c),    M = sum_c t_c
//   dh = W^T g,   dW = sum over rows of g h^T,   db = sum over rows of g
//
// (names as in cross_entropy.cc.) The logits of a block of classes and a block of rows are one cache-sized tile, stored
// with the classes down and the rows across: lanes are rows, so that maximum, sum and gradient are vertical, and the
// rows of W are the micro-kernel's row pointers as they lie. The inputs are packed once a call; on matrix units a tile
// splits its operands itself.
//
// Forward: a task is a block of rows and a part of the classes. It walks its classes tile by tile with the online
// softmax (Milakov and Gimelshein 2018); the parts are joined in order. One product.
// Backward: the tiles of one chunk of classes are computed again and turned into g in place; two products then add g^T
// W to dh and give this chunk of dW. Each phase is spread over all threads; every element of a gradient has one owner
// and one order of summation. Three products, and memory for the inputs and a chunk.
#include "linear_cross_entropy.h"

#include "gemm.h"
#include "vmath.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// A tile of logits with the operands of one depth block fits the second-level cache. On matrix units the more classes,
// the less is split.
constexpr int64_t kTileOfRows = 256;
constexpr int64_t kTileOfClasses = kHasTiles ? 416 : 192;
// Sums of this many products are added to a logit one after another: the exponential asks more of it than of others.
constexpr int64_t kLogitsDepth = 128;
// Terms of a softmax that are added up one after another.
constexpr int64_t kSumRun = 64;
// Padding of a tile's rows: without it their lines would all fall into the same few cache sets.
constexpr int64_t kPad = 16;
// Forward is cut into at least this many tasks, as far as classes allow.
constexpr int64_t kWantedTasks = 16;
// Elements of g that backward holds at a time: 4 MB, or 768 classes where there are many rows.
constexpr int64_t kChunkElements = int64_t{1} << 20;
constexpr int64_t kFewestChunkClasses = 4 * kTileOfClasses;
// Below this many operations a call stays on one thread.
constexpr double kSerialWork = 4e5;

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// ---- typed view of the arguments ------------------------------------------------------------------------------------

template <class T>
constexpr bool kUsesTiles = kHasTiles && std::is_same_v<T, float>;

template <class Scalar>
struct Problem {
  using T = accumulate_t<Scalar>;
  const LinearCrossEntropyShape& shape;
  Matrix<Scalar> input = {static_cast<const Scalar*>(shape.input), shape.input_row_stride, 1};
  Matrix<Scalar> linear_weight = {static_cast<const Scalar*>(shape.linear_weight), shape.linear_weight_row_stride, 1};
  const Scalar* linear_bias = static_cast<const Scalar*>(shape.linear_bias);
  const T* weight = static_cast<const T*>(shape.weight);
  T smoothing = static_cast<T>(shape.label_smoothing);
  T per_class = smoothing / static_cast<T>(max_of(shape.classes, 1));  // eps / C
  int64_t padded_rows = round_up(shape.rows, kPad);

  bool has_probabilities() const { return shape.target_probabilities != nullptr; }
  bool counts(int64_t row) const { return has_probabilities() || shape.target[row] != shape.ignore_index; }
  T class_weight(int64_t c) const { return weight == nullptr ? T(1) : weight[c]; }
  T bias(int64_t c) const { return linear_bias == nullptr ? T(0) : load_one(linear_bias + c); }
  int64_t packed_input_size() const {
    return suits_tiles() ? 0 : round_up(shape.rows, kTileColumns<T>) * shape.features;
  }
  bool suits_tiles() const { return kUsesTiles<T> && shape.rows >= kTileHeight && shape.features >= kTileDepth; }
  // Tasks that may stay on one thread.
  int64_t grain(int64_t tasks) const {
    return 2.0 * shape.rows * shape.classes * shape.features < kSerialWork ? tasks : 1;
  }
};

// Classes [first_class, first_class + classes) of rows [first_row, first_row + rows).
struct Block {
  int64_t first_class, classes, first_row, rows;
  // Calls body(c) for each class of a one-hot target in the block.
  template <class Scalar, class Body>
  void for_each_target(const Problem<Scalar>& p, Body&& body) const {
    if (p.has_probabilities()) return;
    for (int64_t row = first_row; row < first_row + rows; ++row) {
      const int64_t c = p.shape.target[row];
      if (p.counts(row) && c >= first_class && c < first_class + classes) body(row, c);
    }
  }
};

// ---- tiles: element (c, row) of a block is tile[c * stride + row] ---------------------------------------------------

// The input as packed panels of a right operand, one run of panels per depth block; on matrix units it is split
// instead.
template <class Scalar, class T = accumulate_t<Scalar>>
void pack_input(const Problem<Scalar>& p, T* packed) {
  if (p.suits_tiles()) return;
  const int64_t width = kTileColumns<T>, panels = ceil_div(p.shape.rows, width);
  parallel_for(ceil_div(p.shape.features, kDepthBlock) * panels, 4, [&](int64_t task) {
    const int64_t k = task / panels * kDepthBlock, j = task % panels * width;
    const int64_t depth = min_of(kDepthBlock, p.shape.features - k);
    pack_panel(p.input.transposed().at(k, j), depth, min_of(width, p.shape.rows - j),
               packed + k * panels * width + j * depth, width);
  });
}

// The logits of a block but for their bias. `buffer` holds a tile's rows of W where they have to be widened.
template <class Scalar, class T = accumulate_t<Scalar>>
void multiply_logits(const Problem<Scalar>& p, const T* packed_input, const Block& block, T* buffer, T* tile,
                     int64_t stride) {
  const int64_t features = p.shape.features, padded = round_up(p.shape.rows, kTileColumns<T>);
  for (int64_t k = 0; k < features; k += kDepthBlock) {
    const int64_t depth = min_of(kDepthBlock, features - k);
    int64_t row_stride;
    const T* rows =
        detail::rows_of<T>(p.linear_weight.at(block.first_class, k), block.classes, depth, buffer, &row_stride);
    const T* panels = packed_input + k * padded + block.first_row * depth;
    for (int64_t part = 0; part < depth; part += kLogitsDepth) {
      const Panels<T> part_panels = {panels + part * kTileColumns<T>, kTileColumns<T>, depth * kTileColumns<T>};
      multiply<T>(block.classes, block.rows, min_of(kLogitsDepth, depth - part), rows + part, row_stride, part_panels,
                  tile, stride, k + part > 0);
    }
  }
  if (features == 0) {
    for (int64_t c = 0; c < block.classes; ++c) fill(tile + c * stride, T(0), block.rows);
  }
}

template <class Scalar, class T = accumulate_t<Scalar>>
void compute_logits(const Problem<Scalar>& p, const T* packed_input, const Block& block, T* buffer, T* tile,
                    int64_t stride) {
  if constexpr (kUsesTiles<T>) {
    const detail::ProductBlock product = {block.first_class, block.classes, block.first_row, block.rows, 0,
                                          p.shape.features};
    if (p.suits_tiles()) {
      with_planes<Scalar>([&](auto planes) {
        detail::multiply_block_on_tiles<planes()>(p.linear_weight, p.input.transposed(), product, tile, stride);
      });
    } else {
      multiply_logits(p, packed_input, block, buffer, tile, stride);
    }
  } else {
    multiply_logits(p, packed_input, block, buffer, tile, stride);
  }
  if (p.linear_bias == nullptr) return;
  for (int64_t c = 0; c < block.classes; ++c) {
    const Vec<T> bias = p.bias(block.first_class + c);
    T* row = tile + c * stride;
    for (int64_t i = 0; i < block.rows; i += Vec<T>::size) store(row + i, load(row + i) + bias);
  }
}

// The class probabilities q of a block, turned to the tile's layout.
template <class Scalar, class T = accumulate_t<Scalar>>
void load_probabilities(const Problem<Scalar>& p, const Block& block, T* tile, int64_t stride) {
  dispatch(p.shape.target_dtype, [&](auto* type) {
    using Target = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<accumulate_t<Target>, T>) {
      const Target* q = static_cast<const Target*>(p.shape.target_probabilities);
      transpose(q + block.first_row * p.shape.classes + block.first_class, p.shape.classes, block.rows, block.classes,
                tile, stride);
    }
  });
}

// The other way: a tile into rows of the gradient of the probabilities. `buffer` has rows x classes elements.
template <class Scalar, class T = accumulate_t<Scalar>>
void store_grad_probabilities(const Problem<Scalar>& p, const Block& block, const T* tile, int64_t stride, T* buffer,
                              void* grad_target) {
  transpose(tile, stride, block.classes, block.rows, buffer, block.classes);
  dispatch(p.shape.target_dtype, [&](auto* type) {
    using Target = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<accumulate_t<Target>, T>) {
      Target* out = static_cast<Target*>(grad_target) + block.first_row * p.shape.classes + block.first_class;
      for (int64_t i = 0; i < block.rows; ++i) {
        narrow_row(buffer + i * block.classes, block.classes, out + i * p.shape.classes);
      }
    }
  });
}

// t_c of one vector of rows, but for the one-hot part; `q` is null without class probabilities.
template <class Scalar, class T = accumulate_t<Scalar>>
DLKERNELS_INLINE Vec<T> target_share(const Problem<Scalar>& p, int64_t c, const T* q) {
  const Vec<T> weight = p.class_weight(c);
  if (q == nullptr) return weight * Vec<T>(p.per_class);
  return fma(load(q), Vec<T>(T(1) - p.smoothing), Vec<T>(p.per_class)) * weight;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// What one part of the classes knows of each row: maximum, sum of exp(x - reference), sum of t (x - reference), sum of
// t, where the reference is the maximum, or 0 while that is -inf.
template <class T>
struct Partials {
  T *maximum, *sum, *share_sum, *mass;

  static constexpr int64_t kArrays = 4;
  Partials(T* data, int64_t padded_rows)
      : maximum(data), sum(data + padded_rows), share_sum(data + 2 * padded_rows), mass(data + 3 * padded_rows) {}
};

template <class T>
DLKERNELS_INLINE Vec<T> reference_of(Vec<T> maximum) {
  return select(maximum == Vec<T>(-kInfinity<T>), Vec<T>(T(0)), maximum);
}

// Joins partial results of other classes to those at row i.
template <class T>
DLKERNELS_INLINE void join(const Partials<T>& all, int64_t i, Vec<T> maximum, Vec<T> sum, Vec<T> share_sum,
                           Vec<T> mass) {
  const Vec<T> joint = max(load(all.maximum + i), maximum);
  // From a reference of 0 that stands for -inf nothing has to be shifted: all sums are 0 or infinite.
  auto shift_of = [&](Vec<T> own) {
    return select(own == Vec<T>(-kInfinity<T>), Vec<T>(T(0)), own - reference_of(joint));
  };
  const Vec<T> shift = shift_of(load(all.maximum + i)), other_shift = shift_of(maximum);
  store(all.sum + i, load(all.sum + i) * exp(shift) + sum * exp(other_shift));
  store(all.share_sum + i, fma(load(all.mass + i), shift, load(all.share_sum + i)) + fma(mass, other_shift, share_sum));
  store(all.mass + i, load(all.mass + i) + mass);
  store(all.maximum + i, joint);
}

template <class T>
void clear(const Partials<T>& partials, int64_t first_row, int64_t rows) {
  for (int64_t i = first_row; i < first_row + rows; i += Vec<T>::size) {
    store(partials.maximum + i, Vec<T>(-kInfinity<T>));
    store(partials.sum + i, Vec<T>(T(0)));
    store(partials.share_sum + i, Vec<T>(T(0)));
    store(partials.mass + i, Vec<T>(T(0)));
  }
}

// One tile of logits joined to the partial results; `q` is the tile of probabilities, or null.
template <class Scalar, class T = accumulate_t<Scalar>>
void join_tile(const Problem<Scalar>& p, const Block& block, const T* tile, const T* q, int64_t stride,
               const Partials<T>& partials) {
  const bool shares = q != nullptr || p.smoothing != T(0);
  for (int64_t i = 0; i < block.rows; i += Vec<T>::size) {
    Vec<T> maximum = -kInfinity<T>;
    for (int64_t c = 0; c < block.classes; ++c) maximum = max(maximum, load(tile + c * stride + i));
    const Vec<T> reference = reference_of(maximum);
    Vec<T> sum = T(0), share_sum = T(0), mass = T(0);
    for (int64_t run = 0; run < block.classes; run += kSumRun) {
      Vec<T> run_sum = T(0), run_share_sum = T(0), run_mass = T(0);
      for (int64_t c = run; c < min_of(run + kSumRun, block.classes); ++c) {
        const Vec<T> x = load(tile + c * stride + i) - reference;
        run_sum += exp(x);
        if (!shares) continue;
        const Vec<T> share = target_share(p, block.first_class + c, q == nullptr ? q : q + c * stride + i);
        run_share_sum = fma(share, x, run_share_sum);
        run_mass += share;
      }
      sum += run_sum, share_sum += run_share_sum, mass += run_mass;
    }
    join(partials, block.first_row + i, maximum, sum, share_sum, mass);
  }
}

// One block of rows against classes [begin, end). The logit of each one-hot target goes to target_logits.
template <class Scalar, class T = accumulate_t<Scalar>>
void forward_part(const Problem<Scalar>& p, const T* packed_input, int64_t first_row, int64_t begin, int64_t end,
                  const Partials<T>& partials, T* target_logits) {
  constexpr int64_t stride = kTileOfRows + kPad;
  const int64_t rows = min_of(kTileOfRows, p.shape.rows - first_row);
  Scratch<T> tile(kTileOfClasses, stride), buffer(kTileOfClasses, kDepthBlock);
  Scratch<T> q(p.has_probabilities() ? kTileOfClasses : 0, stride);
  fill(tile.data(), T(0), kTileOfClasses * stride);  // lanes beyond the last row are computed and never used
  if (p.has_probabilities()) fill(q.data(), T(0), kTileOfClasses * stride);
  clear(partials, first_row, rows);
  for (int64_t c = begin; c < end; c += kTileOfClasses) {
    const Block block = {c, min_of(kTileOfClasses, end - c), first_row, rows};
    compute_logits(p, packed_input, block, buffer.data(), tile.data(), stride);
    if (p.has_probabilities()) load_probabilities(p, block, q.data(), stride);
    join_tile(p, block, tile.data(), p.has_probabilities() ? q.data() : nullptr, stride, partials);
    block.for_each_target(
        p, [&](int64_t row, int64_t target) { target_logits[row] = tile[(target - c) * stride + row - first_row]; });
  }
}

// Loss and statistics of one row from the joined partial results.
template <class Scalar, class T = accumulate_t<Scalar>>
T finish_row(const Problem<Scalar>& p, int64_t row, const Partials<T>& all, T target_logit, T* statistics) {
  const T maximum = all.maximum[row], share_sum = all.share_sum[row];
  const T log_sum = log(Vec<T>(all.sum[row]))[0];
  T mass = all.mass[row];
  statistics[row] = maximum;
  statistics[p.shape.rows + row] = log_sum;
  T loss = 0;
  if (p.has_probabilities()) {
    // An infinite share of any log p < 0; the sums have lost the sign of the class that is the maximum.
    const bool infinite = __builtin_isinf(mass) && __builtin_isfinite(maximum) && __builtin_isfinite(log_sum);
    loss = infinite ? mass : mass * log_sum - share_sum;
  } else if (p.counts(row)) {
    const T hit = (T(1) - p.smoothing) * p.class_weight(p.shape.target[row]);
    loss = -hit * ((target_logit - maximum) - log_sum);
    if (p.smoothing != T(0)) loss += mass * log_sum - share_sum;
    mass += hit;
  } else {
    mass = T(0);
  }
  statistics[2 * p.shape.rows + row] = mass;
  return loss;
}

template <class T>
void finish_loss(const LinearCrossEntropyForwardArgs& args, double loss_total, double weight_total) {
  *args.divisor = args.reduction == LossReduction::mean ? weight_total : 1.0;
  if (args.reduction != LossReduction::none) *static_cast<T*>(args.loss) = static_cast<T>(loss_total / *args.divisor);
}

template <class Scalar>
void forward_typed(const LinearCrossEntropyForwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const Problem<Scalar> p{args.shape};
  const int64_t rows = p.shape.rows, classes = p.shape.classes;
  T* out = static_cast<T*>(args.loss);
  double loss_total = 0, weight_total = 0;
  if (rows == 0) return finish_loss<T>(args, loss_total, weight_total);
  const Scratch<T> packed_input(p.packed_input_size());
  pack_input(p, packed_input.data());

  const int64_t row_blocks = ceil_div(rows, kTileOfRows);
  const int64_t wanted = min_of(ceil_div(kWantedTasks, row_blocks), ceil_div(classes, kTileOfClasses));
  const int64_t part_classes = round_up(ceil_div(max_of(classes, 1), max_of(wanted, 1)), kTileOfClasses);
  const int64_t parts = max_of(ceil_div(classes, part_classes), 1);
  const int64_t part_size = Partials<T>::kArrays * p.padded_rows;
  Scratch<T> partials(parts, part_size), target_logits(rows);
  auto part_of = [&](int64_t part) { return Partials<T>(partials.data() + part * part_size, p.padded_rows); };
  const int64_t tasks = row_blocks * parts;
  parallel_for(tasks, p.grain(tasks), [&](int64_t task) {
    const int64_t part = task / row_blocks;
    forward_part(p, packed_input.data(), task % row_blocks * kTileOfRows, part * part_classes,
                 min_of(classes, (part + 1) * part_classes), part_of(part), target_logits.data());
  });

  const Partials<T> all = part_of(0);
  for (int64_t part = 1; part < parts; ++part) {
    const Partials<T> other = part_of(part);
    for (int64_t i = 0; i < rows; i += Vec<T>::size) {
      join(all, i, load(other.maximum + i), load(other.sum + i), load(other.share_sum + i), load(other.mass + i));
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const T loss = finish_row(p, row, all, target_logits[row], static_cast<T*>(args.statistics));
    if (args.reduction == LossReduction::none) out[row] = loss;
    loss_total += loss;
    if (p.counts(row)) weight_total += p.has_probabilities() ? T(1) : p.class_weight(p.shape.target[row]);
  }
  finish_loss<T>(args, loss_total, weight_total);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// What the gradient needs of each row, padded to whole vectors.
template <class Scalar, class T = accumulate_t<Scalar>>
struct RowConstants {
  Scratch<T> storage;
  T *maximum, *log_sum, *mass, *scale, *counts;

  RowConstants(const Problem<Scalar>& p, const LinearCrossEntropyBackwardArgs& args) : storage(5 * p.padded_rows) {
    fill(storage.data(), T(0), 5 * p.padded_rows);
    T** arrays[] = {&maximum, &log_sum, &mass, &scale, &counts};
    for (int64_t a = 0; a < 5; ++a) *arrays[a] = storage.data() + a * p.padded_rows;
    const int64_t rows = p.shape.rows;
    const T* statistics = static_cast<const T*>(args.statistics);
    const T* grad_loss = static_cast<const T*>(args.grad_loss);
    const T divisor = static_cast<T>(*args.divisor);
    for (int64_t row = 0; row < rows; ++row) {
      maximum[row] = statistics[row];
      log_sum[row] = statistics[rows + row];
      mass[row] = statistics[2 * rows + row];
      counts[row] = p.counts(row) ? T(1) : T(0);  // an ignored row: mass 0, and 0 / 0 where all rows are ignored
      scale[row] = p.counts(row) ? grad_loss[row * args.grad_loss_stride] / divisor : T(0);
    }
  }
};

// Turns a tile of logits into g. With `wants_grad_target` the gradient of the probabilities replaces q.
template <class Scalar, class T = accumulate_t<Scalar>>
void logits_to_gradient(const Problem<Scalar>& p, const Block& block, const RowConstants<Scalar>& constants, T* tile,
                        int64_t stride, T* q, int64_t q_stride, bool wants_grad_target) {
  T target_logits[kTileOfRows];  // the loop overwrites them
  block.for_each_target(p, [&](int64_t row, int64_t c) {
    target_logits[row - block.first_row] = tile[(c - block.first_class) * stride + row - block.first_row];
  });
  const bool shares = q != nullptr || p.smoothing != T(0);
  for (int64_t i = 0; i < block.rows; i += Vec<T>::size) {
    const int64_t row = block.first_row + i;
    const Vec<T> maximum = load(constants.maximum + row), log_sum = load(constants.log_sum + row);
    const Vec<T> mass = load(constants.mass + row), scale = load(constants.scale + row);
    const Vec<T> counts = load(constants.counts + row);
    for (int64_t c = 0; c < block.classes; ++c) {
      T* x = tile + c * stride + i;
      T* q_here = q == nullptr ? nullptr : q + c * q_stride + i;
      const Vec<T> log_p = (load(x) - maximum) - log_sum;
      Vec<T> g = mass * exp(log_p);
      if (shares) g -= counts * target_share(p, block.first_class + c, q_here);
      store(x, scale * g);
      if (wants_grad_target) {
        store(q_here, log_p * scale * Vec<T>(-(T(1) - p.smoothing) * p.class_weight(block.first_class + c)));
      }
    }
  }
  block.for_each_target(p, [&](int64_t row, int64_t c) {  // once more at the target, before rounding
    const T probability =
        exp(Vec<T>((target_logits[row - block.first_row] - constants.maximum[row]) - constants.log_sum[row]))[0];
    const T target = (T(1) - p.smoothing) * p.class_weight(c) + p.per_class * p.class_weight(c);
    tile[(c - block.first_class) * stride + row - block.first_row] =
        constants.scale[row] * (constants.mass[row] * probability - target);
  });
}

// The steps of backward over one chunk of classes after another.
template <class Scalar>
struct Backward {
  using T = accumulate_t<Scalar>;
  const Problem<Scalar>& p;
  const LinearCrossEntropyBackwardArgs& args;
  const int64_t rows = p.shape.rows, classes = p.shape.classes, features = p.shape.features;
  const bool wants_input = args.grad_input != nullptr;
  const bool wants_layer = args.grad_linear_weight != nullptr || args.grad_linear_bias != nullptr;
  const int64_t chunk = min_of(round_up(max_of(kChunkElements / rows, kFewestChunkClasses), kTileOfClasses),
                               round_up(max_of(classes, 1), kTileOfClasses));

  const RowConstants<Scalar> constants = {p, args};
  const int64_t g_stride = p.padded_rows + kPad;
  const Scratch<T> g{chunk, g_stride};  // [classes][rows]
  const Scratch<T> packed_input{p.packed_input_size()};
  const Scratch<T> wide_grad_input{wants_input && sizeof(T) != sizeof(Scalar) ? rows : 0, features};

  T* grad_input() const {
    return sizeof(T) == sizeof(Scalar) ? static_cast<T*>(args.grad_input) : wide_grad_input.data();
  }

  void prepare() const {
    fill(g.data(), T(0), chunk * g_stride);  // lanes beyond the last row are computed and never used
    pack_input(p, packed_input.data());
    if (wants_input) fill(grad_input(), T(0), rows * features);
  }

  // g of one tile; `begin` is the first class of the chunk.
  void compute_tile(const Block& block, int64_t begin) const {
    constexpr int64_t q_stride = kTileOfRows + kPad;
    const bool has_probabilities = p.has_probabilities();
    Scratch<T> buffer(sizeof(T) == sizeof(Scalar) ? 0 : kTileOfClasses, kDepthBlock);
    Scratch<T> q(has_probabilities ? 2 : 0, kTileOfClasses, q_stride);
    T* tile = g.data() + (block.first_class - begin) * g_stride + block.first_row;
    compute_logits(p, packed_input.data(), block, buffer.data(), tile, g_stride);
    if (has_probabilities) {
      fill(q.data(), T(0), kTileOfClasses * q_stride);
      load_probabilities(p, block, q.data(), q_stride);
    }
    logits_to_gradient(p, block, constants, tile, g_stride, has_probabilities ? q.data() : nullptr, q_stride,
                       args.grad_target != nullptr);
    if (args.grad_target != nullptr) {
      store_grad_probabilities(p, block, q.data(), q_stride, q.data() + kTileOfClasses * q_stride, args.grad_target);
    }
  }

  // dW and db of the chunk's classes [begin, begin + count), from all rows.
  void compute_layer(int64_t begin, int64_t count) const {
    if (args.grad_linear_bias != nullptr) {
      Scalar* out = static_cast<Scalar*>(args.grad_linear_bias) + begin;
      parallel_for(count, p.grain(64), [&](int64_t c) { store_one(out + c, sum_of(g.data() + c * g_stride, rows)); });
    }
    if (args.grad_linear_weight == nullptr) return;
    Scalar* out = static_cast<Scalar*>(args.grad_linear_weight) + begin * features;
    gemm<T>(count, features, rows, Matrix<T>{g.data(), g_stride, 1}, p.input,
            [&](int64_t i, int64_t j, int64_t columns, const T* values) {
              narrow_row(values, columns, out + i * features + j);
            });
  }

  // dh gains the chunk's classes.
  void add_to_grad_input(int64_t begin, int64_t count) const {
    gemm<T>(rows, features, count, Matrix<T>{g.data(), 1, g_stride}, p.linear_weight.at(begin, 0),
            [&](int64_t i, int64_t j, int64_t columns, const T* values) {
              add_to(grad_input() + i * features + j, values, columns);
            });
  }

  static T sum_of(const T* values, int64_t count) {
    Vec<T> sum = T(0);
    int64_t i = 0;
    for (; i + Vec<T>::size <= count; i += Vec<T>::size) sum += load(values + i);
    if (i < count) sum += load(values + i, count - i);
    return reduce_add(sum);
  }

  void run_chunk(int64_t begin, int64_t count) const {
    const int64_t row_blocks = ceil_div(rows, kTileOfRows);
    const int64_t tiles = ceil_div(count, kTileOfClasses) * row_blocks;
    parallel_for(tiles, p.grain(tiles), [&](int64_t task) {
      const int64_t c = task / row_blocks * kTileOfClasses, row = task % row_blocks * kTileOfRows;
      compute_tile({begin + c, min_of(kTileOfClasses, count - c), row, min_of(kTileOfRows, rows - row)}, begin);
    });
    if (wants_layer) compute_layer(begin, count);
    if (wants_input) add_to_grad_input(begin, count);
  }

  void run() const {
    prepare();
    for (int64_t c = 0; c < classes; c += chunk) run_chunk(c, min_of(chunk, classes - c));
    if constexpr (sizeof(T) != sizeof(Scalar)) {
      if (wants_input) narrow_row(grad_input(), rows * features, static_cast<Scalar*>(args.grad_input));
    }
  }
};

template <class Scalar>
void backward_typed(const LinearCrossEntropyBackwardArgs& args) {
  const Problem<Scalar> p{args.shape};
  if (p.shape.rows == 0) {  // sums over no rows
    const int64_t bytes = p.shape.classes * static_cast<int64_t>(sizeof(Scalar));
    if (args.grad_linear_weight != nullptr) __builtin_memset(args.grad_linear_weight, 0, bytes * p.shape.features);
    if (args.grad_linear_bias != nullptr) __builtin_memset(args.grad_linear_bias, 0, bytes);
    return;
  }
  Backward<Scalar>{p, args}.run();
}

void forward(const LinearCrossEntropyForwardArgs& args) {
  dispatch(args.shape.dtype, [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

void backward(const LinearCrossEntropyBackwardArgs& args) {
  dispatch(args.shape.dtype, [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace

LinearCrossEntropyKernels linear_cross_entropy_kernels() {
  return {forward, backward};
}

}  // namespace dlkernels::DLKERNELS_ISA
