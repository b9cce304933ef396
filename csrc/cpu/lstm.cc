// Long short-term memory (Hochreiter and Schmidhuber 1997, with forget gates), one layer in one direction.
//
//   a_t = W_ih x_t + W_hh h_(t-1) + b        four blocks of H rows: i, f, g, o
//   i, f, o = sigmoid(a),  g = tanh(a)
//   c_t = f c_(t-1) + i g,   r_t = o tanh(c_t),   h_t = r_t, or W_hr r_t with a projection
//
// The input's share of a_t is one product over all rows (all steps), written where the gates will be. The time loop
// then needs only W_hh: it is packed once, as panels that hold the four gates of a vector of hidden units side by side,
// so that a task multiplies a block of rows by one such panel and turns the result, still in the first-level cache,
// into gates, cell and hidden state. Every step is one parallel loop over hidden units; a thread meets the same units,
// hence the same slice of W_hh in its second-level cache, in every step. A call with few rows packs nothing: it takes
// dot products with the rows of the weights as they lie.
//
// Backward runs the time loop the other way: dh_t = dy_t + W_hh^T da_(t+1) for a panel of hidden units, followed in the
// same task by the cell's derivative, which gives da_t for these units. The gradients of weights, biases and input are
// products over all rows after the loop.
//
// Half types: rows, weights and outputs are rounded; a_t, c_t and the h_t that the next step reads stay float32.
// Cost forward: 2 * 4H * (input + output) operations a row; backward twice that.
#include "lstm.h"

#include "gemm.h"
#include "vmath.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// Rows of a step that a task takes at once: whole product tiles, and their gates fit in the first-level cache.
constexpr int64_t kStepRows = 48;

// Up to this many rows, packing the weights costs more than it saves.
constexpr int64_t kFewRows = 64;

// Steps (and calls of one step) with less work than this stay on one thread; in multiply-adds and weights read.
constexpr int64_t kSerialWork = 300000;

// Rows of a dot-product tile: with four weights' rows, its accumulators fill the registers.
constexpr int kDotRows = kVectorBytes == 64 ? 4 : 2;

constexpr int64_t kGates = 4;

// ---- operands ------------------------------------------------------------------------------------------------------

// `count` elements in the type of the sums: in place when they already are.
template <class Scalar>
class Widened {
  using T = accumulate_t<Scalar>;

 public:
  Widened(const void* source, int64_t count) : copy_(sizeof(T) == sizeof(Scalar) ? 0 : count) {
    const Scalar* values = static_cast<const Scalar*>(source);
    if constexpr (sizeof(T) == sizeof(Scalar)) {
      data_ = values;
    } else {
      widen_row(values, count, copy_.data());
      data_ = copy_.data();
    }
  }
  const T* data() const { return data_; }

 private:
  Scratch<T> copy_;
  const T* data_;
};

// A right operand [depth][columns] as panels: packed, or in place when it may be.
template <class Scalar>
class RightOperand {
  using T = accumulate_t<Scalar>;
  static constexpr int64_t width = kTileColumns<T>;

 public:
  RightOperand(Matrix<Scalar> b, int64_t depth, int64_t columns, bool in_place)
      : packed_(in_place ? 0 : round_up(columns, width) * depth) {
    if constexpr (sizeof(T) == sizeof(Scalar)) {
      if (in_place) {
        panels = plain_panels<T>(b.data, b.row_stride);
        return;
      }
    }
    parallel_for(ceil_div(columns, width), 2, [&](int64_t panel) {
      pack_rows(b.at(0, panel * width), depth, min_of(width, columns - panel * width),
                packed_.data() + panel * width * depth, width);
    });
    panels = packed_panels<T>(packed_.data(), depth);
  }
  Panels<T> panels;

 private:
  Scratch<T> packed_;
};

// c[i][j] = sum over k of row(i)[k] * b(k, j) for whole panels of columns, in runs of kDepthBlock.
template <class T, class Row>
inline void multiply_deep(int64_t rows, int64_t columns, int64_t depth, Row&& row, Panels<T> b, T* c,
                          int64_t c_row_stride) {
  for (int64_t k = 0; k < depth; k += kDepthBlock) {
    const Panels<T> run = {b.data + k * b.row_stride, b.row_stride, b.panel_stride};
    multiply_rows<T>(
        rows, columns, min_of(kDepthBlock, depth - k), [&](int64_t i) { return row(i) + k; }, run, c, c_row_stride,
        k > 0);
  }
}

