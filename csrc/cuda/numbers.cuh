// Element types on the device: the half types are carried as bits and computed with in float32.
#pragma once

#if !defined(DLKERNELS_SIMT)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "cuda/device.cuh"

namespace dlkernels::DLKERNELS_ISA {

// The same bits as another type.
template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// ---- widening ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ double widen(double value) {
  return value;
}
__device__ __forceinline__ float widen(bfloat16 value) {
  return bits_as<float>(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float widen(float16 value) {
#if defined(DLKERNELS_SIMT)
  // Exponents are moved to float32's place and made right by a multiplication, which also normalises subnormals.
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13, sign = (value.bits & 0x8000u) << 16;
  const uint32_t scaled = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  return bits_as<float>((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled) | sign);
#else
  return __half2float(__ushort_as_half(value.bits));
#endif
}

// ---- rounding to nearest, ties to even -----------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T narrow(accumulate_t<T> value) {
  return value;
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float value) {
#if defined(DLKERNELS_SIMT)
  const uint32_t bits = bits_as<uint32_t>(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#else
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#endif
}
template <>
__device__ __forceinline__ float16 narrow<float16>(float value) {
#if defined(DLKERNELS_SIMT)
  const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (value != value) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above
  if (magnitude < 0x38800000u) {  // below 2^-14: the addition rounds to multiples of 2^-24
    const uint32_t steps = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f);
    return {static_cast<uint16_t>(sign | steps)};
  }
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13)};
#else
  return {__half_as_ushort(__float2half_rn(value))};
#endif
}

// ---- products that stay apart --------------------------------------------------------------------------------------

// a * b, rounded, whatever is added to it: the same bits in every kernel.
template <class T>
__device__ __forceinline__ T rounded_product(T a, T b) {
#if defined(DLKERNELS_SIMT)
  return a * b;
#else
  if constexpr (sizeof(T) == sizeof(double)) {
    return __dmul_rn(a, b);
  } else {
    return __fmul_rn(a, b);
  }
#endif
}

// ---- dividing by what is known before the launch -------------------------------------------------------------------

// Quotients of numbers below 2^31 by multiplication (Granlund and Montgomery 1994), of larger ones by division.
class Divider {
 public:
  explicit Divider(int64_t divisor) : divisor_(divisor) {
    if (divisor <= 1 || divisor > kLargest) return;
    int bits = 1;
    while ((int64_t{1} << bits) < divisor) ++bits;
    shift_ = 31 + bits;
    factor_ = ((uint64_t{1} << shift_) + static_cast<uint64_t>(divisor) - 1) / static_cast<uint64_t>(divisor);
  }
  __device__ __forceinline__ int64_t quotient(int64_t number) const {
    if (factor_ == 0 || number > kLargest) return divisor_ == 1 ? number : number / divisor_;
    return static_cast<int64_t>(static_cast<uint64_t>(number) * factor_ >> shift_);
  }
  __device__ __forceinline__ int64_t divisor() const { return divisor_; }

 private:
  static constexpr int64_t kLargest = 0x7fffffff;
  int64_t divisor_;
  uint64_t factor_ = 0;  // ceil(2^shift / divisor), below 2^32
  int shift_ = 0;
};

struct Division {
  int64_t quotient, remainder;
  __device__ __forceinline__ Division(int64_t number, const Divider& divider)
      : quotient(divider.quotient(number)), remainder(number - quotient * divider.divisor()) {}
};

// ---- reading and writing 16 bytes at once --------------------------------------------------------------------------

template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / static_cast<int>(sizeof(T));
  T elements[size];
};

// size neighbours from `in`, widened; a pack of them in one load where its address allows it.
template <class Scalar, int size>
__device__ __forceinline__ void load_pack(const Scalar* in, accumulate_t<Scalar> (&values)[size]) {
  static_assert(size == 1 || size == Pack<Scalar>::size);
  if (size > 1 && reinterpret_cast<uintptr_t>(in) % sizeof(Pack<Scalar>) == 0) {
    const auto pack = *reinterpret_cast<const Pack<Scalar>*>(in);
#pragma unroll
    for (int e = 0; e < size; ++e) values[e] = widen(pack.elements[e]);
    return;
  }
#pragma unroll
  for (int e = 0; e < size; ++e) values[e] = widen(in[e]);
}

// The same rounded and stored.
template <class Scalar, int size>
__device__ __forceinline__ void store_pack(Scalar* out, const accumulate_t<Scalar> (&values)[size]) {
  static_assert(size == 1 || size == Pack<Scalar>::size);
  if (size > 1 && reinterpret_cast<uintptr_t>(out) % sizeof(Pack<Scalar>) == 0) {
    Pack<Scalar> pack;
#pragma unroll
    for (int e = 0; e < size; ++e) pack.elements[e] = narrow<Scalar>(values[e]);
    *reinterpret_cast<Pack<Scalar>*>(out) = pack;
    return;
  }
#pragma unroll
  for (int e = 0; e < size; ++e) out[e] = narrow<Scalar>(values[e]);
}

// The first `count` of two neighbours, in one store where their address allows it.
template <class Scalar>
__device__ __forceinline__ void store_pair(Scalar* out, const Scalar (&values)[2], int count) {
  struct alignas(2 * sizeof(Scalar)) Pair {
    Scalar first, second;
  };
  if (count == 2 && reinterpret_cast<uintptr_t>(out) % sizeof(Pair) == 0) {
    *reinterpret_cast<Pair*>(out) = {values[0], values[1]};
    return;
  }
  out[0] = values[0];
  if (count == 2) out[1] = values[1];
}

}  // namespace dlkernels::DLKERNELS_ISA
