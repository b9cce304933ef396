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
#include "pairs.h"
#include "tiles.h"

namespace dlkernels::DLKERNELS_ISA {

static_assert(!kHasTiles || VecF::size == kTileHeight);    // a row of a tile is a register
inline constexpr int64_t kSplitColumns = 2 * kTileHeight;  // of a right unit
inline constexpr int64_t kSplitRows = 2 * kTileHeight;     // of a block of sums

// The planes that hold numbers of a type: float32 as many as torch's precision setting asks for.
template <class Scalar>
inline int planes_of() {
  if constexpr (std::is_same_v<Scalar, bfloat16>) return 1;
  if constexpr (std::is_same_v<Scalar, float16>) return 2;
  return float32_planes();
}

// run(std::integral_constant<int, planes>()) with the planes of a type; returns what it returns.
template <class Scalar, class Run>
inline auto with_planes(Run&& run) {
  if constexpr (std::is_same_v<Scalar, bfloat16>) {
    return run(std::integral_constant<int, 1>());
  } else if constexpr (std::is_same_v<Scalar, float16>) {
    return run(std::integral_constant<int, 2>());
  } else {
    switch (float32_planes()) {
      case 1:
        return run(std::integral_constant<int, 1>());
      case 2:
        return run(std::integral_constant<int, 2>());
      default:
        return run(std::integral_constant<int, 3>());
    }
  }
}

template <int Planes>
struct LeftUnit {
  bfloat16 plane[Planes][kTileDepth];
};
template <int Planes>
struct RightUnit {
  bfloat16 plane[Planes][2][kTileHeight][kTileDepth];  // two tiles side by side
};

// Units of one run of sums: both sides of it fit the first-level cache, or, of one plane, nearly.
template <int Planes>
inline constexpr int64_t kRunUnits = Planes == 1   ? 8
                                     : Planes == 2 ? 4
                                                   : 3;

// ---- splitting ----------------------------------------------------------------------------------------------------

namespace detail {

// 32 bfloat16 in a register.
using Line = VecF;
using LineBits = Lanes<float>::bits;

// Two vectors rounded to bfloat16: one after the other, or, in lane i, element i of the first below that of the second.
// Subnormal numbers may become zero, as they do in the products.
DLKERNELS_INLINE Line line_up(HalfBits first, HalfBits second) {
  const HalfBits halves[2] = {first, second};
  LineBits bits;
  __builtin_memcpy(&bits, halves, sizeof bits);
  return from_bits<float>(bits);
}
DLKERNELS_INLINE Line pair_up(HalfBits first, HalfBits second) {
  return from_bits<float>(zero_extend(first) | zero_extend(second) << 16);
}
#if defined(DLKERNELS_AVX512_BF16)
DLKERNELS_INLINE Line line_up(VecF first, VecF second) {
  return from_bits<float>((LineBits)_mm512_cvtne2ps_pbh(second.raw, first.raw));
}
DLKERNELS_INLINE Line pair_up(VecF first, VecF second) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i line = (__m512i)_mm512_cvtne2ps_pbh(second.raw, first.raw);
  return from_bits<float>((LineBits)_mm512_permutexvar_epi16(_mm512_load_si512(order), line));
}
#else
DLKERNELS_INLINE Line line_up(VecF first, VecF second) {
  return line_up(narrow_bits(first), narrow_bits(second));
}
DLKERNELS_INLINE Line pair_up(VecF first, VecF second) {
  return pair_up(narrow_bits(first), narrow_bits(second));
}
#endif

DLKERNELS_INLINE HalfBits round_half(VecF a) {
#if defined(DLKERNELS_AVX512_BF16)
  return (HalfBits)_mm512_cvtneps_pbh(a.raw);
#else
  return narrow_bits(a);
#endif
}

// The reverse of both.
struct TwoVectors {
  VecF first, second;
};
DLKERNELS_INLINE TwoVectors widen_line(Line line) {
#if defined(DLKERNELS_AVX512)
  // Each number to the upper half of its lane.
  alignas(64) static constexpr uint16_t order[2][32] = {
      {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15},
      {0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21, 0, 22, 0, 23, 0, 24, 0, 25, 0, 26, 0, 27, 0, 28, 0, 29, 0, 30, 0, 31}};
  auto half = [&](int i) {
    const __m512i moved = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(order[i]), (__m512i)line.raw);
    return from_bits<float>((LineBits)moved);
  };
  return {half(0), half(1)};
#else
  HalfBits halves[2];
  __builtin_memcpy(halves, &line, sizeof halves);
  return {widen(bfloat16{}, halves[0]), widen(bfloat16{}, halves[1])};
#endif
}
DLKERNELS_INLINE TwoVectors widen_pairs(Line pairs) {
  return {from_bits<float>(bits_of(pairs) << 16), from_bits<float>(bits_of(pairs) & 0xffff0000u)};
}

