// float32 products on matrix units. A number is the sum of up to three bfloat16, each the rounding of what those before
// it have left: 8 + 8 + 8 bits of significand. A product of two such sums has nine terms; the six of order up to two
// (Henry, Tang and Heinecke 2019, arXiv:1904.06376) leave an error of the order of float32's own rounding. Each operand
// is split once, while it is packed, never in the inner loop.
//
//   planes  terms kept                       error of a product
//   3       hh hm mh mm hl lh                about 2^-24: float32
//   2       hh hm mh                         about 2^-16
//   1       hh                               about 2^-8: bfloat16
//
// A unit is 32 elements of the depth: of one row on the left, of 32 columns on the right. The depth is padded with
// zeros. A value whose rounding to bfloat16 is not finite cannot be split; packing tells, and the caller takes another
// path, so that infinities, NaN and the largest numbers come out as float32 has them.
#pragma once

#include "pack.h"
#include "tiles.h"

namespace dlkernels::DLKERNELS_ISA {

inline constexpr int64_t kSplitColumns = 2 * kTileHeight;  // of a right unit
inline constexpr int64_t kSplitRows = 2 * kTileHeight;     // of a block of sums

// The planes that hold numbers of a type: float32 as many as torch's precision setting asks for.
template <class Scalar>
inline int planes_of() {
  if constexpr (std::is_same_v<Scalar, bfloat16>) return 1;
  if constexpr (std::is_same_v<Scalar, float16>) return 2;
  return float32_planes();
}

template <int Planes>
struct LeftUnit {
  bfloat16 plane[Planes][kTileDepth];
};
template <int Planes>
struct RightUnit {
  bfloat16 plane[Planes][2][kTileHeight][kTileDepth];  // two tiles side by side
};

// planes[p * plane_stride + i] for `count` values. Returns whether all could be split.
template <int Planes>
inline bool split_row(const float* source, int64_t count, bfloat16* planes, int64_t plane_stride) {
  constexpr float kLargest = 3.3895e38f;  // above it bfloat16 rounds to infinity
  VecF excess = VecF::zero();             // one in a lane that met a value beyond the largest, or NaN
  for (int64_t i = 0; i < count; i += VecF::size) {
    const int64_t lanes = min_of(VecF::size, count - i);
    VecF rest = load_lanes(source + i, lanes);
    excess = select(abs(rest) <= VecF(kLargest), excess, VecF(1.0f));
    for (int p = 0; p < Planes; ++p) {
      bfloat16* out = planes + p * plane_stride + i;
      store_lanes(out, rest, lanes);
      rest = rest - load_lanes(out, lanes);
    }
  }
  return !any(VecF::zero() < excess);
}

// Rows of a left operand, a.data[i][k], as units: units[i * unit_stride + k / 32].
template <int Planes, class Scalar>
inline bool split_left(Matrix<Scalar> a, int64_t rows, int64_t depth, LeftUnit<Planes>* units, int64_t unit_stride) {
  alignas(64) float buffer[kTileHeight * kTileDepth];
  bool finite = true;
  for (int64_t i = 0; i < rows; i += kTileHeight) {
    const int64_t block_rows = min_of(kTileHeight, rows - i);
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      const int64_t block_depth = min_of(kTileDepth, depth - k);
      if (block_depth < kTileDepth) fill(buffer, 0.0f, kTileHeight * kTileDepth);
      pack_rows(a.at(i, k), block_rows, block_depth, buffer, kTileDepth);
      for (int64_t r = 0; r < block_rows; ++r) {
        LeftUnit<Planes>& unit = units[(i + r) * unit_stride + k / kTileDepth];
        finite &= split_row<Planes>(buffer + r * kTileDepth, kTileDepth, unit.plane[0], kTileDepth);
      }
    }
  }
  return finite;
}

// One unit of a right operand: b.data[k][j] for up to 32 x 32 elements, the others zero.
template <int Planes, class Scalar>
inline bool split_right(Matrix<Scalar> b, int64_t depth, int64_t columns, RightUnit<Planes>* unit) {
  alignas(64) float buffer[kTileDepth * kSplitColumns];
  alignas(64) bfloat16 planes[Planes][kTileDepth * kSplitColumns];
  if (depth < kTileDepth || columns < kSplitColumns) fill(buffer, 0.0f, kTileDepth * kSplitColumns);
  pack_rows(b, depth, columns, buffer, kSplitColumns);
  const bool finite = split_row<Planes>(buffer, kTileDepth * kSplitColumns, planes[0], kTileDepth * kSplitColumns);
  for (int p = 0; p < Planes; ++p) {
    for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
      const bfloat16 *even = planes[p] + 2 * pair * kSplitColumns, *odd = even + kSplitColumns;
      for (int64_t tile = 0; tile < 2; ++tile, even += kTileHeight, odd += kTileHeight) {
        bfloat16* out = unit->plane[p][tile][pair];
        for (int64_t j = 0; j < kTileHeight; ++j) out[2 * j] = even[j], out[2 * j + 1] = odd[j];
      }
    }
  }
  return finite;
}

// ---- the micro-kernel ---------------------------------------------------------------------------------------------

// Left rows, equally far apart: row i begins at first + i * unit_stride.
template <int Planes>
struct LeftRows {
  const LeftUnit<Planes>* first;
  int64_t unit_stride;
};

// A stretch of the depth, in units: `units` of them from first + left_offset, against those from right_offset.
struct UnitSegment {
  int64_t units, left_offset, right_offset;
};

