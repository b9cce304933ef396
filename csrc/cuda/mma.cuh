// Products on the matrix units: sixteen rows of the left operand with eight of the right one, one unit deep. A word is
// two numbers of a half type, or one of float32 or float64.
//
// Sums of half types stay on the unit. float32 is multiplied at its full accuracy, as on the processor's matrix units
// (cpu/split.h): three numbers of bfloat16 hold the 24 bits of one, x = x1 + x2 + x3, and six of the nine products are
// kept,
//   a b  ~  a1 b1  +  [ a2 b1 + a1 b2 + a2 b2 + a3 b1 + a1 b3 ]
// in the time of three products of tf32, whose 22 bits would lose two. The unit rounds towards zero, so that long sums
// in it drift (Ootomo and Yokota 2022): every unit's sums leave it and are added in float32. Where the first term is
// infinite or NaN the bracket is left out, which would be NaN.
#pragma once

#include "cuda/numbers.cuh"

namespace dlkernels::DLKERNELS_ISA {

template <class Scalar>
using Word = std::conditional_t<sizeof(Scalar) == 2, uint32_t, Scalar>;

inline constexpr int kUnitRows = 16;    // of the left operand
inline constexpr int kUnitColumns = 8;  // rows of the right operand
inline constexpr int kGroupWords = 8;   // of a row, that four lanes hold together
template <class Scalar>
inline constexpr int kUnitGroups = std::is_same_v<Scalar, float> ? 2 : 1;
template <class Scalar>
inline constexpr int kGroupDepth = kGroupWords * int{sizeof(Word<Scalar>) / sizeof(Scalar)};
template <class Scalar>
inline constexpr int kUnitDepth = kUnitGroups<Scalar> * kGroupDepth<Scalar>;

// Lane l holds words l % 4 and l % 4 + 4 of a group, of its rows: l / 4 and, of the left operand, l / 4 + 8.
template <class Scalar>
struct LeftFragment {  // by groups: (l / 4, l % 4), (l / 4 + 8, l % 4), (l / 4, l % 4 + 4), (l / 4 + 8, l % 4 + 4)
  Word<Scalar> words[4 * kUnitGroups<Scalar>];
};
template <class Scalar>
struct RightFragment {
  Word<Scalar> words[2 * kUnitGroups<Scalar>];
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
  constexpr int per_word = kGroupDepth<Scalar> / kGroupWords;
  ::simt::multiply_add<per_word>(
      c, left, right,
      [](W word, int i) {
        if constexpr (per_word == 2) {
          return widen(Scalar{static_cast<uint16_t>(i == 0 ? word & 0xffffu : word >> 16)});
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
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  }
}

// float64 has a unit of 8 x 8 x 4: rows and depth in two halves.
template <class Scalar>
__device__ __forceinline__ void multiply_add_unit(double (&c)[4], const double (&left)[4], const double (&right)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+d"(c[i % 2 * 2]), "+d"(c[i % 2 * 2 + 1])
        : "d"(left[i]), "d"(right[i / 2]));
  }
}

#endif

// ---- operands as the unit wants them -------------------------------------------------------------------------------

// The upper half of a number's bits, to the nearest; what would round to infinity is cut off instead.
__device__ __forceinline__ uint32_t round_to_upper_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), rounded = bits + 0x8000u;
  return ((rounded & 0x7f800000u) == 0x7f800000u ? bits : rounded) & 0xffff0000u;
}

// Three words of bfloat16 that add up to two numbers.
__device__ __forceinline__ void split_pair(float first, float second, uint32_t (&parts)[3]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const uint32_t low = round_to_upper_half(first), high = round_to_upper_half(second);
    parts[i] = low >> 16 | high;
    first -= bits_as<float>(low), second -= bits_as<float>(high);
  }
}

// The three parts of a fragment of float32, as fragments of bfloat16: its two groups become the one of a word's pairs.
template <class Fragment>
struct Split {
  Fragment parts[3];
};

template <class Scalar>
__device__ __forceinline__ const LeftFragment<Scalar>& prepare(const LeftFragment<Scalar>& fragment) {
  return fragment;
}
template <class Scalar>
__device__ __forceinline__ const RightFragment<Scalar>& prepare(const RightFragment<Scalar>& fragment) {
  return fragment;
}

__device__ __forceinline__ Split<LeftFragment<bfloat16>> prepare(const LeftFragment<float>& fragment) {
  Split<LeftFragment<bfloat16>> split;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int first = i / 2 * 4 + i % 2;
    uint32_t words[3];
    split_pair(fragment.words[first], fragment.words[first + 2], words);
#pragma unroll
    for (int part = 0; part < 3; ++part) split.parts[part].words[i] = words[part];
  }
  return split;
}
__device__ __forceinline__ Split<RightFragment<bfloat16>> prepare(const RightFragment<float>& fragment) {
  Split<RightFragment<bfloat16>> split;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t words[3];
    split_pair(fragment.words[2 * i], fragment.words[2 * i + 1], words);
#pragma unroll
    for (int part = 0; part < 3; ++part) split.parts[part].words[i] = words[part];
  }
  return split;
}

template <class Fragment>
using Prepared = std::remove_cvref_t<decltype(prepare(std::declval<const Fragment&>()))>;

// c += left right^T
template <class Scalar, class T>
__device__ __forceinline__ void multiply_add(T (&c)[4], const LeftFragment<Scalar>& left,
                                             const RightFragment<Scalar>& right) {
  multiply_add_unit<Scalar>(c, left.words, right.words);
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const Split<LeftFragment<bfloat16>>& left,
                                             const Split<RightFragment<bfloat16>>& right) {
  constexpr int kSmall[5][2] = {{2, 0}, {0, 2}, {1, 1}, {1, 0}, {0, 1}};
  float first[4] = {}, corrections[4] = {};
#pragma unroll
  for (const auto& [i, j] : kSmall) multiply_add(corrections, left.parts[i], right.parts[j]);
  multiply_add(first, left.parts[0], right.parts[0]);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += fabsf(first[i]) < INFINITY ? first[i] + corrections[i] : first[i];
}

}  // namespace dlkernels::DLKERNELS_ISA