// sink(plane, line) for the planes of two vectors. `spoilt` gathers a NaN where a value rounds to none that is finite.
template <int Planes, bool kPairs, class Sink>
DLKERNELS_INLINE void split_two(VecF first, VecF second, VecF& spoilt, Sink&& sink) {
#pragma GCC unroll 3
  for (int p = 0; p < Planes; ++p) {
    const Line line = kPairs ? pair_up(first, second) : line_up(first, second);
    sink(p, line);
    if (p > 0 && p == Planes - 1) break;
    const TwoVectors rounded = kPairs ? widen_pairs(line) : widen_line(line);
    if (p == 0) spoilt = fma(rounded.second, VecF::zero(), fma(rounded.first, VecF::zero(), spoilt));
    first = first - rounded.first, second = second - rounded.second;
  }
}

// What register i of a block holds: elements (i, 0) to (i, 15), widened; or bfloat16 that stay what they are, a line of
// elements (i, 0) to (i, 31), or the pairs (2i, j) and (2i + 1, j) of 16 columns j.
enum class Block { kRows, kLines, kPairs };
inline constexpr int64_t block_rows(Block block) {
  return block == Block::kPairs ? 2 * VecF::size : VecF::size;
}
inline constexpr int64_t block_columns(Block block) {
  return block == Block::kLines ? 2 * VecF::size : VecF::size;
}
inline constexpr Block transposed(Block block) {
  return block == Block::kRows ? Block::kRows : block == Block::kLines ? Block::kPairs : Block::kLines;
}

// A block of contiguous rows; zeros for those beyond `rows` and `columns`. Where these are constants the block stays in
// registers.
template <Block kBlock, class Scalar>
DLKERNELS_INLINE void load_block(const Scalar* data, int64_t row_stride, int64_t rows, int64_t columns,
                                 VecF (&block)[VecF::size]) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < VecF::size; ++i) {
    if constexpr (kBlock == Block::kRows) {
      block[i] = i < rows ? load_lanes(data + i * row_stride, columns) : VecF::zero();
    } else if constexpr (kBlock == Block::kLines) {
      const Scalar* row = data + i * row_stride;
      const int64_t first = min_of(columns, VecF::size), second = columns - first;
      block[i] = i < rows && columns == 2 * VecF::size
                     ? load(reinterpret_cast<const float*>(row))
                     : line_up(load_half_bits(row, i < rows ? first : 0),
                               load_half_bits(row + VecF::size, i < rows ? second : 0));
    } else {
      const Scalar *even = data + 2 * i * row_stride, *odd = even + row_stride;
      block[i] = pair_up(load_half_bits(even, 2 * i < rows ? columns : 0),
                         load_half_bits(odd, 2 * i + 1 < rows ? columns : 0));
    }
  }
}

// The same for a matrix of any strides.
template <Block kBlock, class Scalar>
DLKERNELS_INLINE void load_block(Matrix<Scalar> m, int64_t rows, int64_t columns, VecF (&block)[VecF::size]) {
  if (m.column_stride == 1) {
    load_block<kBlock>(m.data, m.row_stride, rows, columns, block);
  } else if (m.row_stride == 1) {
    load_block<transposed(kBlock)>(m.data, m.column_stride, columns, rows, block);
    transpose_square(block);
  } else {
    using Copy = std::conditional_t<kBlock == Block::kRows, float, Scalar>;
    Copy copy[block_rows(kBlock) * block_columns(kBlock)];
    pack_rows(m, rows, columns, copy, block_columns(kBlock));
    load_block<kBlock>(copy, block_columns(kBlock), rows, columns, block);
  }
}