namespace detail {

// The planes of each kept term, in an order in which mostly one side changes from one to the next; hh comes last.
template <int Planes>
struct Terms;
template <>
struct Terms<1> {
  static constexpr int count = 1, left[] = {0}, right[] = {0};
};
template <>
struct Terms<2> {
  static constexpr int count = 3, left[] = {1, 0, 0}, right[] = {0, 1, 0};
};
template <>
struct Terms<3> {
  static constexpr int count = 6, left[] = {2, 1, 1, 0, 0, 0}, right[] = {0, 0, 1, 1, 2, 0};
};

// Terms [Term, End) of one unit. Tiles 0 to 3 are the sums, [row tile][column tile]; 4 and 5 the left rows, 6 and 7 the
// right columns. `Previous` is the term whose tiles are loaded, or -1.
template <int Planes, int RowTiles, int ColumnTiles, int Term, int End, int Previous = -1>
DLKERNELS_INLINE void add_terms(Tiles& tiles, const LeftUnit<Planes>* left, int64_t left_stride,
                                const RightUnit<Planes>* right) {
  using T = Terms<Planes>;
  if constexpr (Previous < 0 || T::left[Term] != T::left[Previous]) {
    const char* rows = reinterpret_cast<const char*>(left->plane[T::left[Term]]);
    const int64_t row_bytes = left_stride * static_cast<int64_t>(sizeof(LeftUnit<Planes>));
    tiles.template load<4>(rows, row_bytes);
    if constexpr (RowTiles > 1) tiles.template load<5>(rows + kTileHeight * row_bytes, row_bytes);
  }
  if constexpr (Previous < 0 || T::right[Term] != T::right[Previous]) {
    tiles.template load<6>(right->plane[T::right[Term]][0], 64);
    if constexpr (ColumnTiles > 1) tiles.template load<7>(right->plane[T::right[Term]][1], 64);
  }
  tiles.template add_product<0, 4, 6>();
  if constexpr (ColumnTiles > 1) tiles.template add_product<1, 4, 7>();
  if constexpr (RowTiles > 1) tiles.template add_product<2, 5, 6>();
  if constexpr (RowTiles > 1 && ColumnTiles > 1) tiles.template add_product<3, 5, 7>();
  if constexpr (Term + 1 < End) {
    add_terms<Planes, RowTiles, ColumnTiles, Term + 1, End, Term>(tiles, left, left_stride, right);
  }
}

template <int Planes, int RowTiles, int ColumnTiles, int Begin, int End>
DLKERNELS_INLINE void add_segments(Tiles& tiles, LeftRows<Planes> left, const RightUnit<Planes>* right,
                                   const UnitSegment* segments, int64_t segment_count) {
  for (const UnitSegment* s = segments; s != segments + segment_count; ++s) {
    for (int64_t u = 0; u < s->units; ++u) {
      add_terms<Planes, RowTiles, ColumnTiles, Begin, End>(tiles, left.first + s->left_offset + u, left.unit_stride,
                                                           right + s->right_offset + u);
    }
  }
}

template <int Planes, int RowTiles, int ColumnTiles>
void multiply_tiles(Tiles& tiles, LeftRows<Planes> left, const RightUnit<Planes>* right, const UnitSegment* segments,
                    int64_t segment_count, float* sums) {
  tiles.clear<0>();
  if constexpr (ColumnTiles > 1) tiles.clear<1>();
  if constexpr (RowTiles > 1) tiles.clear<2>();
  if constexpr (RowTiles > 1 && ColumnTiles > 1) tiles.clear<3>();
  // The small terms of the whole run first: they hardly round, and the large ones then round as often as in float32.
  constexpr int last = Terms<Planes>::count - 1;
  if constexpr (last > 0)
    add_segments<Planes, RowTiles, ColumnTiles, 0, last>(tiles, left, right, segments, segment_count);
  add_segments<Planes, RowTiles, ColumnTiles, last, last + 1>(tiles, left, right, segments, segment_count);
  constexpr int64_t row_bytes = kSplitColumns * 4;
  tiles.store<0>(sums, row_bytes);
  if constexpr (ColumnTiles > 1) tiles.store<1>(sums + kTileHeight, row_bytes);
  if constexpr (RowTiles > 1) tiles.store<2>(sums + kTileHeight * kSplitColumns, row_bytes);
  if constexpr (RowTiles > 1 && ColumnTiles > 1) {
    tiles.store<3>(sums + kTileHeight * kSplitColumns + kTileHeight, row_bytes);
  }
}

}  // namespace detail

// c[i][j] (+)= sum over the segments of left row i times right column j, one run of sums, for `rows` <= 32 and
// `columns` <= 32. Whole tiles of left rows are read: there must be 16 or 32 of them in memory.
template <int Planes>
inline void multiply_split(Tiles& tiles, int64_t rows, int64_t columns, LeftRows<Planes> left,
                           const RightUnit<Planes>* right, const UnitSegment* segments, int64_t segment_count, float* c,
                           int64_t c_row_stride, bool accumulate) {
  alignas(64) float sums[kSplitRows * kSplitColumns];
  if (rows > kTileHeight) {
    columns > kTileHeight ? detail::multiply_tiles<Planes, 2, 2>(tiles, left, right, segments, segment_count, sums)
                          : detail::multiply_tiles<Planes, 2, 1>(tiles, left, right, segments, segment_count, sums);
  } else {
    columns > kTileHeight ? detail::multiply_tiles<Planes, 1, 2>(tiles, left, right, segments, segment_count, sums)
                          : detail::multiply_tiles<Planes, 1, 1>(tiles, left, right, segments, segment_count, sums);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* out = c + i * c_row_stride;
    const float* sum = sums + i * kSplitColumns;
    accumulate ? add_to(out, sum, columns) : widen_row(sum, columns, out);
  }
}

}  // namespace dlkernels::DLKERNELS_ISA
