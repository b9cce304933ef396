// One vector type over every instruction set. Vec<T> holds as many T (float or double) as a register does; bfloat16 and
// float16 are widened to Vec<float> by load and rounded to nearest even by store. Kernels above this header never name
// an intrinsic. GCC's vector extensions carry the arithmetic (and serve aarch64); what they cannot say well, masks and
// half precision, has a body per instruction set here.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <utility>

#include "types.h"

// AVX-512 instructions, or the same in software for tests (tests/emulated/avx512.h).
#if defined(DLKERNELS_EMULATE_AVX512)
#include "avx512.h"
#define DLKERNELS_AVX512
#define DLKERNELS_AVX512_BF16
#else
#if defined(__AVX512F__)
#define DLKERNELS_AVX512
#endif
#if defined(__AVX512BF16__)
#define DLKERNELS_AVX512_BF16
#endif
#endif

#define DLKERNELS_STRINGIFY_IMPL(x) #x
#define DLKERNELS_STRINGIFY(x) DLKERNELS_STRINGIFY_IMPL(x)

namespace dlkernels::DLKERNELS_ISA {

inline constexpr const char* isa_name = DLKERNELS_STRINGIFY(DLKERNELS_ISA);

#undef DLKERNELS_STRINGIFY
#undef DLKERNELS_STRINGIFY_IMPL

#if defined(DLKERNELS_AVX512)
inline constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int64_t kVectorBytes = 32;
#else
inline constexpr int64_t kVectorBytes = 16;
#endif

#define DLKERNELS_INLINE inline __attribute__((always_inline))

// ---- the register types ----------------------------------------------------------------------------------------

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int64_t count = kVectorBytes / 4;
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));  // also of bfloat16
  typedef int32_t integer __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t half_bits __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint16_t half_bits_unaligned __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
};
template <>
struct Lanes<double> {
  static constexpr int64_t count = kVectorBytes / 8;
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
struct Vec {
  using Raw = typename Lanes<T>::type;
  static constexpr int64_t size = Lanes<T>::count;
  Raw raw;

  Vec() = default;
  DLKERNELS_INLINE Vec(T value) : raw(value - Raw{}) {}
  DLKERNELS_INLINE explicit Vec(Raw value) : raw(value) {}
  static DLKERNELS_INLINE Vec zero() { return Vec(Raw{}); }
  DLKERNELS_INLINE T operator[](int64_t lane) const { return raw[lane]; }
  DLKERNELS_INLINE Vec& operator+=(Vec other) { return raw += other.raw, *this; }
  DLKERNELS_INLINE Vec& operator-=(Vec other) { return raw -= other.raw, *this; }
  DLKERNELS_INLINE Vec& operator*=(Vec other) { return raw *= other.raw, *this; }
  friend DLKERNELS_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.raw + b.raw); }
  friend DLKERNELS_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.raw - b.raw); }
  friend DLKERNELS_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.raw * b.raw); }
  friend DLKERNELS_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.raw / b.raw); }
  friend DLKERNELS_INLINE Vec operator-(Vec a) { return Vec(-a.raw); }
};

using VecF = Vec<float>;
using VecD = Vec<double>;

// One truth value per lane.
template <class T>
struct Mask {
#if defined(DLKERNELS_AVX512)
  using Raw = __mmask16;
#else
  using Raw = typename Lanes<T>::integer;
#endif
  Raw raw;
};

// ---- comparison and selection ----------------------------------------------------------------------------------

#if defined(DLKERNELS_AVX512)
namespace compare {
enum Predicate { equal = _CMP_EQ_OQ, less = _CMP_LT_OQ, less_equal = _CMP_LE_OQ, unordered = _CMP_UNORD_Q };
}
template <int Predicate>
DLKERNELS_INLINE Mask<float> compare_lanes(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.raw, b.raw, Predicate)};
}
template <int Predicate>
DLKERNELS_INLINE Mask<double> compare_lanes(VecD a, VecD b) {
  return {_mm512_cmp_pd_mask(a.raw, b.raw, Predicate)};
}
template <class T>
DLKERNELS_INLINE Mask<T> operator==(Vec<T> a, Vec<T> b) {
  return compare_lanes<compare::equal>(a, b);
}
template <class T>
DLKERNELS_INLINE Mask<T> operator<(Vec<T> a, Vec<T> b) {
  return compare_lanes<compare::less>(a, b);
}
template <class T>
DLKERNELS_INLINE Mask<T> operator<=(Vec<T> a, Vec<T> b) {
  return compare_lanes<compare::less_equal>(a, b);
}
template <class T>
DLKERNELS_INLINE Mask<T> is_nan(Vec<T> a) {
  return compare_lanes<compare::unordered>(a, a);
}

