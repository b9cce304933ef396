// What both directions of the LSTM need: its operands in the type of the sums, the order of the packed rows, and how
// the members of a team share a step. The formulas are in lstm_forward.cc and lstm_backward.cc.
#pragma once

#include "gemm.h"
#include "lstm.h"

namespace dlkernels::DLKERNELS_ISA {

void lstm_forward(const LstmForwardArgs& args);
void lstm_backward(const LstmBackwardArgs& args);

// Rows of a step that a member takes at once: whole product tiles of either kind, and their gates fit in the
// first-level cache.
inline constexpr int64_t kStepRows = 48;
static_assert(kStepRows % kTileRows == 0 && kStepRows % kTileHeight == 0);

// A call with at most so many rows reads w_ih as it lies, one with at most so many steps besides also w_hh: packing a
// matrix costs about as much as two steps.
inline constexpr int64_t kFewRows = 64;
inline constexpr int64_t kFewSteps = 4;

// Sequences at once for which a step is worth a pass over w_ih.
inline constexpr int64_t kManySequences = 8;

// Calls with less work than this stay on one thread, and so do members without kMemberWork in a step; in multiply-adds
// and weights read.
inline constexpr int64_t kSerialWork = 300000;
inline constexpr int64_t kMemberWork = 16384;

inline constexpr int64_t kGates = 4;

// ---- operands ------------------------------------------------------------------------------------------------------

// `count` elements as Wide: in place when they already are.
template <class Scalar, class Wide>
class Widened {
  static constexpr bool kInPlace = std::is_same_v<Scalar, Wide>;

 public:
  Widened(const void* source, int64_t count) : copy_(kInPlace ? 0 : count) {
    const Scalar* values = static_cast<const Scalar*>(source);
    if constexpr (kInPlace) {
      data_ = values;
    } else {
      widen_row(values, count, copy_.data());
      data_ = copy_.data();
    }
  }
  const Wide* data() const { return data_; }

 private:
  Scratch<Wide> copy_;
  const Wide* data_;
};

// A right operand [depth][columns] as panels: packed, or in place when it may be.
template <class Scalar>
class RightOperand {
  using Factor = factor_t<Scalar>;
  static constexpr int64_t width = kTileColumns<Factor>;

 public:
  RightOperand(Matrix<Scalar> b, int64_t depth, int64_t columns, bool in_place)
      : packed_(in_place ? 0 : round_up(columns, width), round_up(depth, Step<Factor>::depth)) {
    if constexpr (sizeof(accumulate_t<Scalar>) == sizeof(Scalar)) {
      if (in_place) {
        panels_ = plain_panels<Factor>(b.data, b.row_stride);
        return;
      }
    }
    panels_ = packed_panels<Factor>(packed_.data(), depth);
    parallel_for(ceil_div(columns, width), 2, [&](int64_t panel) {
      pack_panel(b.at(0, panel * width), depth, min_of(width, columns - panel * width),
                 packed_.data() + panel * panels_.panel_stride, width);
    });
  }
  Panels<Factor> panel(int64_t index) const {
    return {panels_.data + index * panels_.panel_stride, panels_.row_stride, panels_.panel_stride};
  }

