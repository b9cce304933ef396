// Matrix products. One register-blocked micro-kernel (gemm.cc) multiplies kTileRows rows of A, each a pointer to
// contiguous elements along the depth, by a panel of B, kTileColumns wide. Everything above it only arranges pointers:
// multiply() loops it over one cache block on one thread; gemm() packs, partitions and runs multiply() on the pool.
// Row pointers make the same kernel serve plain products, convolution taps, LSTM steps and attention blocks.
#pragma once

#include "pack.h"
#include "pairs.h"
#include "parallel.h"
#include "simd.h"
#include "split.h"

namespace dlkernels::DLKERNELS_ISA {

// ---- tile sizes: accumulators + one row of B + one broadcast of A fill the register file --------------------------

#if defined(DLKERNELS_AVX512)
inline constexpr int64_t kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
inline constexpr int64_t kTileRows = 6, kTileVectors = 2;
#else
inline constexpr int64_t kTileRows = 4, kTileVectors = 2;
#endif
template <class T>
inline constexpr int64_t kTileColumns = kTileVectors * Vec<accumulate_t<T>>::size;

// Depth of one accumulation run: a panel of B stays in the second-level cache, and sums of at most this many products
// are added to C one after another, which is as accurate as any blocked product.
inline constexpr int64_t kDepthBlock = 256;

// ---- one cache block ----------------------------------------------------------------------------------------------

// B as panels of kTileColumns columns: element (k, j) of panel p is data[p * panel_stride + k * row_stride + j].
// A packed operand has row_stride = kTileColumns and panel_stride = depth * kTileColumns; a plain row-major matrix is
// already this with row_stride = its leading dimension and panel_stride = kTileColumns. A panel of bfloat16 is packed
// as pairs (pairs.h): an even k is at the same place, and panel_stride counts the depth rounded up.
template <class T>
struct Panels {
  const T* data;
  int64_t row_stride;
  int64_t panel_stride;
};

template <class T>
inline Panels<T> packed_panels(const T* data, int64_t depth) {
  return {data, kTileColumns<T>, round_up(depth, Step<T>::depth) * kTileColumns<T>};
}
template <class T>
inline Panels<T> plain_panels(const T* data, int64_t row_stride) {
  return {data, row_stride, kTileColumns<T>};
}

// A stretch of the depth: `depth` elements, a_step apart, from rows[i] + a_offset, against rows of B from b + b_offset.
// Pairs lie side by side: their a_step is one.
struct Segment {
  int64_t depth, a_offset, b_offset;
  int64_t a_step = 1;
};

// One tile: c[i][j] (+)= sum over the segments, and over k within each, of rows[i][a_offset + k * a_step] *
// b[b_offset][k][j], one run of sums in that order, for `tile_rows` <= kTileRows rows and `columns` <= kTileColumns
// columns. Reads no element of b beyond `columns`.
template <class T>
void multiply_tile(int64_t tile_rows, int64_t columns, const Segment* segments, int64_t segment_count,
                   const T* const* rows, const T* b, int64_t b_row_stride, accumulate_t<T>* c, int64_t c_row_stride,
                   bool accumulate);

// The same for one segment: c[i][j] (+)= sum over k of rows[i][k] * b[k][j].
template <class T>
void multiply_tile(int64_t tile_rows, int64_t columns, int64_t depth, const T* const* rows, const T* b,
                   int64_t b_row_stride, accumulate_t<T>* c, int64_t c_row_stride, bool accumulate);

// c[i][j] (+)= sum over k of row(i)[k] * b(k, j) on the calling thread; row(i) returns the pointer to row i of A.
template <class T, class Row>
inline void multiply_rows(int64_t rows, int64_t columns, int64_t depth, Row&& row, Panels<T> b, accumulate_t<T>* c,
                          int64_t c_row_stride, bool accumulate) {
  const int64_t tiles = ceil_div(rows, kTileRows);  // of equal height: a low one reads B for little
  for (int64_t j = 0; j < columns; j += kTileColumns<T>) {
    const T* panel = b.data + j / kTileColumns<T> * b.panel_stride;
    const int64_t tile_columns = min_of(kTileColumns<T>, columns - j);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = rows * t / tiles, tile_rows = rows * (t + 1) / tiles - i;
      const T* pointers[kTileRows];
      for (int64_t r = 0; r < tile_rows; ++r) pointers[r] = row(i + r);
      multiply_tile<T>(tile_rows, tile_columns, depth, pointers, panel, b.row_stride, c + i * c_row_stride + j,
                       c_row_stride, accumulate);
    }
  }
}

// The same for a row-major A.
template <class T>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row_stride, Panels<T> b,
                     accumulate_t<T>* c, int64_t c_row_stride, bool accumulate) {
  multiply_rows<T>(
      rows, columns, depth, [=](int64_t i) { return a + i * a_row_stride; }, b, c, c_row_stride, accumulate);
}

