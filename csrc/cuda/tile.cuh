// Tiles of a matrix in shared memory, copied there beside the computation and read as fragments of the matrix units.
//
// A tile has kRows rows, 128 bytes deep, and lies either along the depth (a row is a line) or along the rows (a line is
// one position of the depth, as in a transposed matrix). A line consists of chunks of 16 bytes, and chunks of different
// lines change places, so that eight lanes that read from eight lines find eight different banks.
#pragma once

#include "cuda/mma.cuh"

namespace dlkernels::DLKERNELS_ISA {

template <class Scalar>
inline constexpr int kTileDepth = 128 / static_cast<int>(sizeof(Scalar));

template <class Scalar_, int kRows, bool kAlongDepth>
struct Tile {
  using Scalar = Scalar_;
  static constexpr bool along_depth = kAlongDepth;
  static constexpr int rows = kRows, depth = kTileDepth<Scalar>, size = kRows * depth;
  static constexpr int chunk_size = Pack<Scalar>::size;
  static constexpr int lines = kAlongDepth ? kRows : depth, line_chunks = size / lines / chunk_size;
  static constexpr int units = depth / kUnitDepth<Scalar>;

  __device__ __forceinline__ static int chunk_offset(int line, int chunk) {
    constexpr bool halves_lines = sizeof(Scalar) == 8 || (sizeof(Scalar) == 4 && !kAlongDepth);
    const int place = chunk ^ (halves_lines ? line % 4 * 2 : line % 8);
    return (line * line_chunks + place) * chunk_size;
  }
  // Of the number at (row, k).
  __device__ __forceinline__ static int offset(int row, int k) {
    const int line = kAlongDepth ? row : k, along = kAlongDepth ? k : row;
    return chunk_offset(line, along / chunk_size) + along % chunk_size;
  }
};

// ---- copies of 16 bytes that run beside the thread -----------------------------------------------------------------

// `count` numbers from global memory, zeros after them. The address is a multiple of 16 bytes, and any where there are
// none.
template <class Scalar>
__device__ __forceinline__ void copy_chunk(Scalar* shared, const Scalar* global, int count) {
  const int bytes = count * static_cast<int>(sizeof(Scalar));
#if defined(DLKERNELS_SIMT)
  ::simt::copy_later(shared, global, bytes);
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(bytes)
      : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#if defined(DLKERNELS_SIMT)
  ::simt::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread's copies but the last kGroups of them.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
#if defined(DLKERNELS_SIMT)
  ::simt::wait_for_copies(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// ---- fragments -----------------------------------------------------------------------------------------------------

// Four matrices of eight rows of 16 bytes: lane 8 m + r gives the address of row r of matrix m.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
#if defined(DLKERNELS_SIMT)
  ::simt::load_matrices(words, row, kTransposed, Where::current());
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// The words of sixteen rows and one group of depth, in quarters of eight rows and four words. kRowsFirst: quarters 0
// and 1 are the two halves of the rows; otherwise those of the depth.
template <class Tile, bool kRowsFirst>
__device__ __forceinline__ void load_quarters(const typename Tile::Scalar* tile, int first_row, int group,
                                              Word<typename Tile::Scalar> (&words)[4]) {
  using Scalar = typename Tile::Scalar;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if constexpr (sizeof(Scalar) == 2 || (sizeof(Scalar) == 4 && Tile::along_depth)) {
    const int quarter = lane / 8, upper_row = kRowsFirst ? quarter % 2 : quarter / 2,
              upper_depth = kRowsFirst ? quarter / 2 : quarter % 2;
    constexpr int half_depth = kGroupDepth<Scalar> / 2;
    const int row = first_row + upper_row * 8, k = group * kGroupDepth<Scalar> + upper_depth * half_depth;
    uint32_t bits[4];
    if constexpr (Tile::along_depth) {
      load_matrices<false>(bits, tile + Tile::offset(row + lane % 8, k));
    } else {
      load_matrices<true>(bits, tile + Tile::offset(row, k + lane % 8));
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) words[q] = bits_as<Word<Scalar>>(bits[q]);
  } else {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int upper_row = kRowsFirst ? q % 2 : q / 2, upper_depth = kRowsFirst ? q / 2 : q % 2;
      words[q] = tile[Tile::offset(first_row + upper_row * 8 + lane / 4,
                                   group * kGroupDepth<Scalar> + upper_depth * 4 + lane % 4)];
    }
  }
}

template <class Tile>
__device__ __forceinline__ LeftFragment<typename Tile::Scalar> load_left(const typename Tile::Scalar* tile,
                                                                         int first_row, int unit) {
  using Scalar = typename Tile::Scalar;
  LeftFragment<Scalar> fragment;
#pragma unroll
  for (int g = 0; g < kUnitGroups<Scalar>; ++g) {
    Word<Scalar> words[4];
    load_quarters<Tile, true>(tile, first_row, unit * kUnitGroups<Scalar> + g, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment.words[g * 4 + i] = words[i];
  }
  return fragment;
}

// Two fragments, of rows from first_row and of rows from first_row + 8.
template <class Tile>
__device__ __forceinline__ void load_right(const typename Tile::Scalar* tile, int first_row, int unit,
                                           RightFragment<typename Tile::Scalar> (&fragments)[2]) {
  using Scalar = typename Tile::Scalar;
#pragma unroll
  for (int g = 0; g < kUnitGroups<Scalar>; ++g) {
    Word<Scalar> words[4];
    load_quarters<Tile, false>(tile, first_row, unit * kUnitGroups<Scalar> + g, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) fragments[i / 2].words[g * 2 + i % 2] = words[i];
  }
}

}  // namespace dlkernels::DLKERNELS_ISA
