// Long short-term memory, one layer in one direction: backward. Notation as in lstm_forward.cc; dy_t is the gradient of
// the output, da_t that of the gates before their nonlinearity.
//
// The time loop runs the other way: dh_t = dy_t + W_hh^T da_(t+1) for a panel of hidden units, followed at once by the
// cell's derivative, which gives da_t for these units. As forward, it is one parallel region of a team that meets after
// every step. The gradients of weights, biases and input are products over all rows after the loop. With few rows,
// where such a product does little with each element that it writes, they are taken in the same region: from operands
// as they lie, straight into the result.
//
// Half types: as forward; where products take pairs of bfloat16, da_t and dh_t are rounded to it, as torch rounds them.
// Cost: twice that of forward.
#include "lstm_sequence.h"
#include "vmath.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

template <class Scalar, int Planes>
class BackwardPass {
  static constexpr bool kOnTiles = Planes > 0;
  using T = accumulate_t<Scalar>;
  using Factor = factor_t<Scalar>;
  static constexpr int64_t kWidth = kTileColumns<T>;
  static constexpr bool kRounds = sizeof(T) != sizeof(Scalar);
  static constexpr int64_t kRowStep = kOnTiles ? kTileHeight : kTileRows;

 public:
  explicit BackwardPass(const LstmBackwardArgs& args)
      : args_(args),
        layer_(args.layer),
        sequence_(args.layer),
        H_(layer_.hidden_size),
        outputs_(layer_.projection_size > 0 ? layer_.projection_size : layer_.hidden_size),
        few_rows_(!kRounds && layer_.rows <= kFewRows),
        w_hh_({static_cast<const Scalar*>(layer_.w_hh), outputs_, 1}, kOnTiles ? 0 : kGates * H_,
              kOnTiles ? 0 : outputs_, few_rows_ && layer_.steps <= kFewSteps),
        w_hr_({static_cast<const Scalar*>(layer_.w_hr), H_, 1}, layer_.projection_size,
              layer_.projection_size > 0 ? H_ : 0, few_rows_ && layer_.steps <= kFewSteps),
        c0_(layer_.c0, layer_.batch * H_),
        joined_inputs_(args.grad_w_ih != nullptr ? layer_.input_size : 0),
        joined_(args.grad_w_hh != nullptr ? joined_inputs_ + outputs_ : joined_inputs_),
        joined_rows_(few_rows_ && layer_.steps == 1 ? 0 : layer_.rows, joined_),
        grad_gates_(layer_.rows, kGates, H_),
        grad_h_(layer_.batch, outputs_),
        grad_c_(layer_.batch, H_),
        grad_unprojected_(layer_.projection_size > 0 ? layer_.batch : 0, H_),
        grad_hidden_(layer_.projection_size > 0 ? layer_.rows : 0, outputs_),
        gates_(static_cast<const T*>(args.gates)),
        cells_(static_cast<const T*>(args.cells)),
        gate_depth_(round_up(H_, kTileDepth)),
        later_gates_(layer_.batch, kGates * gate_depth_),
        units_(kOnTiles ? ceil_div(outputs_, kSplitColumns) : 0, later_gates_.units()) {}

