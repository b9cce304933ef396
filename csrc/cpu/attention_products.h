// The products of attention, taken three ways: by fused multiply-adds in the type of the sums, by pairs of bfloat16
// (pairs.h), or on tiles (split.h). A way says how operands are stored and multiplies them; the passes are written
// once.
//
// A left operand is stored by rows along the depth, left_stride(depth) elements of Left apart: packed from memory, or
// written two vectors at a time by put(), where it is itself a result. A right operand is packed from memory, or turned
// from what was stored as a left one. Sums are whole tiles: rows and columns are written up to multiples of kRowStep
// and kColumnRoom, which must be there.
#pragma once

#include "attention_parts.h"

namespace dlkernels::DLKERNELS_ISA {

// The depth of an operand, and the rows of one that put() writes, in whole steps of this.
inline constexpr int64_t kOperandStep = 32;

template <class Factor>
class MultiplyAdds {
 public:
  using Sum = accumulate_t<Factor>;
  using Left = Factor;
  using Right = Factor;
  static constexpr int64_t kRowStep = 1, kColumnRoom = 1;               // of sums
  static constexpr int64_t kColumnStep = kTileColumns<Factor>;          // where a part of a right operand may begin
  static constexpr int64_t kDepthStep = Step<Factor>::depth;            // and of either, along the depth
  static constexpr bool kRoundsWeights = sizeof(Factor) < sizeof(Sum);  // to bfloat16

  struct LeftRows {
    Left* data;
    int64_t row_stride;
    LeftRows at(int64_t row, int64_t k) const { return {data + row * row_stride + k, row_stride}; }
  };
  struct RightColumns {
    Panels<Factor> panels;
    RightColumns at(int64_t k, int64_t column) const {
      Panels<Factor> part = panels;
      part.data += column / kColumnStep * panels.panel_stride + k * panels.row_stride;
      return {part};
    }
  };

  static int64_t left_stride(int64_t depth) { return round_up(depth, kOperandStep); }
  static int64_t left_size(int64_t rows, int64_t depth) { return rows * left_stride(depth); }
  static int64_t right_size(int64_t depth, int64_t columns) {
    return round_up(columns, kColumnStep) * round_up(depth, kDepthStep);
  }

  template <class Scalar>
  LeftRows pack_left(Matrix<Scalar> rows, int64_t count, int64_t depth, Left* storage) {
    pack_rows(rows, count, depth, storage, left_stride(depth));
    return {storage, left_stride(depth)};
  }
  template <class Scalar>
  RightColumns pack_right(Matrix<Scalar> right, int64_t depth, int64_t columns, Right* storage) {
    const Panels<Factor> panels = packed_panels<Factor>(storage, depth);
    for (int64_t j = 0; j < columns; j += kColumnStep) {
      pack_panel(right.at(0, j), depth, min_of(kColumnStep, columns - j),
                 storage + j / kColumnStep * panels.panel_stride, kColumnStep);
    }
    return {panels};
  }
  // The rows of `left` as rows of a right operand.
  RightColumns turn(LeftRows left, int64_t depth, int64_t columns, Right* storage) {
    if constexpr (kDepthStep == 1) return {plain_panels<Factor>(left.data, left.row_stride)};
    return pack_right(Matrix<Factor>{left.data, left.row_stride, 1}, depth, columns, storage);
  }

  // Elements [k, k + 2 vectors) of a left row. `check` gathers what check() is to see.
  static DLKERNELS_INLINE void put(Left* row, int64_t k, Vec<Sum> first, Vec<Sum> second, Vec<Sum>&) {
    store(row + k, first);
    store(row + k + Vec<Sum>::size, second);
  }
  void check(Vec<Sum>) {}

  void multiply(int64_t rows, int64_t columns, int64_t depth, LeftRows left, RightColumns right, Sum* c,
                int64_t c_row_stride, bool accumulate) {
    dlkernels::DLKERNELS_ISA::multiply<Factor>(rows, columns, depth, left.data, left.row_stride, right.panels, c,
                                               c_row_stride, accumulate);
  }