// ---- whole products -----------------------------------------------------------------------------------------------

namespace detail {

// A block of C and a part of the depth.
struct ProductBlock {
  int64_t i, rows, j, columns, k_begin, k_end;
};

// Row blocks of A arrive here in the type of the products, contiguous along the depth: in place when they already are.
template <class T, class Scalar>
inline const T* rows_of(Matrix<Scalar> a, int64_t rows, int64_t depth, T* buffer, int64_t* row_stride) {
  if constexpr (sizeof(T) == sizeof(Scalar)) {
    if (a.column_stride == 1) {
      *row_stride = a.row_stride;
      return a.data;
    }
  }
  pack_rows(a, rows, depth, buffer, depth);
  *row_stride = depth;
  return buffer;
}

// One output block's part of the depth, [k_begin, k_end), by fused multiply-adds; k_begin is a multiple of kDepthBlock.
// B is packed here and not once for all: what is packed is then read from the second-level cache and never written to
// memory, and a block has so many rows that packing is little of its work.
template <class T, class ScalarA, class ScalarB>
inline void multiply_block(Matrix<ScalarA> a, Matrix<ScalarB> b, const ProductBlock& block, accumulate_t<T>* c,
                           int64_t c_row_stride) {
  constexpr int64_t width = kTileColumns<T>;
  const Scratch<T> left(block.rows, kDepthBlock), right(round_up(block.columns, width), kDepthBlock);
  for (int64_t k = block.k_begin; k < block.k_end; k += kDepthBlock) {
    const int64_t depth = min_of(kDepthBlock, block.k_end - k);
    int64_t a_row_stride;
    const T* a_rows = rows_of<T>(a.at(block.i, k), block.rows, depth, left.data(), &a_row_stride);
    const Panels<T> panels = packed_panels<T>(right.data(), depth);
    for (int64_t j = 0; j < block.columns; j += width) {
      pack_panel(b.at(k, block.j + j), depth, min_of(width, block.columns - j),
                 right.data() + j / width * panels.panel_stride, width);
    }
    multiply<T>(block.rows, block.columns, depth, a_rows, a_row_stride, panels, c, c_row_stride, k > block.k_begin);
  }
}

// Rows and columns of a block of C, and the depth of the parts that its sums are taken in.
struct BlockShape {
  int64_t rows, columns, part_depth;
  int64_t blocks(int64_t M, int64_t N) const { return ceil_div(M, rows) * ceil_div(N, columns); }
};
inline int64_t part_depth_of(int64_t K, int64_t parts) {
  return round_up(ceil_div(max_of(K, 1), max_of(parts, 1)), kDepthBlock);
}

// Of fused multiply-adds: rows of about equal number in every block, and no fewer blocks than keep some threads busy;
// few output blocks of great depth are split along the depth.
template <class T>
inline BlockShape block_shape(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t most_rows = 32 * kTileRows, most_columns = 256, wanted_blocks = 16;
  const int64_t rows = round_up(ceil_div(M, ceil_div(M, most_rows)), kTileRows);
  int64_t columns = max_of(most_columns, kTileColumns<T>);
  while (columns > kTileColumns<T> && ceil_div(M, rows) * ceil_div(N, columns) < wanted_blocks) columns /= 2;
  const BlockShape shape = {rows, columns, 0};
  const int64_t parts = min_of(ceil_div(wanted_blocks, shape.blocks(M, N)), K / (4 * kDepthBlock));
  return {rows, columns, part_depth_of(K, parts)};
}

// Calls multiply_block(block, c, c_row_stride) for every block of C and every part of the depth, and finish for the
// sums of the parts, which are added in order. The partition follows from the shape alone.
template <class T, class MultiplyBlock, class Finish>
inline void run_product(int64_t M, int64_t N, int64_t K, BlockShape shape, MultiplyBlock&& multiply_block,
                        Finish&& finish) {
  const int64_t column_blocks = ceil_div(N, shape.columns), blocks = shape.blocks(M, N);
  const int64_t part_depth = shape.part_depth, parts = max_of(ceil_div(K, part_depth), 1);

  const int64_t block_rows = min_of(M, shape.rows);
  const int64_t block_columns = min_of(round_up(N, kTileColumns<T>), shape.columns);
  const int64_t block_size = block_rows * block_columns;
  Scratch<T> partial(parts > 1 ? parts : 0, blocks, block_size);
  auto block_at = [&](int64_t index, int64_t part) -> ProductBlock {
    const int64_t i = index / column_blocks * shape.rows, j = index % column_blocks * shape.columns;
    return {i,
            min_of(shape.rows, M - i),
            j,
            min_of(shape.columns, N - j),
            part * part_depth,
            min_of(K, (part + 1) * part_depth)};
  };
  auto finish_block = [&](const ProductBlock& block, const T* c) {
    for (int64_t r = 0; r < block.rows; ++r) finish(block.i + r, block.j, block.columns, c + r * block_columns);
  };
  const double work = 2.0 * M * N * K;
  const int64_t grain = work < 2e5 ? blocks * parts : 1;  // small products stay on one thread
  parallel_for(blocks * parts, grain, [&](int64_t task) {
    const ProductBlock block = block_at(task % blocks, task / blocks);
    const Scratch<T> sums(parts > 1 ? 0 : block_size);
    T* c = parts > 1 ? partial.data() + task * block_size : sums.data();
    if (K <= 0) fill(c, T(0), block_size);
    multiply_block(block, c, block_columns);
    if (parts == 1) finish_block(block, c);
  });
  if (parts == 1) return;
  parallel_for(blocks, 1, [&](int64_t index) {
    const ProductBlock block = block_at(index, 0);
    T* sum = partial.data() + index * block_size;
    for (int64_t part = 1; part < parts; ++part) {
      const T* addend = partial.data() + (part * blocks + index) * block_size;
      for (int64_t r = 0; r < block.rows; ++r)
        add_to(sum + r * block_columns, addend + r * block_columns, block.columns);
    }
    finish_block(block, sum);
  });
}

// ---- on matrix units (split.h) -----------------------------------------------------------------------------------

// Whether the rows of a left operand are units as they lie: bfloat16, line by line.
template <int Planes, class Scalar>
inline bool has_lines(Matrix<Scalar> a) {
  constexpr int64_t line = kTileDepth * static_cast<int64_t>(sizeof(bfloat16));
  const int64_t row_bytes = a.row_stride * static_cast<int64_t>(sizeof(Scalar));
  return Planes == 1 && std::is_same_v<Scalar, bfloat16> && a.column_stride == 1 && row_bytes % line == 0 &&
         reinterpret_cast<uintptr_t>(a.data) % line == 0;
}

// Units of a run whose right panel alone is read from the first-level cache.
template <int Planes>
inline constexpr int64_t kPanelUnits = Planes == 1 ? 16 : kRunUnits<Planes>;

// One output block's part of the depth on tiles, a run of sums at a time: its rows are split, or, bfloat16 whose lines
// are those of memory, read in place; then every panel of 32 columns is split into the first-level cache and multiplied
// with all rows.
template <int Planes, class ScalarA, class ScalarB>
inline void multiply_block_on_tiles(Matrix<ScalarA> a, Matrix<ScalarB> b, const ProductBlock& block, float* c,
                                    int64_t c_row_stride) {
  using Left = LeftUnit<Planes>;
  const int64_t units = ceil_div(block.k_end - block.k_begin, kTileDepth), runs = ceil_div(units, kPanelUnits<Planes>);
  const int64_t rows_in_place =
      block.k_end % kTileDepth == 0 && has_lines<Planes>(a) ? block.rows / kSplitRows * kSplitRows : 0;
  const Scratch<Left> left(round_up(block.rows - rows_in_place, kSplitRows), kPanelUnits<Planes>);
  const Scratch<RightUnit<Planes>> right(kPanelUnits<Planes>);
  Tiles tiles;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t unit = units * run / runs, run_units = units * (run + 1) / runs - unit;
    const int64_t k = block.k_begin + unit * kTileDepth, depth = min_of(run_units * kTileDepth, block.k_end - k);
    const UnitSegment segment = {run_units, 0, 0};
    bool split =
        split_left(a.at(block.i + rows_in_place, k), block.rows - rows_in_place, depth, left.data(), run_units);
    for (int64_t j = 0; j < block.columns && split; j += kSplitColumns) {
      const int64_t columns = min_of(kSplitColumns, block.columns - j);
      split = split_right(b.at(k, block.j + j), depth, columns, right.data());
      for (int64_t i = 0; i < block.rows; i += kSplitRows) {
        const int64_t rows = min_of(kSplitRows, block.rows - i);
        const LeftRows<Planes> left_rows =
            i < rows_in_place
                ? LeftRows<Planes>{reinterpret_cast<const Left*>(a.at(block.i + i, k).data), a.row_stride / kTileDepth}
                : LeftRows<Planes>{left.data() + (i - rows_in_place) * run_units, run_units};
        multiply_split(tiles, rows, columns, left_rows, right.data(), &segment, 1, c + i * c_row_stride + j,
                       c_row_stride, run > 0);
      }
    }
    // Infinities, NaN and the largest numbers are rare: the block begins anew.
    if (!split) return multiply_block<float>(a, b, block, c, c_row_stride);
  }
}

