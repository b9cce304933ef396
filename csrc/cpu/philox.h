// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
// A number is a function of seed and position alone, so that a mask is drawn again instead of being stored, whatever
// order, block or thread asks for it.
#pragma once

#include <cstdint>

#include "simd.h"

namespace dlkernels::DLKERNELS_ISA {

inline constexpr int kPhiloxLanes = 16;
inline constexpr int64_t kPhiloxGroup = 4 * kPhiloxLanes;  // consecutive columns that one call draws for

// words[w * kPhiloxLanes + lane]: the number of column group * kPhiloxGroup + w * kPhiloxLanes + lane of row `row` of
// matrix `matrix`.
inline void philox(uint64_t seed, uint64_t matrix, uint64_t row, uint64_t group, uint32_t* words) {
  uint32_t counter[4][kPhiloxLanes];
  for (int lane = 0; lane < kPhiloxLanes; ++lane) {
    counter[0][lane] = static_cast<uint32_t>(group * kPhiloxLanes) + static_cast<uint32_t>(lane);
    counter[1][lane] = static_cast<uint32_t>(row);
    counter[2][lane] = static_cast<uint32_t>(matrix);
    counter[3][lane] = static_cast<uint32_t>(matrix >> 32) ^ static_cast<uint32_t>(row >> 32);
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0][lane];
      const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2][lane];
      counter[0][lane] = static_cast<uint32_t>(product1 >> 32) ^ counter[1][lane] ^ key0;
      counter[1][lane] = static_cast<uint32_t>(product1);
      counter[2][lane] = static_cast<uint32_t>(product0 >> 32) ^ counter[3][lane] ^ key1;
      counter[3][lane] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int w = 0; w < 4; ++w) {
    for (int lane = 0; lane < kPhiloxLanes; ++lane) words[w * kPhiloxLanes + lane] = counter[w][lane];
  }
}

// keep[i] = 1 with probability 1 - p, else 0, for columns [begin, begin + count) of a row; begin starts a group.
template <class T>
inline void draw_keep_row(uint64_t seed, double p, int64_t matrix, int64_t row, int64_t begin, int64_t count, T* keep) {
  const uint64_t threshold = static_cast<uint64_t>(p * 0x1p32);  // 2^32 where p is 1: nothing is kept
  uint32_t words[kPhiloxGroup];
  for (int64_t i = 0; i < count; i += kPhiloxGroup) {
    philox(seed, static_cast<uint64_t>(matrix), static_cast<uint64_t>(row),
           static_cast<uint64_t>((begin + i) / kPhiloxGroup), words);
    const int64_t drawn = count - i < kPhiloxGroup ? count - i : kPhiloxGroup;
    for (int64_t j = 0; j < drawn; ++j) keep[i + j] = words[j] >= threshold ? T(1) : T(0);
  }
}

}  // namespace dlkernels::DLKERNELS_ISA
