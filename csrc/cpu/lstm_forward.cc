// Long short-term memory (Hochreiter and Schmidhuber 1997, with forget gates), one layer in one direction: forward.
//
//   a_t = W_ih x_t + W_hh h_(t-1) + b        four blocks of H rows: i, f, g, o
//   i, f, o = sigmoid(a),  g = tanh(a)
//   c_t = f c_(t-1) + i g,   r_t = o tanh(c_t),   h_t = r_t, or W_hr r_t with a projection
//
// A team of threads runs the time loop in one parallel region and meets after every step; a member keeps the same
// hidden units, hence the same slice of the weights, in its second-level cache. The weights are packed once, as panels
// that hold the four gates of a vector of units side by side, so that a member multiplies a block of rows by one such
// panel and turns the result, still in the first-level cache, into gates, cell and hidden state.
//
// With many sequences at once, the panels hold W_ih above W_hh, and a step takes both products. With few, a step costs
// as much as reading the weights: the input's share of a_t is then one product over all rows before the time loop,
// written where the gates will be. Where even packing costs more than it saves, weights are read as they lie: few rows
// in all take dot products with the rows of W_ih, few steps also with those of W_hh.
//
// Half types: rows, weights and outputs are rounded; a_t and c_t stay float32, and so does the h_t that the next step
// reads, unless products take pairs of bfloat16.
// Cost: 2 * 4H * (input + output) operations a row.
#include "dots.h"
#include "lstm_sequence.h"
#include "vmath.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// ---- the pass -------------------------------------------------------------------------------------------------------

template <class Scalar>
class ForwardPass {
  using T = accumulate_t<Scalar>;
  using Factor = factor_t<Scalar>;
  static constexpr int64_t kUnits = Vec<T>::size;  // hidden units of a panel
  static constexpr int64_t kPanel = kGates * kUnits;
  static constexpr bool kWidens = !std::is_same_v<Scalar, Factor>;

 public:
  explicit ForwardPass(const LstmForwardArgs& args)
      : args_(args),
        layer_(args.layer),
        sequence_(args.layer),
        H_(layer_.hidden_size),
        outputs_(layer_.projection_size > 0 ? layer_.projection_size : layer_.hidden_size),
        few_rows_(layer_.rows <= kFewRows),
        few_steps_(few_rows_ && layer_.steps <= kFewSteps),
        many_sequences_(!few_rows_ && !kHasTiles && layer_.batch >= kManySequences),
        padded_inputs_(many_sequences_ ? round_up(layer_.input_size, Step<Factor>::depth) : 0),
        bias_(kGates * H_),
        h0_(layer_.h0, layer_.batch * outputs_),
        c0_(layer_.c0, layer_.batch * H_),
        rounded_from_(kWidens ? layer_.rows * outputs_ : 0),
        wide_input_(kWidens && many_sequences_ ? layer_.rows * layer_.input_size : 0),
        weights_(few_steps_ ? 0 : round_up(H_, kUnits) * kGates * panel_depth()),
        unprojected_(layer_.projection_size > 0 ? layer_.batch * H_ : 0),
        gates_(static_cast<T*>(args.gates)),
        cells_(static_cast<T*>(args.cells)),
        output_(static_cast<Scalar*>(args.output)) {
    if constexpr (kWidens) {
      hidden_ = rounded_from_.data();
    } else {
      hidden_ = output_;
    }
  }