// The packed rows of a call: sizes and places of the steps in the order in which they are taken.
class Sequence {
 public:
  explicit Sequence(const LstmLayer& layer) : layer_(layer), offsets_(layer.batch_sizes == nullptr ? 0 : layer.steps) {
    int64_t offset = 0;
    for (int64_t step = 0; layer.batch_sizes != nullptr && step < layer.steps; ++step) {
      offsets_[step] = offset;
      offset += layer.batch_sizes[step];
    }
  }
  int64_t step(int64_t turn) const { return layer_.reverse ? layer_.steps - 1 - turn : turn; }
  int64_t size(int64_t turn) const {
    return layer_.batch_sizes == nullptr ? layer_.batch : layer_.batch_sizes[step(turn)];
  }
  int64_t offset(int64_t turn) const {
    return layer_.batch_sizes == nullptr ? step(turn) * layer_.batch : offsets_[step(turn)];
  }
  // How many rows of this turn continue a row of the turn before; the others start from h0 and c0.
  int64_t continued(int64_t turn) const { return turn == 0 ? 0 : min_of(size(turn - 1), size(turn)); }
  // The turn in which sequence i was taken last.
  int64_t last_turn(int64_t i) const {
    int64_t turn = layer_.steps - 1;
    while (turn > 0 && size(turn) <= i) --turn;
    return turn;
  }

 private:
  const LstmLayer& layer_;
  Scratch<int64_t> offsets_;
};

// Where the state before a turn is found, sequence by sequence.
template <class T>
struct StateBefore {
  const T* continued;
  const T* initial;
  int64_t count, width;
  DLKERNELS_INLINE const T* operator()(int64_t i) const { return (i < count ? continued : initial) + i * width; }
};
template <class T>
StateBefore<T> state_before(const Sequence& sequence, int64_t turn, const T* states, const T* initial, int64_t width) {
  const int64_t count = sequence.continued(turn);
  return {count > 0 ? states + sequence.offset(turn - 1) * width : initial, initial, count, width};
}

int64_t grain_for(int64_t tasks, int64_t rows, int64_t depth, int64_t columns) {
  return (rows + 4) * depth * columns < kSerialWork ? tasks : 1;
}

// ---- dot products with unpacked weights
// --------------------------------------------------------------------------------

// sums[r][g] += x(r) . w[g] for Rows rows and the four gates of one unit; the sums stay spread over lanes.
template <int Rows, class T, class X, class W>
DLKERNELS_INLINE void accumulate_dots(int64_t depth, const X* const* x, const W* const* w,
                                      Vec<T> (&sums)[Rows][kGates]) {
  int64_t k = 0;
  for (; k + Vec<T>::size <= depth; k += Vec<T>::size) {
    Vec<T> weights[kGates];
    for (int64_t g = 0; g < kGates; ++g) weights[g] = load(w[g] + k);
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> values = load(x[r] + k);
      for (int64_t g = 0; g < kGates; ++g) sums[r][g] = fma(values, weights[g], sums[r][g]);
    }
  }
  if (k == depth) return;
  Vec<T> weights[kGates];
  for (int64_t g = 0; g < kGates; ++g) weights[g] = load(w[g] + k, depth - k);
  for (int r = 0; r < Rows; ++r) {
    const Vec<T> values = load(x[r] + k, depth - k);
    for (int64_t g = 0; g < kGates; ++g) sums[r][g] = fma(values, weights[g], sums[r][g]);
  }
}

// ---- forward
// -------------------------------------------------------------------------------------------------------------

template <class Scalar>
class ForwardPass {
  using T = accumulate_t<Scalar>;
  static constexpr int64_t kUnits = Vec<T>::size;  // hidden units of a panel
  static constexpr int64_t kPanel = kGates * kUnits;
  static constexpr bool kRounds = sizeof(T) != sizeof(Scalar);

 public:
  explicit ForwardPass(const LstmForwardArgs& args)
      : args_(args),
        layer_(args.layer),
        sequence_(args.layer),
        H_(layer_.hidden_size),
        outputs_(layer_.projection_size > 0 ? layer_.projection_size : layer_.hidden_size),
        few_rows_(layer_.rows <= kFewRows),
        bias_(kGates * H_),
        h0_(layer_.h0, layer_.batch * outputs_),
        c0_(layer_.c0, layer_.batch * H_),
        rounded_from_(kRounds ? layer_.rows * outputs_ : 0),
        recurrent_(few_rows_ ? 0 : round_up(H_, kUnits) * kGates * outputs_),
        unprojected_(layer_.projection_size > 0 ? layer_.batch * H_ : 0),
        gates_(static_cast<T*>(args.gates)),
        cells_(static_cast<T*>(args.cells)),
        output_(static_cast<Scalar*>(args.output)) {
    if constexpr (kRounds) {
      hidden_ = rounded_from_.data();
    } else {
      hidden_ = output_;
    }
  }

