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
// On tiles (split.h) the weights are right units, two gates side by side, and the states of the turn before left rows:
// every member splits the hidden states that it computes, once, for all.
//
// Half types: rows, weights and outputs are rounded; a_t and c_t stay float32, and so does the h_t that the next step
// reads, unless bfloat16 is multiplied as it is.
// Cost: 2 * 4H * (input + output) operations a row.
#include "dots.h"
#include "lstm_sequence.h"
#include "vmath.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// ---- the pass -------------------------------------------------------------------------------------------------------

template <class Scalar, int Planes>
class ForwardPass {
  static constexpr bool kOnTiles = Planes > 0;
  using T = accumulate_t<Scalar>;
  using Factor = factor_t<Scalar>;
  static constexpr int64_t kUnits = Vec<T>::size;  // hidden units of a panel
  static constexpr int64_t kPanel = kGates * kUnits;
  static constexpr int64_t kPairs = kGates / 2;  // of gates, whose units are the columns of a right unit of tiles
  static constexpr bool kWidens = !std::is_same_v<Scalar, Factor>;
  static constexpr int64_t kRowStep = kOnTiles ? kTileHeight : kTileRows;

 public:
  explicit ForwardPass(const LstmForwardArgs& args)
      : args_(args),
        layer_(args.layer),
        sequence_(args.layer),
        H_(layer_.hidden_size),
        outputs_(layer_.projection_size > 0 ? layer_.projection_size : layer_.hidden_size),
        few_rows_(layer_.rows <= kFewRows),
        few_steps_(few_rows_ && layer_.steps <= kFewSteps),
        many_sequences_(!few_rows_ && layer_.batch >= kManySequences && (kOnTiles ? units_fit() : !kHasTiles)),
        padded_inputs_(many_sequences_ ? round_up(layer_.input_size, Step<Factor>::depth) : 0),
        bias_(kGates, H_),
        h0_(layer_.h0, layer_.batch * outputs_),
        c0_(layer_.c0, layer_.batch * H_),
        rounded_from_(kWidens && !kOnTiles ? layer_.rows : 0, outputs_),
        wide_input_(kWidens && many_sequences_ ? layer_.rows : 0, layer_.input_size),
        weights_(few_steps_ || kOnTiles ? 0 : round_up(H_, kUnits), kGates, panel_depth()),
        states_(layer_.batch, outputs_),
        input_units_(kOnTiles && many_sequences_ ? ceil_div(layer_.input_size, kTileDepth) : 0),
        units_(kOnTiles ? ceil_div(H_, kUnits) : 0, kPairs, input_units_ + states_.units()),
        unprojected_(layer_.projection_size > 0 ? layer_.batch : 0, H_),
        gates_(static_cast<T*>(args.gates)),
        cells_(static_cast<T*>(args.cells)),
        output_(static_cast<Scalar*>(args.output)) {
    if constexpr (kWidens) {
      hidden_ = rounded_from_.data();
    } else {
      hidden_ = output_;
    }
  }

  // Returns false where a number cannot be split for tiles: the results are to be computed again.
  bool run() {
    if constexpr (kOnTiles) {
      if (!split_weights() || !split_initial_states()) return false;
    } else if (!few_steps_) {
      pack_weights();
    }
    add_biases();
    if (!few_rows_ && !many_sequences_) multiply_input();
    const RightOperand<Scalar> projection({static_cast<const Scalar*>(layer_.w_hr), 1, H_}, H_, layer_.projection_size,
                                          false);
    const int64_t depth = outputs_ + (few_rows_ || many_sequences_ ? layer_.input_size : 0);
    run_members(members_for(layer_, ceil_div(H_, kUnits), depth, kGates * H_), [&](const Member& member) {
      if (few_rows_) multiply_few_inputs(member);
      if constexpr (kWidens) {
        if (many_sequences_) widen_input(member);
      }
      member.meet();
      std::conditional_t<kOnTiles, MemberTiles, NoTiles> tiles(*this);
      for (int64_t turn = 0; turn < layer_.steps; ++turn) {
        step(member, turn, tiles);
        member.meet();
        if (layer_.projection_size > 0) {
          project(member, turn, projection);
          member.meet();
        }
      }
    });
    copy_last_states();
    return is_exact_;
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

  // Whether the units of all weights stay in the second-level caches of two members.
  bool units_fit() const {
    constexpr int64_t bytes = 2560 << 10;
    return kGates * H_ * (layer_.input_size + outputs_) * Planes * 2 <= bytes;
  }

  // On tiles: units_[block][pair of gates][unit of the depth], those of W_ih before those of W_hh.
  RightUnit<Planes>* units_of(int64_t block, int64_t pair) const {
    return units_.data() + (block * kPairs + pair) * (input_units_ + states_.units());
  }
  void note(bool split) {
    if (!split) __atomic_store_n(&is_exact_, false, __ATOMIC_RELAXED);
  }
  bool split_weights() {
    parallel_for(ceil_div(H_, kUnits), 2, [&](int64_t block) {
      const int64_t unit = block * kUnits, lanes = min_of(kUnits, H_ - unit);
      bool split = true;
      auto split_gate = [&](const void* weights, int64_t depth, int64_t gate, int64_t first_unit) {
        const Matrix<Scalar> weight = {static_cast<const Scalar*>(weights) + (gate * H_ + unit) * depth, 1, depth};
        RightUnit<Planes>* out = units_of(block, gate / 2) + first_unit;
        split &= split_right_tiles(weight, depth, lanes, out, gate % 2);
      };
      for (int64_t gate = 0; gate < kGates; ++gate) {
        if (many_sequences_) split_gate(layer_.w_ih, layer_.input_size, gate, 0);
        split_gate(layer_.w_hh, outputs_, gate, input_units_);
      }
      note(split);
    });
    return is_exact_;
  }

  // Both turns hold h0, so that a sequence finds it whenever it begins.
  bool split_initial_states() {
    const Matrix<Scalar> h0 = {static_cast<const Scalar*>(layer_.h0), outputs_, 1};
    return split_left(h0, layer_.batch, outputs_, states_.row(0, 0), states_.units()) &&
           split_left(h0, layer_.batch, outputs_, states_.row(1, 0), states_.units());
  }

  // A member's tiles, and the input of a turn as left rows, where steps multiply it.
  struct MemberTiles {
    explicit MemberTiles(const ForwardPass& pass)
        : input(round_up(pass.layer_.batch, kTileHeight) * pass.input_units_) {}
    Tiles tiles;
    Scratch<LeftUnit<Planes>> input;
  };
  void split_input(MemberTiles& member, int64_t turn) {
    if (!many_sequences_) return;
    const Scalar* input = static_cast<const Scalar*>(layer_.input) + sequence_.offset(turn) * layer_.input_row_stride;
    const Matrix<Scalar> rows = {input, layer_.input_row_stride, 1};
    note(split_left(rows, sequence_.size(turn), layer_.input_size, member.input.data(), input_units_));
  }

  void multiply_on_tiles(MemberTiles& member, int64_t turn, int64_t block, int64_t row, int64_t rows, T* sums) {
    const int64_t whole_rows = round_up(rows, kTileHeight);
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      const RightUnit<Planes>* weights = units_of(block, pair);
      T* pair_sums = sums + pair * kSplitColumns;
      if (input_units_ > 0) {
        multiply_units<Planes>(member.tiles, whole_rows, kSplitColumns, input_units_,
                               {member.input.data() + row * input_units_, input_units_}, weights, 0, pair_sums, kPanel,
                               false);
      }
      multiply_units<Planes>(member.tiles, whole_rows, kSplitColumns, states_.units(), states_.rows(turn - 1, row),
                             weights + input_units_, 0, pair_sums, kPanel, input_units_ > 0);
    }
  }