// Rows of bfloat16 as units of one plane: a copy, row by row.
inline void copy_left(Matrix<bfloat16> a, int64_t rows, int64_t depth, LeftUnit<1>* units, int64_t unit_stride) {
  constexpr int64_t rows_ahead = 4;
  for (int64_t i = 0; i < round_up(rows, kTileHeight); ++i) {
    const bfloat16* row = a.data + i * a.row_stride;
    LeftUnit<1>* out = units + i * unit_stride;
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      __builtin_prefetch(row + rows_ahead * a.row_stride + k);
      const int64_t count = i < rows ? min_of(kTileDepth, depth - k) : 0;
      const int64_t first = min_of(count, VecF::size);
      const Line line = count == kTileDepth ? load(reinterpret_cast<const float*>(row + k))
                                            : line_up(load_half_bits(row + k, first),
                                                      load_half_bits(row + k + VecF::size, count - first));
      store(reinterpret_cast<float*>(out[k / kTileDepth].plane[0]), line);
    }
  }
}

template <int Planes, class Scalar>
constexpr bool kStaysOnePlane = Planes == 1 && std::is_same_v<Scalar, bfloat16>;

// Calls a block of the next panel or of the next rows from memory: of three planes few elements that lie side by side
// are read before those of the next row or column, which no prefetcher follows.
template <class Scalar>
DLKERNELS_INLINE void prefetch_block(Matrix<Scalar> m) {
  const int64_t stride = m.column_stride == 1 ? m.row_stride : m.column_stride;
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTileHeight; ++i) __builtin_prefetch(m.data + i * stride);
}

// A tile of a left operand: rows `unit_stride` units apart.
template <int Planes, class Scalar>
DLKERNELS_INLINE void split_left_tile(Matrix<Scalar> a, int64_t rows, int64_t depth, LeftUnit<Planes>* unit,
                                      int64_t unit_stride, VecF& spoilt) {
  auto line_of = [&](int p, int64_t row) { return reinterpret_cast<float*>(unit[row * unit_stride].plane[p]); };
  VecF first[VecF::size];
  if constexpr (kStaysOnePlane<Planes, Scalar>) {
    load_block<Block::kLines>(a, rows, depth, first);
#pragma GCC unroll 16
    for (int64_t row = 0; row < kTileHeight; ++row) store(line_of(0, row), first[row]);
  } else {
    VecF second[VecF::size];
    const int64_t first_depth = min_of(depth, VecF::size);
    load_block<Block::kRows>(a, rows, first_depth, first);
    load_block<Block::kRows>(a.at(0, VecF::size), rows, depth - first_depth, second);
    prefetch_block(a.at(kTileHeight, 0));
    prefetch_block(a.at(kTileHeight, VecF::size));
#pragma GCC unroll 16
    for (int64_t row = 0; row < kTileHeight; ++row) {
      split_two<Planes, false>(first[row], second[row], spoilt,
                               [&](int p, Line line) { store(line_of(p, row), line); });
    }
  }
}

// A tile of a right operand.
template <int Planes, class Scalar>
DLKERNELS_INLINE void split_right_tile(Matrix<Scalar> b, int64_t depth, int64_t columns, RightUnit<Planes>* unit,
                                       int64_t tile, VecF& spoilt) {
  auto line_of = [&](int p, int64_t pair) { return reinterpret_cast<float*>(unit->plane[p][tile][pair]); };
  VecF block[VecF::size];
  if constexpr (kStaysOnePlane<Planes, Scalar>) {
    load_block<Block::kPairs>(b, depth, columns, block);
#pragma GCC unroll 16
    for (int64_t pair = 0; pair < kTileHeight; ++pair) store(line_of(0, pair), block[pair]);
  } else {
#pragma GCC unroll 2
    for (int64_t k = 0; k < kTileDepth; k += VecF::size) {
      load_block<Block::kRows>(b.at(k, 0), max_of(0, min_of(depth - k, VecF::size)), columns, block);
      prefetch_block(b.at(k, kSplitColumns));
#pragma GCC unroll 8
      for (int64_t row = 0; row < VecF::size; row += 2) {
        split_two<Planes, true>(block[row], block[row + 1], spoilt,
                                [&](int p, Line line) { store(line_of(p, (k + row) / 2), line); });
      }
    }
  }
}

}  // namespace detail

