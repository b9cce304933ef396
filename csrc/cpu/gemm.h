// Matrix products. One register-blocked micro-kernel (gemm.cc) multiplies kTileRows rows of A, each a pointer to
// contiguous elements along the depth, by a panel of B, kTileColumns wide. Everything above it only arranges pointers:
// multiply() loops it over one cache block on one thread; gemm() packs, partitions and runs multiply() on the pool.
// Row pointers make the same kernel serve plain products, convolution taps, LSTM steps and attention blocks.
#pragma once

#include "pack.h"
#include "parallel.h"
#include "simd.h"

namespace dlkernels::DLKERNELS_ISA {

// ---- tile sizes: accumulators + one row of B + one broadcast of A fill the register file --------------------------

#if defined(__AVX512F__)
inline constexpr int64_t kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
inline constexpr int64_t kTileRows = 6, kTileVectors = 2;
#else
inline constexpr int64_t kTileRows = 4, kTileVectors = 2;
#endif
template <class T>
inline constexpr int64_t kTileColumns = kTileVectors * Vec<T>::size;

// Depth of one accumulation run: a panel of B stays in the second-level cache, and sums of at most this many products
// are added to C one after another, which is as accurate as any blocked product.
inline constexpr int64_t kDepthBlock = 256;
inline constexpr int64_t kRowBlock = 96;
inline constexpr int64_t kColumnBlock = 512;

// ---- one cache block ----------------------------------------------------------------------------------------------

// B as panels of kTileColumns columns: element (k, j) of panel p is data[p * panel_stride + k * row_stride + j].
// A packed operand has row_stride = kTileColumns and panel_stride = depth * kTileColumns; a plain row-major matrix is
// already this with row_stride = its leading dimension and panel_stride = kTileColumns.
template <class T>
struct Panels {
  const T* data;
  int64_t row_stride;
  int64_t panel_stride;
};

template <class T>
inline Panels<T> packed_panels(const T* data, int64_t depth) {
  return {data, kTileColumns<T>, depth * kTileColumns<T>};
}
template <class T>
inline Panels<T> plain_panels(const T* data, int64_t row_stride) {
  return {data, row_stride, kTileColumns<T>};
}

// A stretch of the depth: `depth` elements from rows[i] + a_offset, against rows of B from b + b_offset.
struct Segment {
  int64_t depth, a_offset, b_offset;
};

// One tile: c[i][j] (+)= sum over the segments, and over k within each, of rows[i][a_offset + k] * b[b_offset][k][j],
// one run of sums in that order, for `tile_rows` <= kTileRows rows and `columns` <= kTileColumns columns. Reads no
// element of b beyond `columns`.
template <class T>
void multiply_tile(int64_t tile_rows, int64_t columns, const Segment* segments, int64_t segment_count,
                   const T* const* rows, const T* b, int64_t b_row_stride, T* c, int64_t c_row_stride, bool accumulate);

// The same for one segment: c[i][j] (+)= sum over k of rows[i][k] * b[k][j].
template <class T>
void multiply_tile(int64_t tile_rows, int64_t columns, int64_t depth, const T* const* rows, const T* b,
                   int64_t b_row_stride, T* c, int64_t c_row_stride, bool accumulate);

// c[i][j] (+)= sum over k of row(i)[k] * b(k, j) on the calling thread; row(i) returns the pointer to row i of A.
template <class T, class Row>
inline void multiply_rows(int64_t rows, int64_t columns, int64_t depth, Row&& row, Panels<T> b, T* c,
                          int64_t c_row_stride, bool accumulate) {
  for (int64_t j = 0; j < columns; j += kTileColumns<T>) {
    const T* panel = b.data + j / kTileColumns<T> * b.panel_stride;
    const int64_t tile_columns = min_of(kTileColumns<T>, columns - j);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t tile_rows = min_of(kTileRows, rows - i);
      const T* pointers[kTileRows];
      for (int64_t r = 0; r < tile_rows; ++r) pointers[r] = row(i + r);
      multiply_tile<T>(tile_rows, tile_columns, depth, pointers, panel, b.row_stride, c + i * c_row_stride + j,
                       c_row_stride, accumulate);
    }
  }
}

// The same for a row-major A.
template <class T>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row_stride, Panels<T> b, T* c,
                     int64_t c_row_stride, bool accumulate) {
  multiply_rows<T>(
      rows, columns, depth, [=](int64_t i) { return a + i * a_row_stride; }, b, c, c_row_stride, accumulate);
}

// ---- whole products -----------------------------------------------------------------------------------------------