  // dots[i] = sum over k of a[i][k] b[i][k], for what was packed of b's columns as a right operand: one product after
  // another, as multiply() takes them; of pairs, whose sums round less than the operands, in any order.
  template <class A, class B>
  void row_dots(RightColumns b_columns, Matrix<A> a, Matrix<B> b, int64_t depth, int64_t rows, Sum* dots) {
    if constexpr (std::is_same_v<Factor, Sum>) {
      const Scratch<Factor> storage(right_size(depth, rows));
      const RightColumns a_columns = pack_right(a.transposed(), depth, rows, storage.data());
      for (int64_t i = 0; i < rows; i += Vec<Sum>::size) {
        Vec<Sum> sum = Vec<Sum>::zero();
        for (int64_t k = 0; k < depth; ++k) {
          const int64_t at = i / kColumnStep * a_columns.panels.panel_stride + k * kColumnStep + i % kColumnStep;
          sum = fma(load(a_columns.panels.data + at), load(b_columns.panels.data + at), sum);
        }
        store_lanes(dots + i, sum, min_of(Vec<Sum>::size, rows - i));
      }
    } else {
      for (int64_t i = 0; i < rows; ++i) dots[i] = dot(a.at(i, 0).data, b.at(i, 0).data, depth);
    }
  }

  bool is_exact() const { return true; }
};

template <int Planes>
class TileProducts {
 public:
  using Sum = float;
  using Left = LeftUnit<Planes>;
  using Right = RightUnit<Planes>;
  static constexpr int64_t kRowStep = kTileHeight, kColumnRoom = kTileHeight;
  static constexpr int64_t kColumnStep = kSplitColumns, kDepthStep = kTileDepth;
  static constexpr bool kRoundsWeights = Planes == 1;
  static_assert(kTileDepth == kOperandStep);

  struct LeftRows {
    Left* data;
    int64_t row_stride;
    LeftRows at(int64_t row, int64_t k) const { return {data + row * row_stride + k / kTileDepth, row_stride}; }
  };
  struct RightColumns {
    const Right* data;
    int64_t panel_stride;
    RightColumns at(int64_t k, int64_t column) const {
      return {data + column / kSplitColumns * panel_stride + k / kTileDepth, panel_stride};
    }
  };

  static int64_t left_stride(int64_t depth) { return ceil_div(depth, kTileDepth); }
  static int64_t left_size(int64_t rows, int64_t depth) { return round_up(rows, kTileHeight) * left_stride(depth); }
  static int64_t right_size(int64_t depth, int64_t columns) {
    return ceil_div(columns, kSplitColumns) * ceil_div(depth, kTileDepth);
  }

  // Writes whole tiles: rows up to a multiple of kTileHeight.
  template <class Scalar>
  LeftRows pack_left(Matrix<Scalar> rows, int64_t count, int64_t depth, Left* storage) {
    is_exact_ &= split_left(rows, count, depth, storage, left_stride(depth));
    return {storage, left_stride(depth)};
  }
  template <class Scalar>
  RightColumns pack_right(Matrix<Scalar> right, int64_t depth, int64_t columns, Right* storage) {
    const int64_t units = ceil_div(depth, kTileDepth);
    for (int64_t j = 0; j < columns; j += kSplitColumns) {
      is_exact_ &=
          split_right(right.at(0, j), depth, min_of(kSplitColumns, columns - j), storage + j / kSplitColumns * units);
    }
    return {storage, units};
  }
  RightColumns turn(LeftRows left, int64_t depth, int64_t columns, Right* storage) {
    const int64_t units = ceil_div(depth, kTileDepth);
    for (int64_t j = 0; j < columns; j += kSplitColumns) {
      for (int64_t u = 0; u < units; ++u) {
        turn_unit(left.at(u * kTileDepth, j), min_of(kTileDepth, depth - u * kTileDepth),
                  storage + j / kSplitColumns * units + u);
      }
    }
    return {storage, units};
  }

  static DLKERNELS_INLINE void put(Left* row, int64_t k, VecF first, VecF second, VecF& check) {
    Left& unit = row[k / kTileDepth];
    detail::split_two<Planes, false>(first, second, check, [&](int plane, detail::Line line) {
      store(reinterpret_cast<float*>(unit.plane[plane]), line);
    });
  }