// Rows of a left operand, a.data[i][k], as units: units[i * unit_stride + k / 32]. Whole tiles are written, `rows`
// rounded up. Returns whether all could be split.
template <int Planes, class Scalar>
inline bool split_left(Matrix<Scalar> a, int64_t rows, int64_t depth, LeftUnit<Planes>* units, int64_t unit_stride) {
  if constexpr (detail::kStaysOnePlane<Planes, Scalar>) {
    if (a.column_stride == 1) {
      detail::copy_left(a, rows, depth, units, unit_stride);
      return true;
    }
  }
  VecF spoilt = VecF::zero();
  for (int64_t i = 0; i < rows; i += kTileHeight) {
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      const int64_t tile_rows = min_of(kTileHeight, rows - i), tile_depth = min_of(kTileDepth, depth - k);
      LeftUnit<Planes>* unit = units + i * unit_stride + k / kTileDepth;
      const bool is_whole = tile_rows == kTileHeight && tile_depth == kTileDepth;
      is_whole ? detail::split_left_tile(a.at(i, k), kTileHeight, kTileDepth, unit, unit_stride, spoilt)
               : detail::split_left_tile(a.at(i, k), tile_rows, tile_depth, unit, unit_stride, spoilt);
    }
  }
  return reduce_add(spoilt) == 0.0f;
}

// A panel of a right operand, b.data[k][j] for up to 32 columns, as units along the depth; and one of their two tiles,
// of up to 16 columns.
template <int Planes, class Scalar>
inline bool split_right_tiles(Matrix<Scalar> b, int64_t depth, int64_t columns, RightUnit<Planes>* units,
                              int64_t tile) {
  VecF spoilt = VecF::zero();
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    RightUnit<Planes>* unit = units + k / kTileDepth;
    const bool is_whole = depth - k >= kTileDepth && columns == kTileHeight;
    is_whole ? detail::split_right_tile(b.at(k, 0), kTileDepth, kTileHeight, unit, tile, spoilt)
             : detail::split_right_tile(b.at(k, 0), min_of(kTileDepth, depth - k), columns, unit, tile, spoilt);
  }
  return reduce_add(spoilt) == 0.0f;
}
template <int Planes, class Scalar>
inline bool split_right(Matrix<Scalar> b, int64_t depth, int64_t columns, RightUnit<Planes>* units) {
  bool split = true;
  for (int64_t tile = 0; tile < 2; ++tile) {
    const int64_t j = tile * kTileHeight;
    split &= split_right_tiles(b.at(0, j), depth, max_of(0, min_of(kTileHeight, columns - j)), units, tile);
  }
  return split;
}

// Elements [k, k + 16) of a left row, k a multiple of 16. `spoilt` gathers a NaN where one cannot be split.
template <int Planes>
DLKERNELS_INLINE void split_vector(VecF values, LeftUnit<Planes>* row, int64_t k, VecF& spoilt) {
#pragma GCC unroll 3
  for (int p = 0; p < Planes; ++p) {
    const HalfBits half = detail::round_half(values);
    store_half_bits(row[k / kTileDepth].plane[p] + k % kTileDepth, half);
    const VecF rounded = widen(bfloat16{}, half);
    if (p == 0) spoilt = fma(rounded, VecF::zero(), spoilt);
    values = values - rounded;
  }
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

// sum = (its old value +) the product, in one run.
template <int Planes, int RowTiles, int ColumnTiles>
void multiply_tiles(Tiles& tiles, LeftRows<Planes> left, const RightUnit<Planes>* right, const UnitSegment* segments,
                    int64_t segment_count, float* sum, int64_t row_stride, bool accumulate) {
  const int64_t row_bytes = row_stride * static_cast<int64_t>(sizeof(float));
  auto at = [=](int64_t row, int64_t column) { return sum + row * kTileHeight * row_stride + column * kTileHeight; };
  if (accumulate) {
    tiles.load<0>(at(0, 0), row_bytes);
    if constexpr (ColumnTiles > 1) tiles.load<1>(at(0, 1), row_bytes);
    if constexpr (RowTiles > 1) tiles.load<2>(at(1, 0), row_bytes);
    if constexpr (RowTiles > 1 && ColumnTiles > 1) tiles.load<3>(at(1, 1), row_bytes);
  } else {
    tiles.clear<0>();
    if constexpr (ColumnTiles > 1) tiles.clear<1>();
    if constexpr (RowTiles > 1) tiles.clear<2>();
    if constexpr (RowTiles > 1 && ColumnTiles > 1) tiles.clear<3>();
  }
  // The small terms of the whole run first: they hardly round, and the large ones then round as often as in float32.
  constexpr int last = Terms<Planes>::count - 1;
  if constexpr (last > 0)
    add_segments<Planes, RowTiles, ColumnTiles, 0, last>(tiles, left, right, segments, segment_count);
  add_segments<Planes, RowTiles, ColumnTiles, last, last + 1>(tiles, left, right, segments, segment_count);
  tiles.store<0>(at(0, 0), row_bytes);
  if constexpr (ColumnTiles > 1) tiles.store<1>(at(0, 1), row_bytes);
  if constexpr (RowTiles > 1) tiles.store<2>(at(1, 0), row_bytes);
  if constexpr (RowTiles > 1 && ColumnTiles > 1) tiles.store<3>(at(1, 1), row_bytes);
}

}  // namespace detail