namespace detail {

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

// All of B as packed panels, one run of panels per depth block.
template <class T, class Scalar>
inline void pack_all(Matrix<Scalar> b, int64_t depth, int64_t columns, T* packed) {
  const int64_t width = kTileColumns<T>;
  const int64_t panels = ceil_div(columns, width);
  parallel_for(ceil_div(depth, kDepthBlock) * panels, 4, [&](int64_t task) {
    const int64_t k = task / panels * kDepthBlock;
    const int64_t j = task % panels * width;
    const int64_t block_depth = min_of(kDepthBlock, depth - k);
    pack_rows(b.at(k, j), block_depth, min_of(width, columns - j), packed + k * panels * width + j * block_depth,
              width);
  });
}

// The part of one output block that depth [k_begin, k_end) contributes; k_begin is a multiple of kDepthBlock.
template <class T, class ScalarA>
inline void multiply_block(Matrix<ScalarA> a, const T* packed_b, int64_t padded_columns, int64_t i, int64_t rows,
                           int64_t j, int64_t columns, int64_t depth, int64_t k_begin, int64_t k_end, T* a_buffer, T* c,
                           int64_t c_row_stride) {
  for (int64_t k = k_begin; k < k_end; k += kDepthBlock) {
    const int64_t block_depth = min_of(kDepthBlock, depth - k);
    int64_t a_row_stride;
    const T* a_rows = rows_of<T>(a.at(i, k), rows, block_depth, a_buffer, &a_row_stride);
    const T* panel = packed_b + k * padded_columns + j * block_depth;
    multiply<T>(rows, columns, block_depth, a_rows, a_row_stride, packed_panels(panel, block_depth), c, c_row_stride,
                k > k_begin);
  }
}

}  // namespace detail

// C = A B for A [M, K] and B [K, N] of any strides and element types, computed in T. finish(i, j, count, values) takes
// the finished values C[i][j .. j + count), once each, from any thread. The partition follows from the shape alone.
// Products with few output blocks and great depth are split along the depth, the parts added in order.
template <class T, class ScalarA, class ScalarB, class Finish>
inline void gemm(int64_t M, int64_t N, int64_t K, Matrix<ScalarA> a, Matrix<ScalarB> b, Finish&& finish) {
  if (M <= 0 || N <= 0) return;
  const int64_t width = kTileColumns<T>;
  const int64_t padded_columns = round_up(N, width);
  Scratch<T> packed_b(padded_columns * K);
  detail::pack_all<T>(b, K, N, packed_b.data());

  const int64_t row_blocks = ceil_div(M, kRowBlock), column_blocks = ceil_div(N, kColumnBlock);
  const int64_t blocks = row_blocks * column_blocks;
  const int64_t wanted_parts = min_of(ceil_div(16, blocks), K / (4 * kDepthBlock));
  const int64_t part_depth = round_up(ceil_div(max_of(K, 1), max_of(wanted_parts, 1)), kDepthBlock);
  const int64_t parts = max_of(ceil_div(K, part_depth), 1);

  const int64_t block_rows = min_of(M, kRowBlock), block_columns = min_of(padded_columns, kColumnBlock);
  const int64_t block_size = block_rows * block_columns;
  Scratch<T> partial(parts > 1 ? parts * blocks * block_size : 0);
  auto finish_block = [&](int64_t i, int64_t rows, int64_t j, int64_t columns, const T* c) {
    for (int64_t r = 0; r < rows; ++r) finish(i + r, j, columns, c + r * block_columns);
  };
  const double work = 2.0 * M * N * K;
  const int64_t grain = work < 2e5 ? blocks * parts : 1;  // small products stay on one thread
  parallel_for(blocks * parts, grain, [&](int64_t task) {
    const int64_t part = task / blocks, block = task % blocks;
    const int64_t i = block / column_blocks * kRowBlock, j = block % column_blocks * kColumnBlock;
    const int64_t rows = min_of(kRowBlock, M - i), columns = min_of(kColumnBlock, N - j);
    Scratch<T> buffer(block_rows * kDepthBlock + (parts > 1 ? 0 : block_size));
    T* c = parts > 1 ? partial.data() + task * block_size : buffer.data() + block_rows * kDepthBlock;
    if (K <= 0) {
      for (int64_t e = 0; e < block_size; ++e) c[e] = 0;
    }
    detail::multiply_block<T>(a, packed_b.data(), padded_columns, i, rows, j, columns, K, part * part_depth,
                              min_of(K, (part + 1) * part_depth), buffer.data(), c, block_columns);
    if (parts == 1) finish_block(i, rows, j, columns, c);
  });
  if (parts == 1) return;
  parallel_for(blocks, 1, [&](int64_t block) {
    const int64_t i = block / column_blocks * kRowBlock, j = block % column_blocks * kColumnBlock;
    const int64_t rows = min_of(kRowBlock, M - i), columns = min_of(kColumnBlock, N - j);
    T* sum = partial.data() + block * block_size;
    for (int64_t part = 1; part < parts; ++part) {
      const T* addend = partial.data() + (part * blocks + block) * block_size;
      for (int64_t r = 0; r < rows; ++r) add_to(sum + r * block_columns, addend + r * block_columns, columns);
    }
    finish_block(i, rows, j, columns, sum);
  });
}

}  // namespace dlkernels::DLKERNELS_ISA