  void run() {
    add_biases();
    if (!few_rows_ && !many_sequences_) multiply_input();
    if (!few_steps_) pack_weights();
    const RightOperand<Scalar> projection({static_cast<const Scalar*>(layer_.w_hr), 1, H_}, H_, layer_.projection_size,
                                          false);
    const int64_t depth = outputs_ + (few_rows_ || many_sequences_ ? layer_.input_size : 0);
    run_members(members_for(layer_, ceil_div(H_, kUnits), depth, kGates * H_), [&](const Member& member) {
      if (few_rows_) multiply_few_inputs(member);
      if constexpr (kWidens) {
        if (many_sequences_) widen_input(member);
      }
      member.meet();
      for (int64_t turn = 0; turn < layer_.steps; ++turn) {
        step(member, turn);
        member.meet();
        if (layer_.projection_size > 0) {
          project(member, turn, projection);
          member.meet();
        }
      }
    });
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

  // The same by dot products, a vector of gates at a time.
  void multiply_few_inputs(const Member& member) {
    const int64_t inputs = layer_.input_size, columns = kGates * H_;
    const Scalar* input = static_cast<const Scalar*>(layer_.input);
    const Scalar* weight = static_cast<const Scalar*>(layer_.w_ih);
    member.for_share(ceil_div(columns, kUnits), [&](int64_t task) {
      const int64_t j = task * kUnits, count = min_of(kUnits, columns - j);
      multiply_by_dots<Factor>(
          layer_.rows, count, inputs, [&](int64_t i) { return input + i * layer_.input_row_stride; },
          weight + j * inputs, inputs, gates_ + j, columns);
      for (int64_t i = 0; i < layer_.rows; ++i) add_to(gates_ + i * columns + j, bias_.data() + j, count);
    });
  }

  void widen_input(const Member& member) {
    const int64_t inputs = layer_.input_size;
    const Scalar* input = static_cast<const Scalar*>(layer_.input);
    member.for_share(layer_.rows, [&](int64_t i) {
      widen_row(input + i * layer_.input_row_stride, inputs, wide_input_.data() + i * inputs);
    });
  }
  const Factor* input_row(int64_t i) const {
    if constexpr (kWidens) {
      return wide_input_.data() + i * layer_.input_size;
    } else {
      return static_cast<const Factor*>(layer_.input) + i * layer_.input_row_stride;
    }
  }

  int64_t panel_depth() const { return padded_inputs_ + round_up(outputs_, Step<Factor>::depth); }

  // Element (k, [gate][unit]) of a block of units is W[gate * H + unit][k]; units beyond H are zero.
  void pack_weights() {
    constexpr int64_t width = kTileColumns<Factor>;
    const int64_t depth = panel_depth(), inputs = layer_.input_size;
    parallel_for(ceil_div(H_, kUnits), 2, [&](int64_t block) {
      const int64_t unit = block * kUnits, units = min_of(kUnits, H_ - unit);
      Factor* packed = weights_.data() + block * kPanel * depth;
      if (units < kUnits) fill(packed, Factor(), kPanel * depth);
      for (int64_t gate = 0; gate < kGates; ++gate) {
        Factor* panel =
            packed + gate / kTileVectors * width * depth + gate % kTileVectors * kUnits * Step<Factor>::depth;
        const int64_t row = gate * H_ + unit;
        const Matrix<Scalar> w_ih = {static_cast<const Scalar*>(layer_.w_ih) + row * inputs, 1, inputs};
        const Matrix<Scalar> w_hh = {static_cast<const Scalar*>(layer_.w_hh) + row * outputs_, 1, outputs_};
        if (many_sequences_) pack_panel(w_ih, inputs, units, panel, width);
        pack_panel(w_hh, outputs_, units, panel + padded_inputs_ * width, width);
      }
    });
  }

  // One turn of this member's units and rows.
  void step(const Member& member, int64_t turn) {
    const auto h_before = state_before<Factor>(sequence_, turn, hidden_, h0_.data(), outputs_);
    const auto c_before = state_before<T>(sequence_, turn, cells_, c0_.data(), H_);
    const int64_t first = sequence_.offset(turn);
    visit_share(member, {round_up(H_, kUnits), kUnits, sequence_.size(turn)}, turn % 2 == 1,
                [&](int64_t block, int64_t row, int64_t rows) {
                  alignas(64) T sums[kStepRows * kPanel];
                  const int64_t unit = block * kUnits, lanes = min_of(kUnits, H_ - unit);
                  multiply_weights(unit, lanes, first, row, rows, h_before, sums);
                  for (int64_t i = 0; i < rows; ++i) {
                    const T* c_row = c_before(row + i) + unit;
                    if (lanes == kUnits) {
                      update_cell<true>(sums + i * kPanel, first + row + i, row + i, unit, lanes, c_row);
                    } else {
                      update_cell<false>(sums + i * kPanel, first + row + i, row + i, unit, lanes, c_row);
                    }
                  }
                });
  }

  // sums[i][gate][u] = h_(row + i) . W_hh[gate * H + unit + u], with the input's share when a step takes it.
  void multiply_weights(int64_t unit, int64_t units, int64_t first, int64_t row, int64_t rows,
                        const StateBefore<Factor>& h_before, T* sums) {
    auto hidden = [&](int64_t i) { return h_before(row + i); };
    if (!few_steps_) {
      const Panels<Factor> panels =
          packed_panels<Factor>(weights_.data() + unit * kGates * panel_depth(), panel_depth());
      const Panels<Factor> below = {panels.data + padded_inputs_ * panels.row_stride, panels.row_stride,
                                    panels.panel_stride};
      if (many_sequences_) {
        multiply_deep(
            rows, kPanel, layer_.input_size, [&](int64_t i) { return input_row(first + row + i); }, panels, sums,
            kPanel);
      }
      return multiply_deep(rows, kPanel, outputs_, hidden, below, sums, kPanel, padded_inputs_ > 0);
    }
    const Scalar* weight = static_cast<const Scalar*>(layer_.w_hh) + unit * outputs_;
    for (int64_t gate = 0; gate < kGates; ++gate) {
      multiply_by_dots<Factor>(rows, units, outputs_, hidden, weight + gate * H_ * outputs_, outputs_,
                               sums + gate * kUnits, kPanel);
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
    const T* rest = many_sequences_ ? bias_.data() + unit : gates;
    for (int64_t g = 0; g < kGates; ++g) a[g] = get(sums + g * kUnits) + get(rest + g * H_);
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
      if constexpr (kWidens) put(output_ + place * H_ + unit, hidden);
    }
  }

  // hidden = unprojected W_hr^T for one turn.
  void project(const Member& member, int64_t turn, const RightOperand<Scalar>& weight) {
    constexpr int64_t width = kTileColumns<Factor>;
    const int64_t first = sequence_.offset(turn);
    visit_share(member, {outputs_, width, sequence_.size(turn)}, turn % 2 == 1,
                [&](int64_t panel, int64_t row, int64_t rows) {
                  alignas(64) T sums[kStepRows * width];
                  const int64_t j = panel * width, columns = min_of(width, outputs_ - j);
                  multiply_deep(
                      rows, columns, H_, [&](int64_t i) { return unprojected_.data() + (row + i) * H_; },
                      weight.panel(panel), sums, width);
                  for (int64_t i = 0; i < rows; ++i) {
                    const int64_t place = (first + row + i) * outputs_ + j;
                    narrow_row(sums + i * width, columns, hidden_ + place);
                    if constexpr (kWidens) narrow_row(sums + i * width, columns, output_ + place);
                  }
                });
  }

  void copy_last_states() {
    if (args_.h_n == nullptr && args_.c_n == nullptr) return;
    for (int64_t i = 0; i < layer_.batch; ++i) {
      const int64_t place = sequence_.offset(sequence_.last_turn(i)) + i;
      if (args_.h_n != nullptr) {
        __builtin_memcpy(static_cast<Scalar*>(args_.h_n) + i * outputs_, output_ + place * outputs_,
                         static_cast<size_t>(outputs_) * sizeof(Scalar));
      }
      if (args_.c_n != nullptr) narrow_row(cells_ + place * H_, H_, static_cast<Scalar*>(args_.c_n) + i * H_);
    }
  }

  const LstmForwardArgs& args_;
  const LstmLayer& layer_;
  Sequence sequence_;
  int64_t H_, outputs_;
  bool few_rows_, few_steps_;  // W_ih, W_hh are read as they lie
  bool many_sequences_;        // steps multiply the input too; with matrix units, one product for all is faster
  int64_t padded_inputs_;      // rows of a panel that are for W_ih
  Scratch<T> bias_;            // b_ih + b_hh
  Widened<Scalar, Factor> h0_;
  Widened<Scalar, T> c0_;
  Scratch<Factor> rounded_from_;  // the hidden states before they were rounded to the output
  Scratch<Factor> wide_input_;    // the input in the type of the products, where steps read it
  Scratch<Factor> weights_;       // [W_ih, W_hh] or W_hh as panels
  Scratch<Factor> unprojected_;   // [batch][H]
  Factor* hidden_;
  T* gates_;
  T* cells_;
  Scalar* output_;
};

}  // namespace

void lstm_forward(const LstmForwardArgs& args) {
  dispatch(args.layer.dtype, [&](auto* type) {
    using Scalar = std::remove_pointer_t<decltype(type)>;
    ForwardPass<Scalar>(args).run();
  });
}

}  // namespace dlkernels::DLKERNELS_ISA