// What it costs a core to make units of an element of an operand, the right one transposed, and to multiply two
// elements, in cycles. How operands lie is no part of it: the order of sums follows from the shape alone.
template <int Planes>
inline constexpr double kLeftCost = Planes == 1 ? 0.5 : 1;
template <int Planes>
inline constexpr double kRightCost = Planes == 1 ? 1.1 : 1.5;
template <int Planes>
inline constexpr double kMultiplyCost = Planes == 1   ? 1.0 / 220
                                        : Planes == 2 ? 1.0 / 120
                                                      : 1.0 / 80;

// Blocks on tiles, about equal: of the shapes whose operands and sums fit the second-level cache, the one that costs
// least.
template <int Planes>
inline BlockShape tile_block_shape(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t most_rows = Planes == 1 ? 1024 : 416, most_columns = 512, most_sums = 128 << 10, wanted_tasks = 8,
                    step = 64;
  constexpr double sum_cost = 4;
  BlockShape best = {};
  double best_cost = 0;
  for (int64_t most = most_rows; most > step; most -= step) {
    const int64_t rows = round_up(ceil_div(M, ceil_div(M, most)), kSplitRows);
    for (int64_t width = most_columns; width > step; width -= step) {
      const int64_t columns = round_up(ceil_div(N, ceil_div(N, width)), kSplitColumns);
      if (rows * columns > most_sums) continue;
      BlockShape shape = {rows, columns, 0};
      const int64_t blocks = shape.blocks(M, N);
      shape.part_depth = part_depth_of(K, min_of(ceil_div(wanted_tasks, blocks), K / kDepthBlock));
      const int64_t parts = max_of(1, ceil_div(K, shape.part_depth)), tasks = blocks * parts;
      const double splits =
          1.0 * K * (kLeftCost<Planes> * M * ceil_div(N, columns) + kRightCost<Planes> * N * ceil_div(M, rows));
      const double sums = parts > 1 ? sum_cost * parts * M * N : 0;
      // Threads that come in pairs or fours wait for the last of them.
      const double rounds = 1.0 * max_of(wanted_tasks, round_up(tasks, 4)) / tasks;
      const double cost = (kMultiplyCost<Planes> * M * N * K + splits) * rounds + sums;
      if (best.rows == 0 || cost < best_cost) best = shape, best_cost = cost;
    }
  }
  return best;
}