DLKERNELS_INLINE VecF select(Mask<float> mask, VecF yes, VecF no) {
  return VecF(_mm512_mask_blend_ps(mask.raw, no.raw, yes.raw));
}
DLKERNELS_INLINE VecD select(Mask<double> mask, VecD yes, VecD no) {
  return VecD(_mm512_mask_blend_pd(static_cast<__mmask8>(mask.raw), no.raw, yes.raw));
}
template <class T>
DLKERNELS_INLINE Mask<T> operator&(Mask<T> a, Mask<T> b) {
  return {static_cast<__mmask16>(a.raw & b.raw)};
}
template <class T>
DLKERNELS_INLINE Mask<T> operator|(Mask<T> a, Mask<T> b) {
  return {static_cast<__mmask16>(a.raw | b.raw)};
}
template <class T>
DLKERNELS_INLINE bool any(Mask<T> mask) {
  return mask.raw != 0;
}
// One bit per lane, lane 0 lowest.
template <class T>
DLKERNELS_INLINE uint32_t to_bits(Mask<T> mask) {
  return mask.raw;
}
template <class T>
DLKERNELS_INLINE Mask<T> mask_from_bits(uint32_t bits) {
  return {static_cast<__mmask16>(bits)};
}
// The first `count` lanes.
template <class T>
DLKERNELS_INLINE Mask<T> first_lanes(int64_t count) {
  return {static_cast<__mmask16>(count >= Vec<T>::size ? 0xffff : (1u << count) - 1)};
}
#else
template <class T>
DLKERNELS_INLINE Mask<T> operator==(Vec<T> a, Vec<T> b) {
  return {a.raw == b.raw};
}
template <class T>
DLKERNELS_INLINE Mask<T> operator<(Vec<T> a, Vec<T> b) {
  return {a.raw < b.raw};
}
template <class T>
DLKERNELS_INLINE Mask<T> operator<=(Vec<T> a, Vec<T> b) {
  return {a.raw <= b.raw};
}
template <class T>
DLKERNELS_INLINE Mask<T> is_nan(Vec<T> a) {
  return {a.raw != a.raw};
}
template <class T>
DLKERNELS_INLINE Vec<T> select(Mask<T> mask, Vec<T> yes, Vec<T> no) {
  return Vec<T>(mask.raw ? yes.raw : no.raw);
}
template <class T>
DLKERNELS_INLINE Mask<T> operator&(Mask<T> a, Mask<T> b) {
  return {a.raw & b.raw};
}
template <class T>
DLKERNELS_INLINE Mask<T> operator|(Mask<T> a, Mask<T> b) {
  return {a.raw | b.raw};
}
template <class T>
DLKERNELS_INLINE uint32_t to_bits(Mask<T> mask) {
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < Vec<T>::size; ++lane) bits |= static_cast<uint32_t>(mask.raw[lane] & 1) << lane;
  return bits;
}
template <class T>
DLKERNELS_INLINE bool any(Mask<T> mask) {
  return to_bits(mask) != 0;
}
template <class T>
DLKERNELS_INLINE Mask<T> mask_from_bits(uint32_t bits) {
  Mask<T> mask;
  for (int64_t lane = 0; lane < Vec<T>::size; ++lane) mask.raw[lane] = (bits >> lane & 1) ? -1 : 0;
  return mask;
}
template <class T>
DLKERNELS_INLINE Mask<T> first_lanes(int64_t count) {
  Mask<T> mask;
  for (int64_t lane = 0; lane < Vec<T>::size; ++lane) mask.raw[lane] = lane < count ? -1 : 0;
  return mask;
}
#endif

// The larger (smaller) of the two; the second where they are unordered, so max(limit, x) keeps a NaN in x.
template <class T>
DLKERNELS_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.raw > b.raw ? a.raw : b.raw);
}
template <class T>
DLKERNELS_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.raw < b.raw ? a.raw : b.raw);
}

#if defined(DLKERNELS_AVX512)
template <>
DLKERNELS_INLINE VecF max(VecF a, VecF b) {
  return VecF(_mm512_max_ps(a.raw, b.raw));
}
template <>
DLKERNELS_INLINE VecF min(VecF a, VecF b) {
  return VecF(_mm512_min_ps(a.raw, b.raw));
}
template <>
DLKERNELS_INLINE VecD max(VecD a, VecD b) {
  return VecD(_mm512_max_pd(a.raw, b.raw));
}
template <>
DLKERNELS_INLINE VecD min(VecD a, VecD b) {
  return VecD(_mm512_min_pd(a.raw, b.raw));
}
#endif