  void run() {
    add_biases();
    if (!few_rows_) {
      multiply_input();
      pack_recurrent();
    }
    const RightOperand<Scalar> projection({static_cast<const Scalar*>(layer_.w_hr), 1, H_}, H_, layer_.projection_size,
                                          false);
    const int64_t depth = outputs_ + (few_rows_ ? layer_.input_size : 0);
    for (int64_t turn = 0; turn < layer_.steps; ++turn) {
      const int64_t units = ceil_div(H_, kUnits), chunks = ceil_div(sequence_.size(turn), kStepRows);
      const int64_t grain = grain_for(units * chunks, sequence_.size(turn), depth, kGates * H_);
      parallel_for(units * chunks, grain,
                   [&](int64_t task) { step(turn, task / chunks * kUnits, task % chunks * kStepRows); });
      if (layer_.projection_size > 0) project(turn, projection.panels);
    }
    copy_last_states();
  }

 private:
  void add_biases() {
    fill(bias_.data(), T(0), kGates * H_);
    add_bias(static_cast<const Scalar*>(layer_.b_ih));
    add_bias(static_cast<const Scalar*>(layer_.b_hh));
  }
  void add_bias(const Scalar* values) {
    for (int64_t j = 0; values != nullptr && j < kGates * H_; j += Vec<T>::size) {
      const int64_t lanes = min_of(Vec<T>::size, kGates * H_ - j);
      store(bias_.data() + j, load(bias_.data() + j, lanes) + load(values + j, lanes), lanes);
    }
  }

  // gates = input W_ih^T + bias, for all rows.
  void multiply_input() {
    const Matrix<Scalar> input = {static_cast<const Scalar*>(layer_.input), layer_.input_row_stride, 1};
    const Matrix<Scalar> weight = {static_cast<const Scalar*>(layer_.w_ih), 1, layer_.input_size};
    gemm<T>(layer_.rows, kGates * H_, layer_.input_size, input, weight,
            [&](int64_t i, int64_t j, int64_t count, const T* values) {
              T* out = gates_ + i * kGates * H_ + j;
              narrow_row<T>(values, count, out);
              add_to(out, bias_.data() + j, count);
            });
  }

  // Element (k, [gate][unit]) of a block of units is W_hh[gate * H + unit][k]; units beyond H are zero.
  void pack_recurrent() {
    const Matrix<Scalar> weight = {static_cast<const Scalar*>(layer_.w_hh), 1, outputs_};
    parallel_for(ceil_div(H_, kUnits), 2, [&](int64_t block) {
      const int64_t unit = block * kUnits, units = min_of(kUnits, H_ - unit);
      T* packed = recurrent_.data() + block * kPanel * outputs_;
      if (units < kUnits) fill(packed, T(0), kPanel * outputs_);
      for (int64_t gate = 0; gate < kGates; ++gate) {
        T* panel = packed + gate / kTileVectors * kTileColumns<T> * outputs_ + gate % kTileVectors * kUnits;
        pack_rows(weight.at(0, gate * H_ + unit), outputs_, units, panel, kTileColumns<T>);
      }
    });
  }