 private:
  Panels<Factor> panels_;
  Scratch<Factor> packed_;
};

// c[i][j] (+)= sum over k of row(i)[k] * b(k, j) for whole panels of columns, in runs of kDepthBlock.
template <class Factor, class Row>
inline void multiply_deep(int64_t rows, int64_t columns, int64_t depth, Row&& row, Panels<Factor> b,
                          accumulate_t<Factor>* c, int64_t c_row_stride, bool accumulate = false) {
  for (int64_t k = 0; k < depth; k += kDepthBlock) {
    const Panels<Factor> run = {b.data + k * b.row_stride, b.row_stride, b.panel_stride};
    multiply_rows<Factor>(
        rows, columns, min_of(kDepthBlock, depth - k), [&](int64_t i) { return row(i) + k; }, run, c, c_row_stride,
        accumulate || k > 0);
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
inline StateBefore<T> state_before(const Sequence& sequence, int64_t turn, const T* states, const T* initial,
                                   int64_t width) {
  const int64_t count = sequence.continued(turn);
  return {count > 0 ? states + sequence.offset(turn - 1) * width : initial, initial, count, width};
}

// ---- on tiles (split.h) ---------------------------------------------------------------------------------------------

// run(std::integral_constant<int, planes>()) for the recurrent product of a call: with no planes where it does not suit
// tiles, of which few rows or sequences would fill little, or where run returns that a number could not be split. Three
// planes make weights of six bytes an element out of four, which a step would mostly wait for.
template <class Scalar, class Run>
inline void choose_planes(const LstmLayer& layer, Run&& run) {
  const bool suits = layer.rows > kFewRows && layer.batch >= kManySequences && layer.projection_size == 0 &&
                     layer.hidden_size >= kTileDepth;
  if constexpr (kHasTiles && std::is_same_v<accumulate_t<Scalar>, float>) {
    const bool is_exact = suits && with_planes<Scalar>([&](auto planes) {
                            if constexpr (planes() < 3) return run(planes);
                            return false;
                          });
    if (is_exact) return;
  }
  run(std::integral_constant<int, 0>());
}

// In the place of Tiles where there is nothing to configure.
struct NoTiles {
  NoTiles() = default;
  template <class Pass>
  explicit NoTiles(const Pass&) {}
};

// What one turn leaves to the next, sequence by sequence, as left rows: two turns of them, one read while the other is
// written. Whole tiles of rows, zeros at first.
template <int Planes>
class TurnRows {
 public:
  TurnRows(int64_t rows, int64_t depth)
      : units_(ceil_div(depth, kTileDepth)),
        turn_size_(round_up(rows, kTileHeight) * units_),
        data_(Planes > 0 ? 2 : 0, turn_size_) {
    if (Planes > 0) __builtin_memset(data_.data(), 0, static_cast<size_t>(2 * turn_size_) * sizeof(LeftUnit<Planes>));
  }
  LeftUnit<Planes>* row(int64_t turn, int64_t i) const { return data_.data() + (turn & 1) * turn_size_ + i * units_; }
  LeftRows<Planes> rows(int64_t turn, int64_t first) const { return {row(turn, first), units_}; }
  int64_t units() const { return units_; }

 private:
  int64_t units_, turn_size_;
  Scratch<LeftUnit<Planes>> data_;
};

// ---- sharing -------------------------------------------------------------------------------------------------------

// How many members are worth having: for a step of `blocks` blocks of columns, each a product with `depth` rows of
// weights; columns in all.
inline int64_t members_for(const LstmLayer& layer, int64_t blocks, int64_t depth, int64_t columns) {
  if ((layer.rows + 4) * depth * columns < kSerialWork) return 1;
  return min_of(blocks * ceil_div(layer.batch, kTileRows), (layer.batch + 4) * depth * columns / kMemberWork);
}

// A matrix of `columns` x `rows` cut into panels `width` wide and tiles of rows.
struct Grid {
  int64_t columns, width, rows, tile_rows;
  int64_t tiles() const { return ceil_div(rows, tile_rows); }

  // Where a share ends that begins at the first tile of the first panel: panel by panel, all tiles of each.
  struct Place {
    int64_t panel, tile;
  };
  Place after(int64_t cost) const {
    const int64_t panel = cost / (width * tiles());
    return {panel, (cost - panel * width * tiles()) / max_of(min_of(width, columns - panel * width), 1)};
  }
  // What a member does: so many columns of tiles, which a narrow last panel has few of.
  int64_t cost() const { return columns * tiles(); }
};

// visit(panel, row, count) for the member's share; whole tiles of rows, at most kStepRows at once. Every other turn is
// taken backwards: it begins with the weights that the turn before has left in the cache.
template <class Visit>
inline void visit_share(const Member& member, const Grid& grid, bool backwards, Visit&& visit) {
  const Member::Range share = member.share(grid.cost());
  if (share.begin == share.end) return;
  const Grid::Place begin = grid.after(share.begin), end = grid.after(share.end);
  const int64_t last = end.tile > 0 ? end.panel : end.panel - 1;
  for (int64_t n = begin.panel; n <= last; ++n) {
    const int64_t panel = backwards ? begin.panel + last - n : n;
    const int64_t first_row = panel == begin.panel ? begin.tile * grid.tile_rows : 0;
    const int64_t end_row = panel == end.panel ? min_of(end.tile * grid.tile_rows, grid.rows) : grid.rows;
    for (int64_t row = first_row; row < end_row; row += kStepRows) {
      visit(panel, row, min_of(kStepRows, end_row - row));
    }
  }
}

}  // namespace dlkernels::DLKERNELS_ISA
