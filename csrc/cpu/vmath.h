// Elementary functions on vectors. float: polynomials (Cephes, S. Moshier; coefficients refitted there), largest error
// in units in the last place, found by tests/test_vmath.py over all exponents: exp 1.1, log 1.0, tanh 1.6, sigmoid 2.5.
// double: the C library lane by lane; it proves formulas and is not tuned.
#pragma once

#include "simd.h"

namespace dlkernels::DLKERNELS_ISA {

template <class Function>
DLKERNELS_INLINE VecD map_lanes(VecD a, Function function) {
  for (int64_t lane = 0; lane < VecD::size; ++lane) a.raw[lane] = function(a.raw[lane]);
  return a;
}

// a * 2^n for integral n with |n| <= 300: in two exact steps, so that only a subnormal result is rounded.
DLKERNELS_INLINE VecF scale_by_power_of_two(VecF a, VecF n) {
#if defined(DLKERNELS_AVX512)
  return VecF(_mm512_scalef_ps(a.raw, n.raw));
#else
  using Integer = Lanes<float>::integer;
  const Integer whole = __builtin_convertvector(n.raw, Integer);
  const Integer half = whole >> 1;
  const VecF first = VecF((VecF::Raw)((half + 127) << 23));
  const VecF second = VecF((VecF::Raw)((whole - half + 127) << 23));
  return a * first * second;
#endif
}

// Nearest integer, ties to even, for |a| <= 2^22: adding 1.5 * 2^23 leaves no fraction bits.
DLKERNELS_INLINE VecF round_to_integer(VecF a) {
  const VecF magic = 0x1.8p23f;
  return (a + magic) - magic;
}

// e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln 2 / 2, e^r by a polynomial of degree 6.
struct PowerOfE {
  VecF p, n;  // e^r, n
};
DLKERNELS_INLINE PowerOfE split_exp(VecF x) {
  const VecF n = round_to_integer(x * VecF(1.44269504088896341f));
  VecF r = fma(n, VecF(-0.693359375f), x);
  r = fma(n, VecF(2.12194440e-4f), r);
  VecF p = 1.9875691500e-4f;
  p = fma(p, r, VecF(1.3981999507e-3f));
  p = fma(p, r, VecF(8.3334519073e-3f));
  p = fma(p, r, VecF(4.1665795894e-2f));
  p = fma(p, r, VecF(1.6666665459e-1f));
  p = fma(p, r, VecF(5.0000001201e-1f));
  return {fma(p, r * r, r) + VecF(1.0f), n};
}
DLKERNELS_INLINE VecF exp(VecF x) {
  const PowerOfE power = split_exp(min(VecF(89.0f), max(VecF(-104.0f), x)));  // infinite or zero beyond; NaN stays
  return scale_by_power_of_two(power.p, power.n);
}
// The same for x <= 0, zero where it is no normal number: a processor takes some 150 cycles to make a subnormal one,
// and what a softmax masks is e^-inf.
DLKERNELS_INLINE VecF exp_of_negative(VecF x) {
  const VecF smallest = -87.33654f;
  const PowerOfE power = split_exp(max(smallest, x));
  return select(x < smallest, VecF::zero(), scale_by_power_of_two(power.p, power.n));
}
DLKERNELS_INLINE VecD exp(VecD x) {
  return map_lanes(x, [](double v) { return __builtin_exp(v); });
}
// 2^x for x <= 0, within 4e-6, where it is a normal number, zero below: for what is rounded to bfloat16 next.
DLKERNELS_INLINE VecF coarse_exp2_of_negative(VecF x) {
  const VecF n = round_to_integer(x);
  const VecF r = x - n;
  VecF p = 9.5701022e-3f;
  p = fma(p, r, VecF(5.5917859e-2f));
  p = fma(p, r, VecF(2.4024744e-1f));
  p = fma(p, r, VecF(6.9312179e-1f));
  p = fma(p, r, VecF(9.9999928e-1f));
  const VecF smallest = -126.0f;
#if defined(DLKERNELS_AVX512)
  const __mmask16 is_normal = _mm512_cmp_ps_mask(x.raw, smallest.raw, _CMP_NLT_UQ);  // or NaN
  return VecF(_mm512_maskz_scalef_ps(is_normal, p.raw, n.raw));
#else
  return select(x < smallest, VecF::zero(), scale_by_power_of_two(p, max(smallest, n)));
#endif
}
DLKERNELS_INLINE VecD exp_of_negative(VecD x) {
  return exp(x);
}

// log x = n ln 2 + log m, sqrt(1/2) <= m < sqrt(2).
DLKERNELS_INLINE VecF log(VecF x) {
  using Integer = Lanes<float>::integer;
  const VecF smallest_normal = 0x1p-126f;
  const Mask<float> subnormal = x < smallest_normal;
  const VecF scaled = select(subnormal, x * VecF(0x1p23f), x);
  const Integer bits = (Integer)scaled.raw;
  VecF n = VecF(__builtin_convertvector((bits >> 23) - 126, VecF::Raw));
  n = n - select(subnormal, VecF(23.0f), VecF::zero());
  VecF m = VecF((VecF::Raw)((bits & 0x007fffff) | 0x3f000000));  // in [1/2, 1)
  const Mask<float> low = m < VecF(0.707106781186547524f);
  n = select(low, n - VecF(1.0f), n);
  m = select(low, m + m, m) - VecF(1.0f);
  const VecF m2 = m * m;
  VecF p = 7.0376836292e-2f;
  p = fma(p, m, VecF(-1.1514610310e-1f));
  p = fma(p, m, VecF(1.1676998740e-1f));
  p = fma(p, m, VecF(-1.2420140846e-1f));
  p = fma(p, m, VecF(1.4249322787e-1f));
  p = fma(p, m, VecF(-1.6668057665e-1f));
  p = fma(p, m, VecF(2.0000714765e-1f));
  p = fma(p, m, VecF(-2.4999993993e-1f));
  p = fma(p, m, VecF(3.3333331174e-1f));
  VecF y = p * m * m2;
  y = fma(n, VecF(-2.12194440e-4f), y);
  y = fma(m2, VecF(-0.5f), y);
  y = fma(n, VecF(0.693359375f), m + y);
  const VecF infinity = __builtin_inff();
  y = select(x == infinity, infinity, y);
  y = select(x == VecF::zero(), -infinity, y);
  return select((x < VecF::zero()) | is_nan(x), VecF(__builtin_nanf("")), y);
}
DLKERNELS_INLINE VecD log(VecD x) {
  return map_lanes(x, [](double v) { return __builtin_log(v); });
}

// Odd polynomial below 0.625, where 1 - 2 / (e^2x + 1) would cancel.
DLKERNELS_INLINE VecF tanh(VecF x) {
  const VecF magnitude = abs(x);
  const VecF z = x * x;
  VecF p = -5.70498872745e-3f;
  p = fma(p, z, VecF(2.06390887954e-2f));
  p = fma(p, z, VecF(-5.37397155531e-2f));
  p = fma(p, z, VecF(1.33314422036e-1f));
  p = fma(p, z, VecF(-3.33332819422e-1f));
  const VecF small = fma(p * z, x, x);
  const VecF large = VecF(1.0f) - VecF(2.0f) / (exp(magnitude + magnitude) + VecF(1.0f));
  return select(magnitude < VecF(0.625f), small, copy_sign(large, x));
}
DLKERNELS_INLINE VecD tanh(VecD x) {
  return map_lanes(x, [](double v) { return __builtin_tanh(v); });
}

// e^-|x| never overflows, and x < 0 keeps its relative accuracy: sigmoid(x) = e^x / (1 + e^x).
DLKERNELS_INLINE VecF sigmoid(VecF x) {
  const VecF e = exp(-abs(x));
  return select(x < VecF::zero(), e, VecF(1.0f)) / (VecF(1.0f) + e);
}
DLKERNELS_INLINE VecD sigmoid(VecD x) {
  return map_lanes(x, [](double v) {
    const double e = __builtin_exp(v < 0 ? v : -v);
    return (v < 0 ? e : 1.0) / (1.0 + e);
  });
}

}  // namespace dlkernels::DLKERNELS_ISA