// c[i][j] (+)= sum over the segments of left row i times right column j, one run of sums, for `rows` <= 32 and
// `columns` <= 32. Whole tiles of left rows are read: there must be 16 or 32 of them in memory.
template <int Planes>
inline void multiply_split(Tiles& tiles, int64_t rows, int64_t columns, LeftRows<Planes> left,
                           const RightUnit<Planes>* right, const UnitSegment* segments, int64_t segment_count, float* c,
                           int64_t c_row_stride, bool accumulate) {
  const bool is_whole = rows % kTileHeight == 0 && columns % kTileHeight == 0;
  // Of three planes a run is summed apart: its small terms are not to meet a large sum.
  const bool in_place = is_whole && (Planes < 3 || !accumulate);
  alignas(64) float sums[kSplitRows * kSplitColumns];
  float* to = in_place ? c : sums;
  const int64_t stride = in_place ? c_row_stride : kSplitColumns;
  const bool adds = in_place && accumulate;
  if (rows > kTileHeight) {
    columns > kTileHeight
        ? detail::multiply_tiles<Planes, 2, 2>(tiles, left, right, segments, segment_count, to, stride, adds)
        : detail::multiply_tiles<Planes, 2, 1>(tiles, left, right, segments, segment_count, to, stride, adds);
  } else {
    columns > kTileHeight
        ? detail::multiply_tiles<Planes, 1, 2>(tiles, left, right, segments, segment_count, to, stride, adds)
        : detail::multiply_tiles<Planes, 1, 1>(tiles, left, right, segments, segment_count, to, stride, adds);
  }
  if (in_place) return;
  for (int64_t i = 0; i < rows; ++i) {
    float* out = c + i * c_row_stride;
    const float* sum = sums + i * kSplitColumns;
    accumulate ? add_to(out, sum, columns) : widen_row(sum, columns, out);
  }
}

// c[i][j] (+)= left row i times right column j over `units` of the depth, in runs of about equal length, for right
// panels of 32 columns panel_stride units apart. Columns outermost: a panel stays in the first-level cache.
template <int Planes>
inline void multiply_units(Tiles& tiles, int64_t rows, int64_t columns, int64_t units, LeftRows<Planes> left,
                           const RightUnit<Planes>* right, int64_t panel_stride, float* c, int64_t c_row_stride,
                           bool accumulate) {
  const int64_t runs = ceil_div(units, kRunUnits<Planes>);
  for (int64_t j = 0; j < columns; j += kSplitColumns) {
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t unit = units * run / runs;
      const UnitSegment segment = {units * (run + 1) / runs - unit, unit, unit};
      for (int64_t i = 0; i < rows; i += kSplitRows) {
        multiply_split<Planes>(tiles, min_of(kSplitRows, rows - i), min_of(kSplitColumns, columns - j),
                               {left.first + i * left.unit_stride, left.unit_stride},
                               right + j / kSplitColumns * panel_stride, &segment, 1, c + i * c_row_stride + j,
                               c_row_stride, accumulate || run > 0);
      }
    }
  }
}

}  // namespace dlkernels::DLKERNELS_ISA
