// Counter-based random numbers: the words of cpu/philox.h, one counter at a time.
#pragma once

#include "cuda/device.cuh"

namespace dlkernels::DLKERNELS_ISA {

inline constexpr int kPhiloxLanes = 16, kPhiloxGroup = 4 * kPhiloxLanes;

// words[w]: the number of column group * kPhiloxGroup + w * kPhiloxLanes + lane of row `row` of matrix `matrix`.
__device__ __forceinline__ void philox(uint64_t seed, uint64_t matrix, uint64_t row, uint64_t group, uint32_t lane,
                                       uint32_t (&words)[4]) {
  uint32_t counter[4] = {static_cast<uint32_t>(group * kPhiloxLanes) + lane, static_cast<uint32_t>(row),
                         static_cast<uint32_t>(matrix),
                         static_cast<uint32_t>(matrix >> 32) ^ static_cast<uint32_t>(row >> 32)};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0], product1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter[0] = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0;
    counter[1] = static_cast<uint32_t>(product1);
    counter[2] = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1;
    counter[3] = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] = counter[w];
}

}  // namespace dlkernels::DLKERNELS_ISA