  // One turn of the rows from `row` on, for one block of hidden units.
  void step(int64_t turn, int64_t unit, int64_t row) {
    alignas(64) T sums[kStepRows * kPanel];
    const int64_t rows = min_of(kStepRows, sequence_.size(turn) - row);
    const auto h_before = state_before<T>(sequence_, turn, hidden_, h0_.data(), outputs_);
    const auto c_before = state_before<T>(sequence_, turn, cells_, c0_.data(), H_);
    if (few_rows_) {
      multiply_few_rows(turn, unit, row, rows, h_before, sums);
    } else {
      const Panels<T> panels = packed_panels<T>(recurrent_.data() + unit * kGates * outputs_, outputs_);
      multiply_deep(rows, kPanel, outputs_, [&](int64_t i) { return h_before(row + i); }, panels, sums, kPanel);
    }
    const int64_t lanes = min_of(kUnits, H_ - unit);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t place = sequence_.offset(turn) + row + i;
      const T* c_row = c_before(row + i) + unit;
      if (lanes == kUnits) {
        update_cell<true>(sums + i * kPanel, place, row + i, unit, lanes, c_row);
      } else {
        update_cell<false>(sums + i * kPanel, place, row + i, unit, lanes, c_row);
      }
    }
  }

  // sums = bias + x W_ih^T + h W_hh^T by dot products. The weights of a unit come from memory once and stay in the
  // first-level cache for all rows.
  void multiply_few_rows(int64_t turn, int64_t first_unit, int64_t row, int64_t rows, const StateBefore<T>& h_before,
                         T* sums) {
    const int64_t units = min_of(kUnits, H_ - first_unit);
    if (units < kUnits) fill(sums, T(0), rows * kPanel);
    for (int64_t u = 0; u < units; ++u) {
      const int64_t unit = first_unit + u;
      int64_t i = 0;
      for (; i + kDotRows <= rows; i += kDotRows) {
        dot_rows<kDotRows>(turn, unit, row + i, h_before, sums + i * kPanel + u);
      }
      for (; i < rows; ++i) dot_rows<1>(turn, unit, row + i, h_before, sums + i * kPanel + u);
    }
  }

  // The four pre-activations of one unit for Rows rows from `row` on.
  template <int Rows>
  void dot_rows(int64_t turn, int64_t unit, int64_t row, const StateBefore<T>& h_before, T* sums) {
    const int64_t inputs = layer_.input_size;
    const Scalar* x[Rows];
    const T* h[Rows];
    for (int r = 0; r < Rows; ++r) {
      x[r] = static_cast<const Scalar*>(layer_.input) + (sequence_.offset(turn) + row + r) * layer_.input_row_stride;
      h[r] = h_before(row + r);
    }
    const Scalar* from_input[kGates];
    const Scalar* from_hidden[kGates];
    for (int64_t g = 0; g < kGates; ++g) {
      from_input[g] = static_cast<const Scalar*>(layer_.w_ih) + (g * H_ + unit) * inputs;
      from_hidden[g] = static_cast<const Scalar*>(layer_.w_hh) + (g * H_ + unit) * outputs_;
    }
    Vec<T> spread[Rows][kGates];
    for (auto& of_row : spread) {
      for (auto& sum : of_row) sum = Vec<T>::zero();
    }
    accumulate_dots<Rows, T>(inputs, x, from_input, spread);
    accumulate_dots<Rows, T>(outputs_, h, from_hidden, spread);
    for (int r = 0; r < Rows; ++r) {
      for (int64_t g = 0; g < kGates; ++g) {
        sums[r * kPanel + g * kUnits] = reduce_add(spread[r][g]) + bias_[g * H_ + unit];
      }
    }
  }

  // Gates, cell and hidden state of one row from its pre-activations.
  template <bool Whole>
  DLKERNELS_INLINE void update_cell(const T* sums, int64_t place, int64_t i, int64_t unit, int64_t lanes,
                                    const T* c_before) {
    auto get = [lanes](const T* p) { return Whole ? load(p) : load(p, lanes); };
    auto put = [lanes](auto* p, Vec<T> value) { Whole ? store(p, value) : store(p, value, lanes); };
    T* gates = gates_ + place * kGates * H_ + unit;
    Vec<T> a[kGates];
    for (int64_t g = 0; g < kGates; ++g) {
      a[g] = load(sums + g * kUnits);
      if (!few_rows_) a[g] += get(gates + g * H_);
    }
    const Vec<T> in = sigmoid(a[0]), forget = sigmoid(a[1]), candidate = tanh(a[2]), out = sigmoid(a[3]);
    const Vec<T> cell = fma(forget, get(c_before), in * candidate);
    const Vec<T> hidden = out * tanh(cell);
    put(gates, in);
    put(gates + H_, forget);
    put(gates + 2 * H_, candidate);
    put(gates + 3 * H_, out);
    put(cells_ + place * H_ + unit, cell);
    if (layer_.projection_size > 0) {
      put(unprojected_.data() + i * H_ + unit, hidden);
    } else {
      put(hidden_ + place * H_ + unit, hidden);
      if constexpr (kRounds) put(output_ + place * H_ + unit, hidden);
    }
  }

  // hidden = unprojected W_hr^T for one turn.
  void project(int64_t turn, Panels<T> weight) {
    const int64_t rows = sequence_.size(turn), first = sequence_.offset(turn);
    const int64_t panels = ceil_div(outputs_, kTileColumns<T>), chunks = ceil_div(rows, kStepRows);
    parallel_for(panels * chunks, grain_for(panels * chunks, rows, H_, outputs_), [&](int64_t task) {
      const int64_t panel = task / chunks, row = task % chunks * kStepRows;
      const int64_t j = panel * kTileColumns<T>, columns = min_of(kTileColumns<T>, outputs_ - j);
      const int64_t count = min_of(kStepRows, rows - row);
      const Panels<T> part = {weight.data + panel * weight.panel_stride, weight.row_stride, weight.panel_stride};
      multiply_deep(
          count, columns, H_, [&](int64_t i) { return unprojected_.data() + (row + i) * H_; }, part,
          hidden_ + (first + row) * outputs_ + j, outputs_);
      if constexpr (kRounds) {
        for (int64_t i = first + row; i < first + row + count; ++i) {
          narrow_row(hidden_ + i * outputs_ + j, columns, output_ + i * outputs_ + j);
        }
      }
    });
  }

  void copy_last_states() {
    if (args_.h_n == nullptr && args_.c_n == nullptr) return;
    for (int64_t i = 0; i < layer_.batch; ++i) {
      const int64_t place = sequence_.offset(sequence_.last_turn(i)) + i;
      if (args_.h_n != nullptr) {
        narrow_row(hidden_ + place * outputs_, outputs_, static_cast<Scalar*>(args_.h_n) + i * outputs_);
      }
      if (args_.c_n != nullptr) narrow_row(cells_ + place * H_, H_, static_cast<Scalar*>(args_.c_n) + i * H_);
    }
  }

  const LstmForwardArgs& args_;
  const LstmLayer& layer_;
  Sequence sequence_;
  int64_t H_, outputs_;
  bool few_rows_;
  Scratch<T> bias_;  // b_ih + b_hh
  Widened<Scalar> h0_, c0_;
  Scratch<T> rounded_from_;  // the hidden states before they were rounded to the output
  Scratch<T> recurrent_;     // W_hh as panels
  Scratch<T> unprojected_;   // [batch][H]
  T* hidden_;
  T* gates_;
  T* cells_;
  Scalar* output_;
};

