// Products on the matrix units: sixteen rows of the left operand with eight of the right one, eight words deep. A word
// is two numbers of a half type, or one of float32 or float64.
//
// Sums of half types stay on the unit. float32 is multiplied at its full accuracy: each number is split into two of
// tf32 (eleven bits), and three of the four products are kept,
//   a b  ~  big(a) big(b)  +  [ small(a) big(b) + big(a) small(b) ],       small(x) = tf32(x - big(x))
// The unit rounds towards zero, so that long sums in it drift (Ootomo and Yokota 2022): every eight products leave it
// and are added in float32. Where the first term is infinite or NaN the bracket is left out, which would be NaN.
#pragma once

#include "cuda/numbers.cuh"

namespace dlkernels::DLKERNELS_ISA {

template <class Scalar>
using Word = std::conditional_t<sizeof(Scalar) == 2, uint32_t, Scalar>;

inline constexpr int kUnitWords = 8;    // depth of a unit product
inline constexpr int kUnitRows = 16;    // of the left operand
inline constexpr int kUnitColumns = 8;  // rows of the right operand
template <class Scalar>
inline constexpr int kUnitDepth = kUnitWords * int{sizeof(Word<Scalar>) / sizeof(Scalar)};

// Lane l holds words l % 4 and l % 4 + 4 of its rows: l / 4 and, of the left operand, l / 4 + 8.
template <class Scalar>
struct LeftFragment {
  Word<Scalar> words[4];  // (l / 4, l % 4), (l / 4 + 8, l % 4), (l / 4, l % 4 + 4), (l / 4 + 8, l % 4 + 4)
};
template <class Scalar>
struct RightFragment {
  Word<Scalar> words[2];
};

// Lane l holds columns 2 (l % 4) and the next of rows l / 4 and l / 4 + 8 of a product.
struct Lane {
  int row, column;
  __device__ Lane()
      : row(static_cast<int>(threadIdx.x) % kWarpSize / 4), column(static_cast<int>(threadIdx.x) % 4 * 2) {}
};

// ---- the instructions ----------------------------------------------------------------------------------------------

#if defined(DLKERNELS_SIMT)

template <class Scalar, class T, class W>
inline void multiply_add_unit(T (&c)[4], const W (&left)[4], const W (&right)[2], Where where = Where::current()) {
  constexpr int per_word = kUnitDepth<Scalar> / kUnitWords;
  ::simt::multiply_add<per_word>(
      c, left, right,
      [](W word, int i) {
        if constexpr (per_word == 2) {
          return widen(Scalar{static_cast<uint16_t>(i == 0 ? word & 0xffffu : word >> 16)});
        } else if constexpr (sizeof(Scalar) == 4) {
          return bits_as<float>(bits_as<uint32_t>(word) & 0xffffe000u);  // as much as the unit looks at
        } else {
          return word;
        }
      },
      where);
}

#else

template <class Scalar>
__device__ __forceinline__ void multiply_add_unit(float (&c)[4], const uint32_t (&left)[4],
                                                  const uint32_t (&right)[2]) {
  if constexpr (std::is_same_v<Scalar, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  }
}

template <class Scalar>
__device__ __forceinline__ void multiply_add_unit(float (&c)[4], const float (&left)[4], const float (&right)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(bits_as<uint32_t>(left[0])), "r"(bits_as<uint32_t>(left[1])), "r"(bits_as<uint32_t>(left[2])),
        "r"(bits_as<uint32_t>(left[3])), "r"(bits_as<uint32_t>(right[0])), "r"(bits_as<uint32_t>(right[1])));
}

// float64 has a unit of 8 x 8 x 4: rows and depth in two halves.
template <class Scalar>
__device__ __forceinline__ void multiply_add_unit(double (&c)[4], const double (&left)[4], const double (&right)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+d"(c[i % 2 * 2]), "+d"(c[i % 2 * 2 + 1])
                 : "d"(left[i]), "d"(right[i / 2]));
  }
}

#endif

// ---- operands as the unit wants them -------------------------------------------------------------------------------

// To the nearest of tf32, ties away from zero; what would round to infinity is cut off instead.
__device__ __forceinline__ float round_to_tf32(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), rounded = (bits + 0x1000u) & 0xffffe000u;
  return bits_as<float>((rounded & 0x7f800000u) == 0x7f800000u ? bits & 0xffffe000u : rounded);
}

template <class Fragment>
struct Split {
  Fragment big, small;
};

template <class Scalar>
__device__ __forceinline__ const LeftFragment<Scalar>& prepare(const LeftFragment<Scalar>& fragment) {
  return fragment;
}
template <class Scalar>
__device__ __forceinline__ const RightFragment<Scalar>& prepare(const RightFragment<Scalar>& fragment) {
  return fragment;
}

template <class Fragment, int kWords>
__device__ __forceinline__ Split<Fragment> split_words(const float (&words)[kWords]) {
  Split<Fragment> parts;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    parts.big.words[i] = round_to_tf32(words[i]);
    parts.small.words[i] = round_to_tf32(words[i] - parts.big.words[i]);
  }
  return parts;
}
__device__ __forceinline__ Split<LeftFragment<float>> prepare(const LeftFragment<float>& fragment) {
  return split_words<LeftFragment<float>>(fragment.words);
}
__device__ __forceinline__ Split<RightFragment<float>> prepare(const RightFragment<float>& fragment) {
  return split_words<RightFragment<float>>(fragment.words);
}

template <class Fragment>
using Prepared = std::remove_cvref_t<decltype(prepare(std::declval<const Fragment&>()))>;

// c += left right^T
template <class Scalar, class T>
__device__ __forceinline__ void multiply_add(T (&c)[4], const LeftFragment<Scalar>& left,
                                             const RightFragment<Scalar>& right) {
  multiply_add_unit<Scalar>(c, left.words, right.words);
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const Split<LeftFragment<float>>& left,
                                             const Split<RightFragment<float>>& right) {
  float first[4] = {}, corrections[4] = {};
  multiply_add_unit<float>(corrections, left.small.words, right.big.words);
  multiply_add_unit<float>(corrections, left.big.words, right.small.words);
  multiply_add_unit<float>(first, left.big.words, right.big.words);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += fabsf(first[i]) < INFINITY ? first[i] + corrections[i] : first[i];
}

}  // namespace dlkernels::DLKERNELS_ISA
