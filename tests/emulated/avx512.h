// The AVX-512 instructions that csrc/cpu names, on a processor with AVX2: each has the name and the results of the
// compiler's intrinsic, which it hides inside the kernels' namespace. With it the kernels of the wide instruction sets
// are tested line for line on any x86-64 machine; speed is not its subject.
//
// Results are those of Intel's Software Developer's Manual, volume 2; bfloat16 instructions take and give subnormal
// numbers as zeros and add their two products one after the other, the upper one first.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dlkernels::DLKERNELS_ISA {

#define DLKERNELS_EMULATED inline __attribute__((always_inline))

namespace emulated {

typedef int32_t Int32x16 __attribute__((vector_size(64)));
typedef uint32_t Bits32x16 __attribute__((vector_size(64)));
typedef uint64_t Bits64x8 __attribute__((vector_size(64)));
typedef uint16_t Bits16x32 __attribute__((vector_size(64)));
typedef uint16_t Bits16x16 __attribute__((vector_size(32)));

template <class To, class From>
DLKERNELS_EMULATED To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// A 512-bit register as two of 256.
template <class Half>
struct Halves {
  Half low, high;
};
DLKERNELS_EMULATED Halves<__m256> halves(__m512 a) {
  return bit_cast<Halves<__m256>>(a);
}
DLKERNELS_EMULATED Halves<__m256d> halves(__m512d a) {
  return bit_cast<Halves<__m256d>>(a);
}
DLKERNELS_EMULATED __m512 join(__m256 low, __m256 high) {
  return bit_cast<__m512>(Halves<__m256>{low, high});
}
DLKERNELS_EMULATED __m512d join(__m256d low, __m256d high) {
  return bit_cast<__m512d>(Halves<__m256d>{low, high});
}

// No comparison of whole registers: gcc 12 takes those apart lane by lane. The sign of a difference says the same.
// All ones where a lane's sign bit is set.
DLKERNELS_EMULATED Bits32x16 spread_sign(Bits32x16 a) {
  return (Bits32x16)((Int32x16)a >> 31);
}
// All ones in the lanes whose bit of the mask is set.
DLKERNELS_EMULATED Bits32x16 lanes_of(__mmask16 mask) {
  const Bits32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return 0u - (((Bits32x16{} + mask) >> lane) & 1u);
}
DLKERNELS_EMULATED Bits64x8 lanes_of(__mmask8 mask) {
  const Bits64x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return 0ull - (((Bits64x8{} + mask) >> lane) & 1ull);
}

// What has a branch for each lane is a function of its own, else every use would grow by sixteen of them.
#define DLKERNELS_EMULATED_CALL inline __attribute__((noinline))

// Copies the lanes whose bit is set; the memory of the others is not touched.
template <class Lane>
DLKERNELS_EMULATED_CALL void copy_lanes(void* to, const void* from, uint32_t mask) {
  for (; mask != 0; mask &= mask - 1) {
    const int i = __builtin_ctz(mask);
    __builtin_memcpy(static_cast<Lane*>(to) + i, static_cast<const Lane*>(from) + i, sizeof(Lane));
  }
}
// Lanes whose bit is not set load as zero.
template <class Lane, class Register>
DLKERNELS_EMULATED Register load_lanes(uint32_t mask, const void* memory) {
  Register a = {};
  copy_lanes<Lane>(&a, memory, mask);
  return a;
}

// lanes[i] = lanes[i] * 2^floor(powers[i])
DLKERNELS_EMULATED_CALL void scale_lanes(float* lanes, const float* powers) {
  for (int i = 0; i < 16; ++i) {
    if (powers[i] != powers[i]) {
      lanes[i] = powers[i];
      continue;
    }
    // Beyond 600 every finite number is infinite or zero; a double holds what lies between, so it is rounded once.
    const float bounded = powers[i] > 600.0f ? 600.0f : powers[i] < -600.0f ? -600.0f : powers[i];
    int64_t whole = static_cast<int64_t>(bounded);
    if (static_cast<float>(whole) > bounded) --whole;
    lanes[i] = static_cast<float>(lanes[i] * __builtin_bit_cast(double, (whole + 1023) << 52));
  }
}

// Adds, or takes the larger, over ever smaller halves.
template <class Lane, int count, class Register, class Combine>
DLKERNELS_EMULATED Lane reduce(Register a, Combine combine) {
  Lane lanes[count];
  __builtin_memcpy(lanes, &a, sizeof lanes);
  for (int half = count / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

// Subnormal numbers as zeros of their sign.
DLKERNELS_EMULATED Bits32x16 flush(Bits32x16 bits) {
  return bits & (spread_sign(0u - (bits & 0x7f800000u)) | 0x80000000u);
}
DLKERNELS_EMULATED Bits16x16 round_to_bfloat16(__m512 a) {
  const Bits32x16 bits = flush(bit_cast<Bits32x16>(a));
  const Bits32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits32x16 quiet_nan = (bits >> 16) | 0x40u;
  const Bits32x16 nan = spread_sign(0x7f800000u - (bits & 0x7fffffffu));
  return __builtin_convertvector((rounded & ~nan) | (quiet_nan & nan), Bits16x16);
}

}  // namespace emulated

// ---- float and double ------------------------------------------------------------------------------------------

// Contracted into one rounding, as kernels are compiled.
DLKERNELS_EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return a * b + c;
}
DLKERNELS_EMULATED __m512d _mm512_fmadd_pd(__m512d a, __m512d b, __m512d c) {
  return a * b + c;
}
// Of two that are unordered the second, as the instructions have it.
DLKERNELS_EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) {
  const auto x = emulated::halves(a), y = emulated::halves(b);
  return emulated::join(_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high));
}
DLKERNELS_EMULATED __m512d _mm512_max_pd(__m512d a, __m512d b) {
  const auto x = emulated::halves(a), y = emulated::halves(b);
  return emulated::join(_mm256_max_pd(x.low, y.low), _mm256_max_pd(x.high, y.high));
}
DLKERNELS_EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) {
  const auto x = emulated::halves(a), y = emulated::halves(b);
  return emulated::join(_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high));
}
DLKERNELS_EMULATED __m512d _mm512_min_pd(__m512d a, __m512d b) {
  const auto x = emulated::halves(a), y = emulated::halves(b);
  return emulated::join(_mm256_min_pd(x.low, y.low), _mm256_min_pd(x.high, y.high));
}
DLKERNELS_EMULATED __m512d _mm512_add_pd(__m512d a, __m512d b) {
  return a + b;
}
DLKERNELS_EMULATED __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  emulated::scale_lanes(reinterpret_cast<float*>(&a), reinterpret_cast<const float*>(&b));
  return a;
}
DLKERNELS_EMULATED float _mm512_reduce_add_ps(__m512 a) {
  return emulated::reduce<float, 16>(a, [](float x, float y) { return x + y; });
}
DLKERNELS_EMULATED double _mm512_reduce_add_pd(__m512d a) {
  return emulated::reduce<double, 8>(a, [](double x, double y) { return x + y; });
}
DLKERNELS_EMULATED float _mm512_reduce_max_ps(__m512 a) {
  return emulated::reduce<float, 16>(a, [](float x, float y) { return y > x ? y : x; });
}
DLKERNELS_EMULATED double _mm512_reduce_max_pd(__m512d a) {
  return emulated::reduce<double, 8>(a, [](double x, double y) { return y > x ? y : x; });
}