// ---- backward
// ------------------------------------------------------------------------------------------------------------

template <class Scalar>
class BackwardPass {
  using T = accumulate_t<Scalar>;
  static constexpr int64_t kWidth = kTileColumns<T>;
  static constexpr bool kRounds = sizeof(T) != sizeof(Scalar);

 public:
  explicit BackwardPass(const LstmBackwardArgs& args)
      : args_(args),
        layer_(args.layer),
        sequence_(args.layer),
        H_(layer_.hidden_size),
        outputs_(layer_.projection_size > 0 ? layer_.projection_size : layer_.hidden_size),
        in_place_(!kRounds && layer_.rows <= kFewRows),
        w_hh_({static_cast<const Scalar*>(layer_.w_hh), outputs_, 1}, kGates * H_, outputs_, in_place_),
        w_hr_({static_cast<const Scalar*>(layer_.w_hr), H_, 1}, layer_.projection_size,
              layer_.projection_size > 0 ? H_ : 0, in_place_),
        c0_(layer_.c0, layer_.batch * H_),
        grad_gates_(layer_.rows * kGates * H_),
        grad_h_(layer_.batch * outputs_),
        grad_c_(layer_.batch * H_),
        grad_unprojected_(layer_.projection_size > 0 ? layer_.batch * H_ : 0),
        grad_hidden_(layer_.projection_size > 0 ? layer_.rows * outputs_ : 0),
        gates_(static_cast<const T*>(args.gates)),
        cells_(static_cast<const T*>(args.cells)) {}

  void run() {
    start_from(args_.grad_h_n, layer_.batch * outputs_, grad_h_.data());
    start_from(args_.grad_c_n, layer_.batch * H_, grad_c_.data());
    for (int64_t turn = layer_.steps - 1; turn >= 0; --turn) {
      step(turn);
      if (layer_.projection_size > 0) unproject(turn);
    }
    if (args_.grad_h0 != nullptr) {
      step(-1);
      narrow_row(grad_h_.data(), layer_.batch * outputs_, static_cast<Scalar*>(args_.grad_h0));
    }
    if (args_.grad_c0 != nullptr) {
      narrow_row(grad_c_.data(), layer_.batch * H_, static_cast<Scalar*>(args_.grad_c0));
    }
    finish_input();
    finish_weights();
    if (args_.grad_bias != nullptr) finish_bias();
    if (args_.grad_w_hr != nullptr) finish_projection();
  }