  void multiply(int64_t rows, int64_t columns, int64_t depth, LeftRows left, RightColumns right, float* c,
                int64_t c_row_stride, bool accumulate) {
    multiply_units<Planes>(tiles_, round_up(rows, kTileHeight), round_up(columns, kTileHeight),
                           ceil_div(depth, kTileDepth), {left.data, left.row_stride}, right.data, right.panel_stride, c,
                           c_row_stride, accumulate);
  }

  template <class A, class B>
  void row_dots(RightColumns, Matrix<A> a, Matrix<B> b, int64_t depth, int64_t rows, float* dots) {
    for (int64_t i = 0; i < rows; ++i) dots[i] = dot(a.at(i, 0).data, b.at(i, 0).data, depth);
  }

  void check(VecF spoilt) { is_exact_ &= reduce_add(spoilt) == 0.0f; }

  // Whether every number could be split. Where not, the sums are not those of float32, and are to be taken another way.
  bool is_exact() const { return is_exact_; }

 private:
  // A unit of a right operand whose `depth` rows are the first units of 32 left rows, plane by plane.
  static void turn_unit(LeftRows left, int64_t depth, Right* unit) {
    for (int64_t plane = 0; plane < Planes; ++plane) {
      for (int64_t tile = 0; tile < 2; ++tile) {
        auto half_line = [&](int64_t row) {
          return load_half_bits(left.data[row * left.row_stride].plane[plane] + tile * kTileHeight);
        };
        for (int64_t pair = 0; pair < kTileHeight; ++pair) {
          const int64_t even = 2 * pair, odd = 2 * pair + 1;
          detail::Line line = detail::Line::zero();
          if (odd < depth) {
            line = detail::pair_up(half_line(even), half_line(odd));
          } else if (even < depth) {
            line = detail::pair_up(half_line(even), HalfBits{});
          }
          store(reinterpret_cast<float*>(unit->plane[plane][tile][pair]), line);
        }
      }
    }
  }

  Tiles tiles_;
  bool is_exact_ = true;
};

// The weights of a softmax as products take them: exp(scale * (score - shift)), in this order: the difference is exact
// near the largest score, however large that is. Where they are rounded to bfloat16 next, a coarse power of two does.
template <class Products>
class Weights {
 public:
  using T = typename Products::Sum;
  explicit DLKERNELS_INLINE Weights(T scale) : scale_(kIsCoarse ? scale * kLog2E : scale) {}

  DLKERNELS_INLINE Vec<T> operator()(Vec<T> score, Vec<T> shift) const {
    const Vec<T> exponent = (score - shift) * scale_;
    if constexpr (kIsCoarse) {
      return coarse_exp2_of_negative(exponent);
    } else {
      return exp_of_negative(exponent);
    }
  }

 private:
  static constexpr bool kIsCoarse = Products::kRoundsWeights;
  static constexpr T kLog2E = static_cast<T>(1.44269504088896341);
  Vec<T> scale_;
};

// Calls run(products) with a null pointer to the type of the fastest products for a call of this shape, and, where run
// returns that they were not exact, again with multiply-adds. Every pass of a call chooses alike: probabilities are
// normalised by forward's sums, whose scores other products would round otherwise.
template <class Scalar, class Run>
inline void choose_products(const AttentionSizes& sizes, Run&& run) {
  if constexpr (kHasTiles && std::is_same_v<accumulate_t<Scalar>, float>) {
    // Below these most of a tile would be padding.
    const int64_t rows = sizes.heads / sizes.kv_heads * sizes.query_length;
    if (rows >= kTileHeight / 2 && min_of(sizes.key_length, min_of(sizes.head_size, sizes.value_size)) >= kTileHeight) {
      const bool is_exact =
          with_planes<Scalar>([&](auto planes) { return run(static_cast<TileProducts<planes()>*>(nullptr)); });
      if (is_exact) return;
    }
  }
  run(static_cast<MultiplyAdds<factor_t<Scalar>>*>(nullptr));
}

}  // namespace dlkernels::DLKERNELS_ISA