  // One turn of this member's units and rows.
  template <class TilesOrNone>
  void step(const Member& member, int64_t turn, TilesOrNone& tiles) {
    const auto h_before = state_before<Factor>(sequence_, turn, hidden_, h0_.data(), outputs_);
    const auto c_before = state_before<T>(sequence_, turn, cells_, c0_.data(), H_);
    const int64_t first = sequence_.offset(turn);
    if constexpr (kOnTiles) split_input(tiles, turn);
    visit_share(member, {round_up(H_, kUnits), kUnits, sequence_.size(turn), kRowStep}, turn % 2 == 1,
                [&](int64_t block, int64_t row, int64_t rows) {
                  alignas(64) T sums[kStepRows * kPanel];
                  const int64_t unit = block * kUnits, lanes = min_of(kUnits, H_ - unit);
                  if constexpr (kOnTiles) {
                    multiply_on_tiles(tiles, turn, block, row, rows, sums);
                  } else {
                    multiply_weights(unit, lanes, first, row, rows, h_before, sums);
                  }
                  for (int64_t i = 0; i < rows; ++i) {
                    const T* c_row = c_before(row + i) + unit;
                    if (lanes == kUnits) {
                      update_cell<true>(sums + i * kPanel, turn, row + i, unit, lanes, c_row);
                    } else {
                      update_cell<false>(sums + i * kPanel, turn, row + i, unit, lanes, c_row);
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
  DLKERNELS_INLINE void update_cell(const T* sums, int64_t turn, int64_t i, int64_t unit, int64_t lanes,
                                    const T* c_before) {
    const int64_t place = sequence_.offset(turn) + i;
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
    if constexpr (kOnTiles) {
      VecF check = VecF::zero();  // a hidden state can always be split
      split_vector<Planes>(hidden, states_.row(turn, i), unit, check);
      put(output_ + place * H_ + unit, hidden);
    } else if (layer_.projection_size > 0) {
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
    visit_share(member, {outputs_, width, sequence_.size(turn), kTileRows}, turn % 2 == 1,
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
  bool many_sequences_;        // steps multiply the input too; with matrix units, where its weights fit the cache
  int64_t padded_inputs_;      // rows of a panel that are for W_ih
  Scratch<T> bias_;            // b_ih + b_hh
  Widened<Scalar, Factor> h0_;
  Widened<Scalar, T> c0_;
  Scratch<Factor> rounded_from_;      // the hidden states before they were rounded to the output
  Scratch<Factor> wide_input_;        // the input in the type of the products, where steps read it
  Scratch<Factor> weights_;           // [W_ih, W_hh] or W_hh as panels
  TurnRows<Planes> states_;           // on tiles: hidden states
  int64_t input_units_;               // on tiles: units of the depth that are for W_ih
  Scratch<RightUnit<Planes>> units_;  // on tiles: W_ih and W_hh
  bool is_exact_ = true;
  Scratch<Factor> unprojected_;  // [batch][H]
  Factor* hidden_;
  T* gates_;
  T* cells_;
  Scalar* output_;
};

}  // namespace

void lstm_forward(const LstmForwardArgs& args) {
  dispatch(args.layer.dtype, [&](auto* type) {
    using Scalar = std::remove_pointer_t<decltype(type)>;
    choose_planes<Scalar>(args.layer, [&](auto planes) { return ForwardPass<Scalar, planes()>(args).run(); });
  });
}

}  // namespace dlkernels::DLKERNELS_ISA