 private:
  void start_from(const void* grad, int64_t count, T* state) {
    if (grad == nullptr) return fill(state, T(0), count);
    widen_row(static_cast<const Scalar*>(grad), count, state);
  }

  // dh before this turn's output gradient, from the turn taken after it, and without a projection the cells' part too.
  // Turn -1 leaves the gradient of h0.
  void step(int64_t turn) {
    const int64_t later_rows = turn + 1 < layer_.steps ? sequence_.size(turn + 1) : 0;
    const int64_t rows = turn >= 0 ? sequence_.size(turn) : 0;
    const int64_t panels = ceil_div(outputs_, kWidth), chunks = ceil_div(max_of(rows, later_rows), kStepRows);
    const T* later = later_rows > 0 ? grad_gates_.data() + sequence_.offset(turn + 1) * kGates * H_ : nullptr;
    const int64_t grain = grain_for(panels * chunks, max_of(rows, later_rows), kGates * H_, outputs_);
    parallel_for(panels * chunks, grain, [&](int64_t task) {
      const int64_t panel = task / chunks, j = panel * kWidth, columns = min_of(kWidth, outputs_ - j);
      const int64_t row = task % chunks * kStepRows;
      const int64_t later_count = min_of(kStepRows, later_rows - row), count = min_of(kStepRows, rows - row);
      if (later_count > 0) {
        const Panels<T>& all = w_hh_.panels;
        const Panels<T> part = {all.data + panel * all.panel_stride, all.row_stride, all.panel_stride};
        multiply_deep(
            later_count, columns, kGates * H_, [&](int64_t i) { return later + (row + i) * kGates * H_; }, part,
            grad_h_.data() + row * outputs_ + j, outputs_);
      }
      for (int64_t i = row; i < row + count; ++i) {
        if (layer_.projection_size > 0) {
          add_grad_output(turn, i, j, columns);
        } else {
          differentiate_cells(turn, i, j, columns);
        }
      }
    });
  }

  Vec<T> grad_output(int64_t at, int64_t lanes) const {
    const Scalar* grad = static_cast<const Scalar*>(args_.grad_output);
    return grad == nullptr ? Vec<T>::zero() : load(grad + at, lanes);
  }

  void add_grad_output(int64_t turn, int64_t i, int64_t j, int64_t columns) {
    const int64_t place = (sequence_.offset(turn) + i) * outputs_;
    for (int64_t u = j; u < j + columns; u += Vec<T>::size) {
      const int64_t lanes = min_of(Vec<T>::size, j + columns - u);
      store(grad_hidden_.data() + place + u,
            load(grad_h_.data() + i * outputs_ + u, lanes) + grad_output(place + u, lanes), lanes);
    }
  }

  // With a projection: the gradient of r_t = dh_t W_hr, then the cells' part.
  void unproject(int64_t turn) {
    const int64_t rows = sequence_.size(turn), panels = ceil_div(H_, kWidth), chunks = ceil_div(rows, kStepRows);
    const T* grad_hidden = grad_hidden_.data() + sequence_.offset(turn) * outputs_;
    parallel_for(panels * chunks, grain_for(panels * chunks, rows, outputs_, H_), [&](int64_t task) {
      const int64_t panel = task / chunks, j = panel * kWidth, columns = min_of(kWidth, H_ - j);
      const int64_t row = task % chunks * kStepRows, count = min_of(kStepRows, rows - row);
      const Panels<T>& all = w_hr_.panels;
      const Panels<T> part = {all.data + panel * all.panel_stride, all.row_stride, all.panel_stride};
      multiply_deep(
          count, columns, outputs_, [&](int64_t i) { return grad_hidden + (row + i) * outputs_; }, part,
          grad_unprojected_.data() + row * H_ + j, H_);
      for (int64_t i = row; i < row + count; ++i) differentiate_cells(turn, i, j, columns);
    });
  }

