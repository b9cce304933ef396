// Products with a right operand that is read as it lies, by rows along the depth: for so few left rows that packing it
// would cost more than the product. A tile's sums are as many as a vector has lanes and are added up together.
#pragma once

#include "pack.h"
#include "pairs.h"
#include "simd.h"

namespace dlkernels::DLKERNELS_ISA {

// Left rows of a tile.
template <class T>
constexpr int kDotRows = Vec<T>::size >= 16  ? 4
                         : Vec<T>::size >= 4 ? 2
                                             : 1;

// sums[r * columns + c] += x[r] . w[c] from depth k on, for Rows rows and size / Rows columns. Indices that are
// constants from the start, not from an unrolled loop, keep the sums in registers.
template <int Rows, class Factor, class X, class W, size_t... Sum>
DLKERNELS_INLINE void accumulate_dots(int64_t k, int64_t count, const X* const* x, const W* const* w,
                                      Vec<accumulate_t<Factor>>* sums, std::index_sequence<Sum...>) {
  using S = Step<Factor>;
  constexpr size_t columns = sizeof...(Sum) / Rows;
  ((sums[Sum] =
        S::add(S::load_along(x[Sum / columns] + k, count), S::load_along(w[Sum % columns] + k, count), sums[Sum])),
   ...);
}

// Lane r * columns + c: x[r] . w[c].
template <int Rows, class Factor, class X, class W>
DLKERNELS_INLINE Vec<accumulate_t<Factor>> dot_products(int64_t depth, const X* const* x, const W* const* w) {
  using Sum = Vec<accumulate_t<Factor>>;
  constexpr int64_t whole = Sum::size * Step<Factor>::depth;
  constexpr auto indices = std::make_index_sequence<Sum::size>();
  Sum sums[Sum::size];
  for (Sum& sum : sums) sum = Sum::zero();
  int64_t k = 0;
  for (; k + whole <= depth; k += whole) accumulate_dots<Rows, Factor>(k, whole, x, w, sums, indices);
  if (k < depth) accumulate_dots<Rows, Factor>(k, depth - k, x, w, sums, indices);
  return reduce_add_each(sums);
}

// out[i][c] = row(i) . w[c] for `rows` rows and `columns` <= size rows of w, which come from memory once and stay in
// the first-level cache for all rows.
template <class Factor, class W, class Row>
inline void multiply_by_dots(int64_t rows, int64_t columns, int64_t depth, Row&& row, const W* w, int64_t w_row_stride,
                             accumulate_t<Factor>* out, int64_t out_row_stride) {
  using T = accumulate_t<Factor>;
  constexpr int64_t size = Vec<T>::size;
  constexpr int kRows = kDotRows<T>;
  constexpr int64_t kColumns = size / kRows;
  const W* w_rows[size];
  for (int64_t c = 0; c < size; ++c) w_rows[c] = w + min_of(c, columns - 1) * w_row_stride;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    decltype(row(i)) x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = row(i + r);
    for (int64_t c = 0; c < columns; c += kColumns) {
      alignas(64) T tile[size];
      store(tile, dot_products<kRows, Factor>(depth, x, w_rows + c));
      for (int r = 0; r < kRows; ++r) {
        for (int64_t t = 0; t < min_of(kColumns, columns - c); ++t) {
          out[(i + r) * out_row_stride + c + t] = tile[r * kColumns + t];
        }
      }
    }
  }
  for (; i < rows; ++i) {
    const auto x = row(i);
    store_lanes(out + i * out_row_stride, dot_products<1, Factor>(depth, &x, w_rows), columns);
  }
}

}  // namespace dlkernels::DLKERNELS_ISA