  // Returns false where a number cannot be split for tiles: the gradients are to be computed again.
  bool run() {
    if constexpr (kOnTiles) {
      if (!split_weights()) return false;
    }
    start_from(args_.grad_h_n, layer_.batch * outputs_, grad_h_.data());
    start_from(args_.grad_c_n, layer_.batch * H_, grad_c_.data());
    const int64_t members = members_for(layer_, ceil_div(outputs_, kWidth), kGates * H_, outputs_);
    run_members(members, [&](const Member& member) {
      if (joined_rows_.data() != nullptr) join_rows(member);
      std::conditional_t<kOnTiles, Tiles, NoTiles> tiles;
      Vec<T> spoilt = Vec<T>::zero();
      for (int64_t turn = layer_.steps - 1; turn >= 0; --turn) {
        step(member, turn, tiles, spoilt);
        member.meet();
        if (layer_.projection_size > 0) {
          unproject(member, turn, spoilt);
          member.meet();
        }
      }
      if (args_.grad_h0 != nullptr) step(member, -1, tiles, spoilt);
      note(reduce_add(spoilt) == T(0));
      if (args_.grad_bias != nullptr) sum_bias(member);
      if constexpr (!kRounds) {
        if (few_rows_) finish_few_rows(member);
      }
    });
    if (!is_exact_) return false;
    if (args_.grad_h0 != nullptr) {
      narrow_row(grad_h_.data(), layer_.batch * outputs_, static_cast<Scalar*>(args_.grad_h0));
    }
    if (args_.grad_c0 != nullptr) {
      narrow_row(grad_c_.data(), layer_.batch * H_, static_cast<Scalar*>(args_.grad_c0));
    }
    if (!few_rows_) finish_many_rows();
    if (args_.grad_w_hr != nullptr) finish_projection();
    return true;
  }

 private:
  void start_from(const void* grad, int64_t count, T* state) {
    if (grad == nullptr) return fill(state, T(0), count);
    widen_row(static_cast<const Scalar*>(grad), count, state);
  }