  // da_t and the gradient of c_(t-1) for units [j, j + columns) of sequence i.
  void differentiate_cells(int64_t turn, int64_t i, int64_t j, int64_t columns) {
    const int64_t place = sequence_.offset(turn) + i;
    const T* c_before = state_before<T>(sequence_, turn, cells_, c0_.data(), H_)(i);
    const T* gates = gates_ + place * kGates * H_;
    T* grad_gates = grad_gates_.data() + place * kGates * H_;
    T* grad_c = grad_c_.data() + i * H_;
    const bool projected = layer_.projection_size > 0;
    const T* grad_r = (projected ? grad_unprojected_.data() : grad_h_.data()) + i * H_;
    const Vec<T> one = T(1);
    for (int64_t u = j; u < j + columns; u += Vec<T>::size) {
      const int64_t lanes = min_of(Vec<T>::size, j + columns - u);
      const Vec<T> in = load(gates + u, lanes), forget = load(gates + H_ + u, lanes);
      const Vec<T> candidate = load(gates + 2 * H_ + u, lanes), out = load(gates + 3 * H_ + u, lanes);
      const Vec<T> before = load(c_before + u, lanes);
      const Vec<T> cell =
          cells_ == nullptr ? fma(forget, before, in * candidate) : load(cells_ + place * H_ + u, lanes);
      const Vec<T> squashed = tanh(cell);
      Vec<T> grad_hidden = load(grad_r + u, lanes);
      if (!projected) grad_hidden += grad_output(place * H_ + u, lanes);
      const Vec<T> grad_cell = fma(grad_hidden * out, one - squashed * squashed, load(grad_c + u, lanes));
      store(grad_gates + u, grad_cell * candidate * in * (one - in), lanes);
      store(grad_gates + H_ + u, grad_cell * before * forget * (one - forget), lanes);
      store(grad_gates + 2 * H_ + u, grad_cell * in * (one - candidate * candidate), lanes);
      store(grad_gates + 3 * H_ + u, grad_hidden * squashed * out * (one - out), lanes);
      store(grad_c + u, grad_cell * forget, lanes);
    }
  }

  static auto write_rows(void* destination, int64_t width) {
    return [=](int64_t i, int64_t j, int64_t count, const T* values) {
      narrow_row(values, count, static_cast<Scalar*>(destination) + i * width + j);
    };
  }

  void finish_input() {
    if (args_.grad_input == nullptr) return;
    const int64_t inputs = layer_.input_size;
    const Matrix<T> grad_gates = {grad_gates_.data(), kGates * H_, 1};
    const Matrix<Scalar> weight = {static_cast<const Scalar*>(layer_.w_ih), inputs, 1};
    if constexpr (!kRounds) {
      if (in_place_) {
        const int64_t panels = ceil_div(inputs, kWidth);
        T* grad_input = static_cast<T*>(args_.grad_input);
        parallel_for(panels, grain_for(panels, layer_.rows, kGates * H_, inputs), [&](int64_t panel) {
          const int64_t j = panel * kWidth;
          multiply_deep(
              layer_.rows, min_of(kWidth, inputs - j), kGates * H_,
              [&](int64_t i) { return grad_gates.data + i * kGates * H_; },
              plain_panels<T>(weight.data + j, weight.row_stride), grad_input + j, inputs);
        });
        return;
      }
    }
    gemm<T>(layer_.rows, inputs, kGates * H_, grad_gates, weight, write_rows(args_.grad_input, inputs));
  }

  void finish_weights() {
    const Matrix<T> grad_gates = {grad_gates_.data(), 1, kGates * H_};  // transposed
    if (args_.grad_w_ih != nullptr) {
      const Matrix<Scalar> input = {static_cast<const Scalar*>(layer_.input), layer_.input_row_stride, 1};
      gemm<T>(kGates * H_, layer_.input_size, layer_.rows, grad_gates, input,
              write_rows(args_.grad_w_ih, layer_.input_size));
    }
    if (args_.grad_w_hh == nullptr) return;
    if (layer_.steps == 1) {
      const Matrix<Scalar> h0 = {static_cast<const Scalar*>(layer_.h0), outputs_, 1};
      gemm<T>(kGates * H_, outputs_, layer_.rows, grad_gates, h0, write_rows(args_.grad_w_hh, outputs_));
      return;
    }
    const Scratch<Scalar> h_before(layer_.rows * outputs_);
    parallel_for(layer_.steps, 8, [&](int64_t turn) {
      const auto before = state_before<Scalar>(sequence_, turn, static_cast<const Scalar*>(args_.output),
                                               static_cast<const Scalar*>(layer_.h0), outputs_);
      for (int64_t i = 0; i < sequence_.size(turn); ++i) {
        __builtin_memcpy(h_before.data() + (sequence_.offset(turn) + i) * outputs_, before(i),
                         static_cast<size_t>(outputs_) * sizeof(Scalar));
      }
    });
    gemm<T>(kGates * H_, outputs_, layer_.rows, grad_gates, Matrix<Scalar>{h_before.data(), outputs_, 1},
            write_rows(args_.grad_w_hh, outputs_));
  }

