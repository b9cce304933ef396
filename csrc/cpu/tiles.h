// The matrix registers of AMX: eight tiles of 16 rows of 64 bytes. Products take a left tile of 16 rows of 32 bfloat16
// and a right tile that holds, in row p and 32-bit column j, elements (2p, j) and (2p + 1, j), and add to a tile of
// 16 x 16 float32.
//
// An instruction set without them emulates them when it is compiled with DLKERNELS_EMULATE_TILES, so that the kernels
// built on tiles are tested on any processor.
#pragma once

#include "simd.h"

namespace dlkernels::DLKERNELS_ISA {

inline constexpr int64_t kTileHeight = 16;  // rows of any tile, and columns of sums
inline constexpr int64_t kTileDepth = 32;   // bfloat16 in a row

#if defined(__AMX_BF16__)

inline constexpr bool kHasTiles = true;

// Configures the calling thread's tiles, and releases them at the end of the scope: what other code left in the
// configuration cannot be relied on, nor may it stay, since a context switch saves live tiles. Written as assembly,
// because the compiler's intrinsics are macros that take a tile's number as text, and gcc 12's _tile_loadconfig says of
// 64 bytes that it reads 8.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int Tile>
  DLKERNELS_INLINE void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
  }
  template <int Tile>
  DLKERNELS_INLINE void load(const void* first_row, int64_t row_bytes) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(Tile), "r"(first_row), "r"(row_bytes) : "memory");
  }
  template <int Tile>
  DLKERNELS_INLINE void store(void* first_row, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(Tile), "r"(first_row), "r"(row_bytes) : "memory");
  }
  template <int Sum, int Left, int Right>
  DLKERNELS_INLINE void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
  }
};

#else

#if defined(DLKERNELS_EMULATE_TILES)
inline constexpr bool kHasTiles = true;
#else
inline constexpr bool kHasTiles = false;
#endif

class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int Tile>
  void clear() {
    __builtin_memset(rows_[Tile], 0, sizeof rows_[Tile]);
  }
  template <int Tile>
  void load(const void* first_row, int64_t row_bytes) {
    for (int64_t row = 0; row < kTileHeight; ++row) {
      __builtin_memcpy(rows_[Tile][row], static_cast<const char*>(first_row) + row * row_bytes, 64);
    }
  }
  template <int Tile>
  void store(void* first_row, int64_t row_bytes) {
    for (int64_t row = 0; row < kTileHeight; ++row) {
      __builtin_memcpy(static_cast<char*>(first_row) + row * row_bytes, rows_[Tile][row], 64);
    }
  }
  // As the instruction rounds: the products of a row's even elements, and of its odd ones, are summed from zero, one
  // after the other; the sum of both is then added. Subnormal numbers count as zero.
  template <int Sum, int Left, int Right>
  void add_product() {
    for (int64_t i = 0; i < kTileHeight; ++i) {
      for (int64_t j = 0; j < kTileHeight; j += kLanes) {
        Floats even = {}, odd = {};
        for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
          const Bits left = Bits{} + rows_[Left][i][pair], right = load_bits(&rows_[Right][pair][j]);
          even = flush(flush(low_halves(left)) * flush(low_halves(right)) + even);
          odd = flush(flush(high_halves(left)) * flush(high_halves(right)) + odd);
        }
        uint32_t* sums = &rows_[Sum][i][j];
        const Floats sum = flush(flush((Floats)load_bits(sums)) + flush(even + odd));
        __builtin_memcpy(sums, &sum, sizeof sum);
      }
    }
  }

 private:
  static constexpr int64_t kLanes = 4;
  using Bits [[gnu::vector_size(4 * kLanes)]] = uint32_t;
  using Floats [[gnu::vector_size(4 * kLanes)]] = float;

  static Bits load_bits(const uint32_t* p) {
    Bits bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return bits;
  }
  static Floats low_halves(Bits pairs) { return (Floats)(pairs << 16); }
  static Floats high_halves(Bits pairs) { return (Floats)(pairs & 0xffff0000u); }
  static Floats flush(Floats x) { return (Floats)((Bits)x & (Bits)(((Bits)x & 0x7f800000u) != 0)); }

  alignas(64) uint32_t rows_[8][kTileHeight][kTileHeight];
};

#endif

}  // namespace dlkernels::DLKERNELS_ISA