// ---- arithmetic that the operators do not say --------------------------------------------------------------------

// a * b + c, rounded once where the instruction set can.
template <class T>
DLKERNELS_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return Vec<T>(a.raw * b.raw + c.raw);
}
#if defined(DLKERNELS_AVX512)
template <>
DLKERNELS_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return VecF(_mm512_fmadd_ps(a.raw, b.raw, c.raw));
}
template <>
DLKERNELS_INLINE VecD fma(VecD a, VecD b, VecD c) {
  return VecD(_mm512_fmadd_pd(a.raw, b.raw, c.raw));
}
#elif defined(__FMA__)
template <>
DLKERNELS_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return VecF(_mm256_fmadd_ps(a.raw, b.raw, c.raw));
}
template <>
DLKERNELS_INLINE VecD fma(VecD a, VecD b, VecD c) {
  return VecD(_mm256_fmadd_pd(a.raw, b.raw, c.raw));
}
#endif

template <class T>
DLKERNELS_INLINE typename Lanes<T>::bits bits_of(Vec<T> a) {
  return (typename Lanes<T>::bits)a.raw;
}
template <class T>
DLKERNELS_INLINE Vec<T> from_bits(typename Lanes<T>::bits bits) {
  return Vec<T>((typename Lanes<T>::type)bits);
}

DLKERNELS_INLINE VecF abs(VecF a) {
  return from_bits<float>(bits_of(a) & 0x7fffffffu);
}
DLKERNELS_INLINE VecD abs(VecD a) {
  return from_bits<double>(bits_of(a) & 0x7fffffffffffffffull);
}
DLKERNELS_INLINE VecF copy_sign(VecF magnitude, VecF sign) {
  return from_bits<float>((bits_of(magnitude) & 0x7fffffffu) | (bits_of(sign) & 0x80000000u));
}

// a0 b0 a1 b1 ... of the low (high) halves.
template <int64_t First, class T, size_t... Lane>
DLKERNELS_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<Lane...>) {
  return Vec<T>(
      __builtin_shufflevector(a.raw, b.raw, (First + static_cast<int>(Lane / 2 + Lane % 2 * Vec<T>::size))...));
}

// rows[i][j] <-> rows[j][i]. Each pass rotates the bits of (row, lane) by one place; half of them all is a
// transposition.
template <class T>
DLKERNELS_INLINE void transpose_square(Vec<T> (&rows)[Vec<T>::size]) {
  constexpr int64_t size = Vec<T>::size;
  constexpr auto lanes = std::make_index_sequence<size>();
#pragma GCC unroll 4
  for (int64_t pass = 1; pass < size; pass *= 2) {
    Vec<T> next[size];
#pragma GCC unroll 8
    for (int64_t i = 0; i < size / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + size / 2], lanes);
      next[2 * i + 1] = interleave<size / 2>(rows[i], rows[i + size / 2], lanes);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < size; ++i) rows[i] = next[i];
  }
}

// Sum and maximum over the lanes, in a fixed tree order.
template <class T>
DLKERNELS_INLINE T reduce_add(Vec<T> a) {
  T lanes[Vec<T>::size];
  __builtin_memcpy(lanes, &a.raw, sizeof(lanes));
  for (int64_t half = Vec<T>::size / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}
template <class T>
DLKERNELS_INLINE T reduce_max(Vec<T> a) {
  T lanes[Vec<T>::size];
  __builtin_memcpy(lanes, &a.raw, sizeof(lanes));
  for (int64_t half = Vec<T>::size / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      if (lanes[lane + half] > lanes[lane]) lanes[lane] = lanes[lane + half];
    }
  }
  return lanes[0];
}
#if defined(DLKERNELS_AVX512)
template <>
DLKERNELS_INLINE float reduce_add(VecF a) {
  return _mm512_reduce_add_ps(a.raw);
}
template <>
DLKERNELS_INLINE double reduce_add(VecD a) {
  return _mm512_reduce_add_pd(a.raw);
}
template <>
DLKERNELS_INLINE float reduce_max(VecF a) {
  return _mm512_reduce_max_ps(a.raw);
}
template <>
DLKERNELS_INLINE double reduce_max(VecD a) {
  return _mm512_reduce_max_pd(a.raw);
}
#endif