// ---- masks -------------------------------------------------------------------------------------------------------

DLKERNELS_EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, const int predicate) {
  const auto x = emulated::halves(a), y = emulated::halves(b);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, predicate));
  return static_cast<__mmask16>(low | _mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, predicate)) << 8);
}
DLKERNELS_EMULATED __mmask8 _mm512_cmp_pd_mask(__m512d a, __m512d b, const int predicate) {
  const auto x = emulated::halves(a), y = emulated::halves(b);
  const int low = _mm256_movemask_pd(_mm256_cmp_pd(x.low, y.low, predicate));
  return static_cast<__mmask8>(low | _mm256_movemask_pd(_mm256_cmp_pd(x.high, y.high, predicate)) << 4);
}
// The one class that the kernels ask for: subnormal numbers.
DLKERNELS_EMULATED __mmask16 _mm512_fpclass_ps_mask(__m512 a, const int) {
  const auto bits = (emulated::Bits32x16)a;
  const auto not_zero = 0u - (bits & 0x7fffffffu), no_exponent = ~(0u - (bits & 0x7f800000u));
  const auto x = emulated::halves((__m512)(not_zero & no_exponent));
  return static_cast<__mmask16>(_mm256_movemask_ps(x.low) | _mm256_movemask_ps(x.high) << 8);
}
DLKERNELS_EMULATED __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 no, __m512 yes) {
  const emulated::Bits32x16 chosen = emulated::lanes_of(mask);
  return (__m512)(((emulated::Bits32x16)yes & chosen) | ((emulated::Bits32x16)no & ~chosen));
}
DLKERNELS_EMULATED __m512d _mm512_mask_blend_pd(__mmask8 mask, __m512d no, __m512d yes) {
  const emulated::Bits64x8 chosen = emulated::lanes_of(mask);
  return (__m512d)(((emulated::Bits64x8)yes & chosen) | ((emulated::Bits64x8)no & ~chosen));
}
DLKERNELS_EMULATED __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
  return _mm512_mask_blend_ps(mask, __m512{}, _mm512_scalef_ps(a, b));
}

// ---- memory ------------------------------------------------------------------------------------------------------

