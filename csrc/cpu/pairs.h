// Products of bfloat16 with instructions that multiply two neighbours of the depth at once and add both products to a
// float32 (VDPBF16PS): twice the rate of float32. A left row is used as it lies, two elements to a 32-bit lane. A right
// operand is packed as pairs: elements (2p, j) and (2p + 1, j) side by side, the depth padded with a zero.
#pragma once

#include "pack.h"

namespace dlkernels::DLKERNELS_ISA {

#if defined(DLKERNELS_AVX512_BF16)
inline constexpr bool kHasPairs = true;
#else
inline constexpr bool kHasPairs = false;
#endif

// The type that products of Scalar are taken in: bfloat16 itself where there are pairs, else that of the sums.
template <class Scalar>
using factor_t = std::conditional_t<kHasPairs && std::is_same_v<Scalar, bfloat16>, bfloat16, accumulate_t<Scalar>>;

// A multiply-add of the products: the elements of the depth that it takes in a lane, the registers that hold them. The
// micro-kernel spreads a left element over the lanes; dot products load both sides along the depth.
template <class Factor>
struct Step {
  static constexpr int64_t depth = 1;
  using Register = Vec<Factor>;
  template <class Scalar>
  static DLKERNELS_INLINE Register load_along(const Scalar* p, int64_t count) {
    return load_lanes(p, count);
  }
  static DLKERNELS_INLINE Register load_right(const Factor* p) { return load(p); }
  static DLKERNELS_INLINE Register load_right(const Factor* p, int64_t lanes) { return load(p, lanes); }
  static DLKERNELS_INLINE Register spread_left(const Factor* p) { return Vec<Factor>(*p); }
  static DLKERNELS_INLINE Vec<Factor> add(Register a, Register b, Vec<Factor> sum) { return fma(a, b, sum); }
};
#if defined(DLKERNELS_AVX512_BF16)
template <>
struct Step<bfloat16> {
  static constexpr int64_t depth = 2;
  using Register = __m512bh;
  static DLKERNELS_INLINE Register load_along(const bfloat16* p, int64_t count) {
    if (count == 2 * VecF::size) return load_right(p);
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, p);
  }
  static DLKERNELS_INLINE Register load_right(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static DLKERNELS_INLINE Register load_right(const bfloat16* p, int64_t) { return load_right(p); }  // panels are whole
  static DLKERNELS_INLINE Register spread_left(const bfloat16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  // The last element of an odd depth, beside a zero.
  static DLKERNELS_INLINE Register spread_last(const bfloat16* p) { return (__m512bh)_mm512_set1_epi32(p->bits); }
  static DLKERNELS_INLINE VecF add(Register a, Register b, VecF sum) { return VecF(_mm512_dpbf16_ps(sum.raw, a, b)); }
};
#endif

// destination[i][k] = source(i, k) as bfloat16: left rows, contiguous along the depth.
inline void pack_rows(Matrix<bfloat16> source, int64_t rows, int64_t depth, bfloat16* destination,
                      int64_t destination_row_stride) {
  if (source.row_stride == 1 && source.column_stride != 1) {
    return transpose(source.data, source.column_stride, depth, rows, destination, destination_row_stride);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < depth; ++k) destination[i * destination_row_stride + k] = *source.at(i, k).data;
  }
}

// Row p of the pairs begins at destination + p * row_stride. Both rows of a pair as they lie:
inline void interleave_rows(const bfloat16* even, const bfloat16* odd, int64_t columns, bfloat16* destination) {
  using Bits = Lanes<float>::bits;
  for (int64_t j = 0; j < columns; j += VecF::size) {
    const int64_t lanes = min_of(VecF::size, columns - j);
    const bool whole = lanes == VecF::size;
    const Bits low = zero_extend(whole ? load_half_bits(even + j) : load_half_bits(even + j, lanes));
    Bits high = {};
    if (odd != nullptr) {
      high = zero_extend(whole ? load_half_bits(odd + j) : load_half_bits(odd + j, lanes));
    }
    store_lanes(reinterpret_cast<float*>(destination + 2 * j), from_bits<float>(low | high << 16), lanes);
  }
}

// `columns` columns of a right operand as pairs, depth / 2 rows of them, rounded up.
inline void pack_pairs(Matrix<bfloat16> b, int64_t depth, int64_t columns, bfloat16* destination, int64_t row_stride) {
  const int64_t even_depth = depth / 2 * 2;
  if (b.column_stride == 1) {
    for (int64_t k = 0; k < depth; k += 2) {
      interleave_rows(b.at(k, 0).data, k + 1 < depth ? b.at(k + 1, 0).data : nullptr, columns,
                      destination + k / 2 * row_stride);
    }
    return;
  }
  if (b.row_stride == 1 && b.column_stride % 2 == 0) {  // pairs lie side by side: they move as one
    transpose(reinterpret_cast<const float*>(b.data), b.column_stride / 2, columns, even_depth / 2,
              reinterpret_cast<float*>(destination), row_stride / 2);
  } else {
    for (int64_t k = 0; k < even_depth; ++k) {
      for (int64_t j = 0; j < columns; ++j) destination[k / 2 * row_stride + 2 * j + k % 2] = *b.at(k, j).data;
    }
  }
  for (int64_t j = 0; j < columns && even_depth < depth; ++j) {
    bfloat16* last = destination + even_depth / 2 * row_stride + 2 * j;
    last[0] = *b.at(even_depth, j).data;
    last[1] = {};
  }
}

// Columns of a right operand as one panel of the micro-kernel, `width` columns wide; element k = 0 at `panel`.
template <class Scalar>
inline void pack_panel(Matrix<Scalar> b, int64_t depth, int64_t columns, accumulate_t<Scalar>* panel, int64_t width) {
  pack_rows(b, depth, columns, panel, width);
}
inline void pack_panel(Matrix<bfloat16> b, int64_t depth, int64_t columns, bfloat16* panel, int64_t width) {
  pack_pairs(b, depth, columns, panel, 2 * width);
}

}  // namespace dlkernels::DLKERNELS_ISA