// Lane i: the sum over the lanes of rows[i]. Each pass adds the halves of two vectors and interleaves the results.
template <class T, size_t... Row>
DLKERNELS_INLINE void add_halves(Vec<T>* rows, std::index_sequence<Row...>) {
  constexpr int64_t size = Vec<T>::size;
  constexpr auto lanes = std::make_index_sequence<size>();
  constexpr size_t half = sizeof...(Row);
  ((rows[Row] =
        interleave<0>(rows[Row], rows[Row + half], lanes) + interleave<size / 2>(rows[Row], rows[Row + half], lanes)),
   ...);
  if constexpr (half > 1) add_halves(rows, std::make_index_sequence<half / 2>());
}
template <class T>
DLKERNELS_INLINE Vec<T> reduce_add_each(Vec<T> (&rows)[Vec<T>::size]) {
  add_halves(rows, std::make_index_sequence<Vec<T>::size / 2>());
  return rows[0];
}

// The sum over the lanes in double, in the same tree order.
template <class T>
DLKERNELS_INLINE double reduce_add_wide(Vec<T> a) {
  constexpr int64_t half = Vec<T>::size / 2;
  double lanes[half];
  for (int64_t lane = 0; lane < half; ++lane) {
    lanes[lane] = static_cast<double>(a.raw[lane]) + static_cast<double>(a.raw[lane + half]);
  }
  for (int64_t rest = half / 2; rest > 0; rest /= 2) {
    for (int64_t lane = 0; lane < rest; ++lane) lanes[lane] += lanes[lane + rest];
  }
  return lanes[0];
}
#if defined(DLKERNELS_AVX512)
template <>
DLKERNELS_INLINE double reduce_add_wide(VecF a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.raw));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.raw, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}
#endif

// ---- load and store ----------------------------------------------------------------------------------------------

DLKERNELS_INLINE VecF load(const float* p) {
  return VecF(*reinterpret_cast<const Lanes<float>::unaligned*>(p));
}
DLKERNELS_INLINE VecD load(const double* p) {
  return VecD(*reinterpret_cast<const Lanes<double>::unaligned*>(p));
}
DLKERNELS_INLINE void store(float* p, VecF a) {
  *reinterpret_cast<Lanes<float>::unaligned*>(p) = a.raw;
}
DLKERNELS_INLINE void store(double* p, VecD a) {
  *reinterpret_cast<Lanes<double>::unaligned*>(p) = a.raw;
}

using HalfBits = Lanes<float>::half_bits;
DLKERNELS_INLINE HalfBits load_half_bits(const void* p) {
  return *static_cast<const Lanes<float>::half_bits_unaligned*>(p);
}
DLKERNELS_INLINE void store_half_bits(void* p, HalfBits bits) {
  *static_cast<Lanes<float>::half_bits_unaligned*>(p) = bits;
}

// gcc 12 extends a vector in two halves and joins them.
DLKERNELS_INLINE Lanes<float>::bits zero_extend(HalfBits half) {
#if defined(DLKERNELS_AVX512)
  return (Lanes<float>::bits)_mm512_cvtepu16_epi32((__m256i)half);
#elif defined(__AVX2__)
  return (Lanes<float>::bits)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, Lanes<float>::bits);