DLKERNELS_EMULATED __m512i _mm512_load_si512(const void* memory) {
  return *static_cast<const __m512i*>(memory);
}
DLKERNELS_EMULATED __m512i _mm512_loadu_si512(const void* memory) {
  return *static_cast<const __m512i_u*>(memory);
}
DLKERNELS_EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* memory) {
  return emulated::load_lanes<float, __m512>(mask, memory);
}
DLKERNELS_EMULATED __m512d _mm512_maskz_loadu_pd(__mmask8 mask, const void* memory) {
  return emulated::load_lanes<double, __m512d>(mask, memory);
}
DLKERNELS_EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* memory) {
  return emulated::load_lanes<uint16_t, __m512i>(mask, memory);
}
DLKERNELS_EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* memory) {
  return emulated::load_lanes<uint16_t, __m256i>(mask, memory);
}
DLKERNELS_EMULATED void _mm512_mask_storeu_ps(void* memory, __mmask16 mask, __m512 a) {
  emulated::copy_lanes<float>(memory, &a, mask);
}
DLKERNELS_EMULATED void _mm512_mask_storeu_pd(void* memory, __mmask8 mask, __m512d a) {
  emulated::copy_lanes<double>(memory, &a, mask);
}
DLKERNELS_EMULATED void _mm256_mask_storeu_epi16(void* memory, __mmask16 mask, __m256i a) {
  emulated::copy_lanes<uint16_t>(memory, &a, mask);
}
DLKERNELS_EMULATED void _mm512_stream_si512(__m512i* memory, __m512i a) {
  *memory = a;
}
DLKERNELS_EMULATED void _mm512_stream_ps(float* memory, __m512 a) {
  *reinterpret_cast<__m512*>(memory) = a;
}
DLKERNELS_EMULATED void _mm512_stream_pd(double* memory, __m512d a) {
  *reinterpret_cast<__m512d*>(memory) = a;
}

// ---- lanes moved and converted -------------------------------------------------------------------------------------

DLKERNELS_EMULATED __m512i _mm512_set1_epi32(int value) {
  return (__m512i)(emulated::Int32x16{} + value);
}
DLKERNELS_EMULATED __m512i _mm512_permutexvar_epi16(__m512i order, __m512i a) {
  return (__m512i)__builtin_shuffle((emulated::Bits16x32)a, (emulated::Bits16x32)order);
}
DLKERNELS_EMULATED __m512i _mm512_maskz_permutexvar_epi16(__mmask32 mask, __m512i order, __m512i a) {
  const __m512i moved = _mm512_permutexvar_epi16(order, a);
  return _mm512_maskz_loadu_epi16(mask, &moved);
}
DLKERNELS_EMULATED __m256 _mm512_castps512_ps256(__m512 a) {
  return emulated::halves(a).low;
}
DLKERNELS_EMULATED __m256 _mm512_extractf32x8_ps(__m512 a, const int half) {
  return half == 0 ? emulated::halves(a).low : emulated::halves(a).high;
}
DLKERNELS_EMULATED __m512d _mm512_cvtps_pd(__m256 a) {
  return __builtin_convertvector(a, __m512d);
}
DLKERNELS_EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return (__m512i) __builtin_convertvector((emulated::Bits16x16)a, emulated::Bits32x16);
}
DLKERNELS_EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
  const auto half = emulated::bit_cast<emulated::Halves<__m128i>>(a);
  return emulated::join(_mm256_cvtph_ps(half.low), _mm256_cvtph_ps(half.high));
}
DLKERNELS_EMULATED __m256i _mm512_cvtps_ph(__m512 a, const int rounding) {
  const auto half = emulated::halves(a);
  return emulated::bit_cast<__m256i>(
      emulated::Halves<__m128i>{_mm256_cvtps_ph(half.low, rounding), _mm256_cvtps_ph(half.high, rounding)});
}

// ---- bfloat16 ------------------------------------------------------------------------------------------------------

DLKERNELS_EMULATED __m256bh _mm512_cvtneps_pbh(__m512 a) {
  return (__m256bh)emulated::round_to_bfloat16(a);
}
// The second operand's numbers first.
DLKERNELS_EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  return emulated::bit_cast<__m512bh>(
      emulated::Halves<emulated::Bits16x16>{emulated::round_to_bfloat16(b), emulated::round_to_bfloat16(a)});
}
DLKERNELS_EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  using Bits = emulated::Bits32x16;
  auto upper = [](__m512bh pair) { return (__m512)emulated::flush((Bits)pair & 0xffff0000u); };
  auto lower = [](__m512bh pair) { return (__m512)emulated::flush((Bits)pair << 16); };
  auto flushed = [](__m512 x) { return (__m512)emulated::flush((Bits)x); };
  sum = flushed(_mm512_fmadd_ps(upper(a), upper(b), flushed(sum)));
  return flushed(_mm512_fmadd_ps(lower(a), lower(b), sum));
}

#undef DLKERNELS_EMULATED
#undef DLKERNELS_EMULATED_CALL

}  // namespace dlkernels::DLKERNELS_ISA