  // Column sums of da, in runs of rows so that long sequences add no long chains.
  void finish_bias() {
    constexpr int64_t kColumns = 256, kRun = 64;
    const int64_t columns = kGates * H_, tasks = ceil_div(columns, kColumns);
    parallel_for(tasks, grain_for(tasks, 0, layer_.rows, columns), [&](int64_t task) {
      const int64_t j = task * kColumns, count = min_of(kColumns, columns - j);
      alignas(64) T total[kColumns], run[kColumns];
      fill(total, T(0), count);
      for (int64_t row = 0; row < layer_.rows; row += kRun) {
        fill(run, T(0), count);
        for (int64_t i = row; i < min_of(row + kRun, layer_.rows); ++i) {
          add_to(run, grad_gates_.data() + i * columns + j, count);
        }
        add_to(total, run, count);
      }
      narrow_row(total, count, static_cast<Scalar*>(args_.grad_bias) + j);
    });
  }

  // dW_hr = sum over rows of dh_t r_t^T; r_t = o tanh(c) is computed again.
  void finish_projection() {
    const Scratch<T> unprojected(layer_.rows * H_);
    parallel_for(layer_.rows, 16, [&](int64_t row) {
      for (int64_t u = 0; u < H_; u += Vec<T>::size) {
        const int64_t lanes = min_of(Vec<T>::size, H_ - u);
        const Vec<T> out = load(gates_ + (row * kGates + 3) * H_ + u, lanes);
        store(unprojected.data() + row * H_ + u, out * tanh(load(cells_ + row * H_ + u, lanes)), lanes);
      }
    });
    gemm<T>(outputs_, H_, layer_.rows, Matrix<T>{grad_hidden_.data(), 1, outputs_},
            Matrix<T>{unprojected.data(), H_, 1}, write_rows(args_.grad_w_hr, H_));
  }

  const LstmBackwardArgs& args_;
  const LstmLayer& layer_;
  Sequence sequence_;
  int64_t H_, outputs_;
  bool in_place_;  // few rows: the weights are read where they lie
  RightOperand<Scalar> w_hh_, w_hr_;
  Widened<Scalar> c0_;
  Scratch<T> grad_gates_;        // da, [rows][4 H]
  Scratch<T> grad_h_, grad_c_;   // of the states between two turns, [batch][...]
  Scratch<T> grad_unprojected_;  // with a projection: of r_t, [batch][H]
  Scratch<T> grad_hidden_;       // with a projection: of h_t, [rows][outputs]
  const T* gates_;
  const T* cells_;
};

// ---- launchers
// -----------------------------------------------------------------------------------------------------------

void lstm_forward(const LstmForwardArgs& args) {
  dispatch(args.layer.dtype, [&](auto* type) {
    using Scalar = std::remove_pointer_t<decltype(type)>;
    ForwardPass<Scalar>(args).run();
  });
}

void lstm_backward(const LstmBackwardArgs& args) {
  dispatch(args.layer.dtype, [&](auto* type) {
    using Scalar = std::remove_pointer_t<decltype(type)>;
    BackwardPass<Scalar>(args).run();
  });
}

void lstm_product(const LstmProductArgs& args) {
  dispatch(args.dtype, [&](auto* type) {
    using Scalar = std::remove_pointer_t<decltype(type)>;
    using T = accumulate_t<Scalar>;
    const Matrix<Scalar> a = {static_cast<const Scalar*>(args.a), args.a_row_stride, args.a_column_stride};
    const Matrix<Scalar> b = {static_cast<const Scalar*>(args.b), args.b_row_stride, args.b_column_stride};
    gemm<T>(args.rows, args.columns, args.depth, a, b.transposed(),
            [&](int64_t i, int64_t j, int64_t count, const T* values) {
              narrow_row(values, count, static_cast<Scalar*>(args.product) + i * args.columns + j);
            });
  });
}

}  // namespace

LstmKernels lstm_kernels() {
  return {lstm_forward, lstm_backward, lstm_product};
}

}  // namespace dlkernels::DLKERNELS_ISA