#endif
}
DLKERNELS_INLINE VecF widen(bfloat16, HalfBits half) {
  return from_bits<float>(zero_extend(half) << 16);
}
DLKERNELS_INLINE HalfBits narrow_bits(VecF a) {
  using Bits = Lanes<float>::bits;
  const Bits bits = bits_of(a);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet_nan = (bits >> 16) | 0x40u;
  const VecF half = select(is_nan(a), from_bits<float>(quiet_nan), from_bits<float>(rounded));
  return __builtin_convertvector(bits_of(half), HalfBits);
}
DLKERNELS_INLINE HalfBits narrow(bfloat16, VecF a) {
#if defined(DLKERNELS_AVX512_BF16)
  constexpr int subnormal = 0x20;  // the instruction would make them zero
  if (_mm512_fpclass_ps_mask(a.raw, subnormal) == 0) return (HalfBits)_mm512_cvtneps_pbh(a.raw);
#endif
  return narrow_bits(a);
}
#if defined(DLKERNELS_AVX512)
DLKERNELS_INLINE VecF widen(float16, HalfBits half) {
  return VecF(_mm512_cvtph_ps((__m256i)half));
}
DLKERNELS_INLINE HalfBits narrow(float16, VecF a) {
  return (HalfBits)_mm512_cvtps_ph(a.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
DLKERNELS_INLINE VecF widen(float16, HalfBits half) {
  return VecF(_mm256_cvtph_ps((__m128i)half));
}
DLKERNELS_INLINE HalfBits narrow(float16, VecF a) {
  return (HalfBits)_mm256_cvtps_ph(a.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
DLKERNELS_INLINE VecF widen(float16, HalfBits half) {
  using Bits = Lanes<float>::bits;
  const Bits wide = zero_extend(half);
  const Bits magnitude = wide & 0x7fffu;
  const Bits finite = bits_of(from_bits<float>(magnitude << 13) * VecF(0x1p112f));  // also scales subnormals
  const Bits special = (Bits)(magnitude >= 0x7c00u);
  return from_bits<float>(((finite & ~special) | (((magnitude << 13) | 0x7f800000u) & special)) |
                          ((wide & 0x8000u) << 16));
}
DLKERNELS_INLINE HalfBits narrow(float16, VecF a) {
  using Bits = Lanes<float>::bits;
  const Bits sign = (bits_of(a) >> 16) & 0x8000u;
  const VecF magnitude = abs(a);
  const Bits bits = bits_of(magnitude);
  const Bits normal = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;  // rebias the exponent by 15 - 127
  const Bits subnormal = bits_of(magnitude + VecF(0.5f)) - 0x3f000000u;  // 0.5 has the ulp of a half's subnormals
  const Bits is_subnormal = (Bits)(bits < 0x38800000u);
  const Bits overflows = (Bits)(bits >= 0x477ff000u);  // 65520 and above round to infinity
  const Bits nan = (Bits)(bits > 0x7f800000u);
  Bits out = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  out = (out & ~overflows) | (0x7c00u & overflows);
  out = (out & ~nan) | (0x7e00u & nan);
  return __builtin_convertvector(out | sign, HalfBits);
}
#endif

DLKERNELS_INLINE VecF load(const bfloat16* p) {
  return widen(bfloat16{}, load_half_bits(p));
}
DLKERNELS_INLINE VecF load(const float16* p) {
  return widen(float16{}, load_half_bits(p));
}
DLKERNELS_INLINE void store(bfloat16* p, VecF a) {
  store_half_bits(p, narrow(bfloat16{}, a));
}
DLKERNELS_INLINE void store(float16* p, VecF a) {
  store_half_bits(p, narrow(float16{}, a));
}

// Stores past the cache, for outputs that the cache would not hold until they are read: their lines are not read before
// they are written. p is aligned to the bytes of a register, or half of them for the half types.
namespace detail {
template <class Register>
DLKERNELS_INLINE void store_past_cache(void* p, Register a) {
#if defined(DLKERNELS_AVX512)
  if constexpr (sizeof(a) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)a);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(a) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)a);
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(a) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)a);
#endif
  __builtin_memcpy(p, &a, sizeof a);
}
}  // namespace detail
DLKERNELS_INLINE void store_past_cache(float* p, VecF a) {
  detail::store_past_cache(p, a.raw);
}
DLKERNELS_INLINE void store_past_cache(double* p, VecD a) {
  detail::store_past_cache(p, a.raw);
}
template <class Half>
DLKERNELS_INLINE void store_past_cache(Half* p, VecF a) {
  detail::store_past_cache(p, narrow(Half{}, a));
}
// After the last of them, before another thread looks.
DLKERNELS_INLINE void finish_stores_past_cache() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first `count` lanes (0 <= count <= size); lanes beyond it load as zero and are not stored. Neither touches memory
// beyond `count` elements.
#if defined(DLKERNELS_AVX512)
DLKERNELS_INLINE VecF load(const float* p, int64_t count) {
  return VecF(_mm512_maskz_loadu_ps(first_lanes<float>(count).raw, p));
}
DLKERNELS_INLINE VecD load(const double* p, int64_t count) {
  return VecD(_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes<double>(count).raw), p));
}
DLKERNELS_INLINE void store(float* p, VecF a, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes<float>(count).raw, a.raw);
}
DLKERNELS_INLINE void store(double* p, VecD a, int64_t count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes<double>(count).raw), a.raw);
}
DLKERNELS_INLINE HalfBits load_half_bits(const void* p, int64_t count) {
  return (HalfBits)_mm256_maskz_loadu_epi16(first_lanes<float>(count).raw, p);
}
DLKERNELS_INLINE void store_half_bits(void* p, HalfBits bits, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes<float>(count).raw, (__m256i)bits);
}
#else
DLKERNELS_INLINE VecF load(const float* p, int64_t count) {
  VecF a = VecF::zero();
  __builtin_memcpy(&a.raw, p, static_cast<size_t>(count) * sizeof(float));
  return a;
}
DLKERNELS_INLINE VecD load(const double* p, int64_t count) {
  VecD a = VecD::zero();
  __builtin_memcpy(&a.raw, p, static_cast<size_t>(count) * sizeof(double));
  return a;
}
DLKERNELS_INLINE void store(float* p, VecF a, int64_t count) {
  __builtin_memcpy(p, &a.raw, static_cast<size_t>(count) * sizeof(float));
}
DLKERNELS_INLINE void store(double* p, VecD a, int64_t count) {
  __builtin_memcpy(p, &a.raw, static_cast<size_t>(count) * sizeof(double));
}
DLKERNELS_INLINE HalfBits load_half_bits(const void* p, int64_t count) {
  HalfBits bits = {};
  __builtin_memcpy(&bits, p, static_cast<size_t>(count) * sizeof(uint16_t));
  return bits;
}
DLKERNELS_INLINE void store_half_bits(void* p, HalfBits bits, int64_t count) {
  __builtin_memcpy(p, &bits, static_cast<size_t>(count) * sizeof(uint16_t));
}
#endif