  // dh before this turn's output gradient, from the turn taken after it, and without a projection the cells' part too.
  // Turn -1 leaves the gradient of h0.
  template <class TilesOrNone>
  void step(const Member& member, int64_t turn, TilesOrNone& tiles, Vec<T>& spoilt) {
    const int64_t later_rows = turn + 1 < layer_.steps ? sequence_.size(turn + 1) : 0;
    const int64_t rows = turn >= 0 ? sequence_.size(turn) : 0;
    const Factor* later = later_rows > 0 ? grad_gates_.data() + sequence_.offset(turn + 1) * kGates * H_ : nullptr;
    visit_share(member, {outputs_, kWidth, max_of(rows, later_rows), kRowStep}, turn % 2 == 0,
                [&](int64_t panel, int64_t row, int64_t count) {
                  const int64_t j = panel * kWidth, columns = min_of(kWidth, outputs_ - j);
                  T* grad_h = grad_h_.data() + row * outputs_ + j;
                  if (row < later_rows && kOnTiles) {
                    multiply_weights(tiles, turn + 1, row, min_of(count, later_rows - row), j, columns, grad_h);
                  } else if (row < later_rows) {
                    multiply_deep(
                        min_of(count, later_rows - row), columns, kGates * H_,
                        [&](int64_t i) { return later + (row + i) * kGates * H_; }, w_hh_.panel(panel), grad_h,
                        outputs_);
                  }
                  for (int64_t i = row; i < min_of(row + count, rows); ++i) {
                    if (layer_.projection_size > 0) {
                      add_grad_output(turn, i, j, columns);
                    } else {
                      differentiate_cells(turn, i, j, columns, spoilt);
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
  void unproject(const Member& member, int64_t turn, Vec<T>& spoilt) {
    const Factor* grad_hidden = grad_hidden_.data() + sequence_.offset(turn) * outputs_;
    visit_share(member, {H_, kWidth, sequence_.size(turn), kTileRows}, turn % 2 == 0,
                [&](int64_t panel, int64_t row, int64_t count) {
                  const int64_t j = panel * kWidth, columns = min_of(kWidth, H_ - j);
                  multiply_deep(
                      count, columns, outputs_, [&](int64_t i) { return grad_hidden + (row + i) * outputs_; },
                      w_hr_.panel(panel), grad_unprojected_.data() + row * H_ + j, H_);
                  for (int64_t i = row; i < row + count; ++i) differentiate_cells(turn, i, j, columns, spoilt);
                });
  }

  // On tiles: units_[32 outputs][unit of the depth], where every gate begins a unit.
  void note(bool split) {
    if (!split) __atomic_store_n(&is_exact_, false, __ATOMIC_RELAXED);
  }
  bool split_weights() {
    const int64_t panels = ceil_div(outputs_, kSplitColumns), units = later_gates_.units();
    parallel_for(panels, 1, [&](int64_t panel) {
      bool split = true;
      for (int64_t gate = 0; gate < kGates; ++gate) {
        const Matrix<Scalar> weight = {static_cast<const Scalar*>(layer_.w_hh) + gate * H_ * outputs_, outputs_, 1};
        const int64_t j = panel * kSplitColumns;
        split &= split_right(weight.at(0, j), H_, min_of(kSplitColumns, outputs_ - j),
                             units_.data() + panel * units + gate * gate_depth_ / kTileDepth);
      }
      note(split);
    });
    return is_exact_;
  }

  // dh[i][j ...] = da_(row + i) W_hh of a turn.
  template <class TilesOrNone>
  void multiply_weights(TilesOrNone& tiles, int64_t turn, int64_t row, int64_t rows, int64_t j, int64_t columns,
                        T* grad_h) {
    if constexpr (kOnTiles) {
      const int64_t units = later_gates_.units();
      multiply_units<Planes>(tiles, rows, columns, units, later_gates_.rows(turn, row),
                             units_.data() + j / kSplitColumns * units, units, grad_h, outputs_, false);
    }
  }

  // da_t and the gradient of c_(t-1) for units [j, j + columns) of sequence i.
  void differentiate_cells(int64_t turn, int64_t i, int64_t j, int64_t columns, Vec<T>& spoilt) {
    const int64_t place = sequence_.offset(turn) + i;
    const T* c_before = state_before<T>(sequence_, turn, cells_, c0_.data(), H_)(i);
    const T* gates = gates_ + place * kGates * H_;
    Factor* grad_gates = grad_gates_.data() + place * kGates * H_;
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
      const Vec<T> gradients[kGates] = {
          grad_cell * candidate * in * (one - in), grad_cell * before * forget * (one - forget),
          grad_cell * in * (one - candidate * candidate), grad_hidden * squashed * out * (one - out)};
      for (int64_t g = 0; g < kGates; ++g) {
        store(grad_gates + g * H_ + u, gradients[g], lanes);
        if constexpr (kOnTiles) {
          split_vector<Planes>(gradients[g], later_gates_.row(turn, i), g * gate_depth_ + u, spoilt);
        }
      }
      store(grad_c + u, grad_cell * forget, lanes);
    }
  }

  void join_rows(const Member& member) {
    member.for_share(layer_.steps, [&](int64_t turn) {
      for (int64_t i = 0; i < sequence_.size(turn); ++i) {
        const int64_t row = sequence_.offset(turn) + i;
        Scalar* joined = joined_rows_.data() + row * joined_;
        const Scalar* input = static_cast<const Scalar*>(layer_.input) + row * layer_.input_row_stride;
        if (joined_inputs_ > 0) __builtin_memcpy(joined, input, static_cast<size_t>(joined_inputs_) * sizeof(Scalar));
        if (joined_ > joined_inputs_) write_hidden_before(turn, i, joined + joined_inputs_);
      }
    });
  }
  // h_(t-1) of sequence i. Without a projection it is computed again, as forward did: the output is the caller's, who
  // may have changed it.
  void write_hidden_before(int64_t turn, int64_t i, Scalar* hidden) const {
    if (layer_.projection_size > 0 || i >= sequence_.continued(turn)) {
      const auto before = state_before<Scalar>(sequence_, turn, static_cast<const Scalar*>(args_.output),
                                               static_cast<const Scalar*>(layer_.h0), outputs_);
      __builtin_memcpy(hidden, before(i), static_cast<size_t>(outputs_) * sizeof(Scalar));
      return;
    }
    const int64_t row = sequence_.offset(turn - 1) + i;
    for (int64_t u = 0; u < H_; u += Vec<T>::size) {
      const int64_t lanes = min_of(Vec<T>::size, H_ - u);
      store_lanes(hidden + u, unprojected(row, u, lanes), lanes);
    }
  }
  // o tanh(c) of a row.
  DLKERNELS_INLINE Vec<T> unprojected(int64_t row, int64_t u, int64_t lanes) const {
    return load(gates_ + (row * kGates + 3) * H_ + u, lanes) * tanh(load(cells_ + row * H_ + u, lanes));
  }
  Matrix<Scalar> w_ih() const { return {static_cast<const Scalar*>(layer_.w_ih), layer_.input_size, 1}; }

  void finish_many_rows() {
    const Matrix<Factor> grad_gates = {grad_gates_.data(), kGates * H_, 1};
    product(layer_.rows, layer_.input_size, kGates * H_, grad_gates, w_ih(), args_.grad_input);
    // Both weights at once: da is transposed once, and two narrow results waste less of the tiles as one.
    Scalar* grad_w_ih = static_cast<Scalar*>(args_.grad_w_ih);
    Scalar* grad_w_hh = static_cast<Scalar*>(args_.grad_w_hh);
    const Matrix<Scalar> joined = {joined_rows_.data(), joined_, 1};
    gemm<T>(kGates * H_, joined_, layer_.rows, grad_gates.transposed(), joined,
            [&](int64_t i, int64_t j, int64_t count, const T* values) {
              const int64_t inputs = max_of(min_of(joined_inputs_ - j, count), 0);
              if (inputs > 0) narrow_row(values, inputs, grad_w_ih + i * joined_inputs_ + j);
              if (inputs == count) return;
              narrow_row(values + inputs, count - inputs, grad_w_hh + i * outputs_ + j + inputs - joined_inputs_);
            });
  }
  template <class B>
  static void product(int64_t rows, int64_t columns, int64_t depth, Matrix<Factor> a, Matrix<B> b, void* destination) {
    if (destination == nullptr) return;
    gemm<T>(rows, columns, depth, a, b, [&](int64_t i, int64_t j, int64_t count, const T* values) {
      narrow_row(values, count, static_cast<Scalar*>(destination) + i * columns + j);
    });
  }

  void finish_few_rows(const Member& member) {
    const int64_t inputs = layer_.input_size;
    if (T* grad_input = static_cast<T*>(args_.grad_input)) {
      const Panels<T> weight = plain_panels<T>(w_ih().data, inputs);
      visit_share(member, {inputs, kWidth, layer_.rows, kTileRows}, false,
                  [&](int64_t panel, int64_t row, int64_t count) {
                    const int64_t j = panel * kWidth;
                    const Panels<T> part = {weight.data + j, weight.row_stride, weight.panel_stride};
                    multiply_deep(
                        count, min_of(kWidth, inputs - j), kGates * H_,
                        [&](int64_t i) { return grad_gates_.data() + (row + i) * kGates * H_; }, part,
                        grad_input + row * inputs + j, inputs);
                  });
    }
    Matrix<Scalar> input = {static_cast<const Scalar*>(layer_.input), layer_.input_row_stride, 1};
    Matrix<Scalar> hidden = {static_cast<const Scalar*>(layer_.h0), outputs_, 1};
    if (joined_rows_.data() != nullptr) {
      input = {joined_rows_.data(), joined_, 1};
      hidden = input.at(0, joined_inputs_);
    }
    multiply_gates(member, input, inputs, args_.grad_w_ih);
    multiply_gates(member, hidden, outputs_, args_.grad_w_hh);
  }

  // grad_weight = da^T b for few rows: b's panels as they lie, da transposed block by block.
  void multiply_gates(const Member& member, Matrix<Scalar> b, int64_t columns, void* grad_weight) {
    if (grad_weight == nullptr) return;
    constexpr int64_t kBlock = 48;
    const Panels<T> panels = plain_panels<T>(b.data, b.row_stride);
    const Matrix<T> grad_gates = {grad_gates_.data(), 1, kGates * H_};  // transposed
    member.for_share(ceil_div(kGates * H_, kBlock), [&](int64_t block) {
      alignas(64) T buffer[kBlock * kFewRows];
      const int64_t gate = block * kBlock, gates = min_of(kBlock, kGates * H_ - gate);
      pack_rows(grad_gates.at(gate, 0), gates, layer_.rows, buffer, kFewRows);
      multiply(gates, columns, layer_.rows, buffer, kFewRows, panels, static_cast<T*>(grad_weight) + gate * columns,
               columns, false);
    });
  }

  static void add_row(T* sum, const Factor* addend, int64_t count) {
    for (int64_t j = 0; j < count; j += Vec<T>::size) {
      const int64_t lanes = min_of(Vec<T>::size, count - j);
      store_lanes(sum + j, load_lanes(sum + j, lanes) + load_lanes(addend + j, lanes), lanes);
    }
  }

  // Column sums of da, in runs of rows so that long sequences add no long chains.
  void sum_bias(const Member& member) {
    constexpr int64_t kColumns = 256, kRun = 64;
    const int64_t columns = kGates * H_, tasks = ceil_div(columns, kColumns);
    member.for_share(tasks, [&](int64_t task) {
      const int64_t j = task * kColumns, count = min_of(kColumns, columns - j);
      alignas(64) T total[kColumns], run[kColumns];
      fill(total, T(0), count);
      for (int64_t row = 0; row < layer_.rows; row += kRun) {
        fill(run, T(0), count);
        for (int64_t i = row; i < min_of(row + kRun, layer_.rows); ++i) {
          add_row(run, grad_gates_.data() + i * columns + j, count);
        }
        add_to(total, run, count);
      }
      narrow_row(total, count, static_cast<Scalar*>(args_.grad_bias) + j);
    });
  }

  // dW_hr = sum over rows of dh_t r_t^T; r_t = o tanh(c) is computed again.
  void finish_projection() {
    const Scratch<Factor> hidden(layer_.rows, H_);
    parallel_for(layer_.rows, 16, [&](int64_t row) {
      for (int64_t u = 0; u < H_; u += Vec<T>::size) {
        const int64_t lanes = min_of(Vec<T>::size, H_ - u);
        store(hidden.data() + row * H_ + u, unprojected(row, u, lanes), lanes);
      }
    });
    product(outputs_, H_, layer_.rows, Matrix<Factor>{grad_hidden_.data(), 1, outputs_},
            Matrix<Factor>{hidden.data(), H_, 1}, args_.grad_w_hr);
  }

  const LstmBackwardArgs& args_;
  const LstmLayer& layer_;
  Sequence sequence_;
  int64_t H_, outputs_;
  bool few_rows_;
  RightOperand<Scalar> w_hh_, w_hr_;
  Widened<Scalar, T> c0_;
  int64_t joined_inputs_, joined_;  // columns that want a gradient: of w_ih, and with those of w_hh
  Scratch<Scalar> joined_rows_;     // (x_t, h_(t-1)) of every row, as far as wanted; few rows of one step lie ready
  Scratch<Factor> grad_gates_;      // da, [rows][4 H]
  Scratch<T> grad_h_, grad_c_;      // of the states between two turns, [batch][...]
  Scratch<T> grad_unprojected_;     // with a projection: of r_t, [batch][H]
  Scratch<Factor> grad_hidden_;     // with a projection: of h_t, [rows][outputs]
  const T* gates_;
  const T* cells_;
  int64_t gate_depth_;                // on tiles: H in whole units
  TurnRows<Planes> later_gates_;      // on tiles: da of the turn taken before
  Scratch<RightUnit<Planes>> units_;  // on tiles: W_hh
  bool is_exact_ = true;
};

}  // namespace

void lstm_backward(const LstmBackwardArgs& args) {
  dispatch(args.layer.dtype, [&](auto* type) {
    using Scalar = std::remove_pointer_t<decltype(type)>;
    choose_planes<Scalar>(args.layer, [&](auto planes) { return BackwardPass<Scalar, planes()>(args).run(); });
  });
}

}  // namespace dlkernels::DLKERNELS_ISA