template <int Planes, class ScalarA, class ScalarB, class Finish>
inline void gemm_on_tiles(int64_t M, int64_t N, int64_t K, Matrix<ScalarA> a, Matrix<ScalarB> b, Finish&& finish) {
  auto multiply_block = [&](const ProductBlock& block, float* c, int64_t c_row_stride) {
    multiply_block_on_tiles<Planes>(a, b, block, c, c_row_stride);
  };
  run_product<float>(M, N, K, tile_block_shape<Planes>(M, N, K), multiply_block, finish);
}

// Below these sizes most of a tile would be padding.
inline constexpr int64_t kFewestTileRows = 8, kFewestTileColumns = 8, kFewestTileDepth = 16;

template <class ScalarA, class ScalarB, class Finish>
inline bool try_tiles(int64_t M, int64_t N, int64_t K, Matrix<ScalarA> a, Matrix<ScalarB> b, Finish&& finish) {
  if (M < kFewestTileRows || N < kFewestTileColumns || K < kFewestTileDepth) return false;
  switch (max_of(planes_of<ScalarA>(), planes_of<ScalarB>())) {
    case 1:
      gemm_on_tiles<1>(M, N, K, a, b, finish);
      break;
    case 2:
      gemm_on_tiles<2>(M, N, K, a, b, finish);
      break;
    default:
      gemm_on_tiles<3>(M, N, K, a, b, finish);
  }
  return true;
}

}  // namespace detail

// C = A B for A [M, K] and B [K, N] of any strides and element types, computed in T. finish(i, j, count, values) takes
// the finished values C[i][j .. j + count), once each, from any thread.
template <class T, class ScalarA, class ScalarB, class Finish>
inline void gemm(int64_t M, int64_t N, int64_t K, Matrix<ScalarA> a, Matrix<ScalarB> b, Finish&& finish) {
  if (M <= 0 || N <= 0) return;
  if constexpr (kHasTiles && std::is_same_v<T, float>) {
    if (detail::try_tiles(M, N, K, a, b, finish)) return;
  }
  constexpr bool halves = std::is_same_v<ScalarA, bfloat16> && std::is_same_v<ScalarB, bfloat16>;
  using Factor = std::conditional_t<halves && std::is_same_v<T, float>, factor_t<bfloat16>, T>;
  auto multiply_block = [&](const detail::ProductBlock& block, T* c, int64_t c_row_stride) {
    detail::multiply_block<Factor>(a, b, block, c, c_row_stride);
  };
  detail::run_product<T>(M, N, K, detail::block_shape<T>(M, N, K), multiply_block, finish);
}

}  // namespace dlkernels::DLKERNELS_ISA