DLKERNELS_INLINE VecF load(const bfloat16* p, int64_t count) {
  return widen(bfloat16{}, load_half_bits(p, count));
}
DLKERNELS_INLINE VecF load(const float16* p, int64_t count) {
  return widen(float16{}, load_half_bits(p, count));
}
DLKERNELS_INLINE void store(bfloat16* p, VecF a, int64_t count) {
  store_half_bits(p, narrow(bfloat16{}, a), count);
}
DLKERNELS_INLINE void store(float16* p, VecF a, int64_t count) {
  store_half_bits(p, narrow(float16{}, a), count);
}

// A whole vector, or its first `count` lanes: for loops that treat the tail like the body.
template <class Scalar>
DLKERNELS_INLINE Vec<accumulate_t<Scalar>> load_lanes(const Scalar* p, int64_t count) {
  return count == Vec<accumulate_t<Scalar>>::size ? load(p) : load(p, count);
}
template <class Scalar>
DLKERNELS_INLINE void store_lanes(Scalar* p, Vec<accumulate_t<Scalar>> value, int64_t count) {
  count == Vec<accumulate_t<Scalar>>::size ? store(p, value) : store(p, value, count);
}
// value in the first `count` lanes, filler in the rest.
template <class T>
DLKERNELS_INLINE Vec<T> keep_lanes(Vec<T> value, T filler, int64_t count) {
  return count == Vec<T>::size ? value : select(first_lanes<T>(count), value, Vec<T>(filler));
}

// Past the caches, for results that nothing reads soon; p is aligned to the vector. Only float and double.
#if defined(DLKERNELS_AVX512)
DLKERNELS_INLINE void stream(float* p, VecF a) {
  _mm512_stream_ps(p, a.raw);
}
DLKERNELS_INLINE void stream(double* p, VecD a) {
  _mm512_stream_pd(p, a.raw);
}
#elif defined(__AVX2__)
DLKERNELS_INLINE void stream(float* p, VecF a) {
  _mm256_stream_ps(p, a.raw);
}
DLKERNELS_INLINE void stream(double* p, VecD a) {
  _mm256_stream_pd(p, a.raw);
}
#else
DLKERNELS_INLINE void stream(float* p, VecF a) {
  store(p, a);
}
DLKERNELS_INLINE void stream(double* p, VecD a) {
  store(p, a);
}
#endif

// One element, widened or rounded exactly as the vector forms do.
template <class T>
DLKERNELS_INLINE accumulate_t<T> load_one(const T* p) {
  return load(p, 1)[0];
}
DLKERNELS_INLINE float load_one(const float* p) {
  return *p;
}
DLKERNELS_INLINE double load_one(const double* p) {
  return *p;
}
DLKERNELS_INLINE float load_one(const bfloat16* p) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(p->bits) << 16);
}
template <class T>
DLKERNELS_INLINE void store_one(T* p, accumulate_t<T> value) {
  store(p, Vec<accumulate_t<T>>(value), 1);
}

}  // namespace dlkernels::DLKERNELS_ISA
