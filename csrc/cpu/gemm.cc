// The product micro-kernel. Rows x Vectors accumulators live in registers for the whole depth; each step along it loads
// one row of B (Vectors registers), broadcasts one element of each row of A and does Rows x Vectors fused
// multiply-adds: 24 for 10 loads with AVX-512. C is touched once, at the end.
#include "gemm.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

template <class T>
using TileFunction = void (*)(const Segment* segments, int64_t segment_count, const T* const* rows, const T* b,
                              int64_t b_row_stride, accumulate_t<T>* c, int64_t c_row_stride, int64_t last_lanes,
                              bool accumulate);

// `Partial`: only `last_lanes` lanes of the last vector exist in b and c. Unrolling is asked for, because the sums stay
// in registers from one segment to the next only where every index of theirs is a constant.
template <class T, int Rows, int Vectors, bool Partial>
void tile(const Segment* segments, int64_t segment_count, const T* const* rows, const T* b_data, int64_t b_row_stride,
          accumulate_t<T>* c, int64_t c_row_stride, int64_t last_lanes, bool accumulate) {
  using Sum = Vec<accumulate_t<T>>;
  constexpr int64_t lanes = Sum::size;
  constexpr int64_t step = Step<T>::depth;
  Sum sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Sum::zero();
  }
  for (const Segment* segment = segments; segment != segments + segment_count; ++segment) {
    const T* a[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) a[r] = rows[r] + segment->a_offset;
    const T* b = b_data + segment->b_offset;
    auto add_step = [&](auto spread) {
      typename Step<T>::Register b_row[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const T* right = b + v * lanes * step;
        b_row[v] = Partial && v == Vectors - 1 ? Step<T>::load_right(right, last_lanes) : Step<T>::load_right(right);
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const typename Step<T>::Register left = spread(a[r]);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[r][v] = Step<T>::add(left, b_row[v], sum[r][v]);
      }
    };
    int64_t k = 0;
    for (; k + step <= segment->depth; k += step) {
      add_step([k, segment](const T* row) { return Step<T>::spread_left(row + k * segment->a_step); });
      b += b_row_stride * step;
    }
    if constexpr (step > 1) {
      if (k < segment->depth) add_step([k](const T* row) { return Step<T>::spread_last(row + k); });
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      accumulate_t<T>* out = c + r * c_row_stride + v * lanes;
      if (Partial && v == Vectors - 1) {
        store(out, accumulate ? load(out, last_lanes) + sum[r][v] : sum[r][v], last_lanes);
      } else {
        store(out, accumulate ? load(out) + sum[r][v] : sum[r][v]);
      }
    }
  }
}

// tile_functions[rows - 1][vectors - 1][partial]
template <class T, int Rows, int Vectors>
constexpr void fill_row(TileFunction<T> (&functions)[kTileVectors][2]) {
  functions[Vectors - 1][0] = tile<T, Rows, Vectors, false>;
  functions[Vectors - 1][1] = tile<T, Rows, Vectors, true>;
  if constexpr (Vectors > 1) fill_row<T, Rows, Vectors - 1>(functions);
}
template <class T>
struct TileTable {
  TileFunction<T> functions[kTileRows][kTileVectors][2];
  constexpr TileTable() : functions() { fill<kTileRows>(); }
  template <int Rows>
  constexpr void fill() {
    fill_row<T, Rows, kTileVectors>(functions[Rows - 1]);
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
};
template <class T>
constexpr TileTable<T> tile_table;

}  // namespace

template <class T>
void multiply_tile(int64_t tile_rows, int64_t columns, const Segment* segments, int64_t segment_count,
                   const T* const* rows, const T* b, int64_t b_row_stride, accumulate_t<T>* c, int64_t c_row_stride,
                   bool accumulate) {
  constexpr int64_t lanes = Vec<accumulate_t<T>>::size;
  const int64_t vectors = ceil_div(columns, lanes);
  const int64_t last_lanes = columns - (vectors - 1) * lanes;
  const bool partial = last_lanes != lanes;
  tile_table<T>.functions[tile_rows - 1][vectors - 1][partial](segments, segment_count, rows, b, b_row_stride, c,
                                                               c_row_stride, last_lanes, accumulate);
}

template <class T>
void multiply_tile(int64_t tile_rows, int64_t columns, int64_t depth, const T* const* rows, const T* b,
                   int64_t b_row_stride, accumulate_t<T>* c, int64_t c_row_stride, bool accumulate) {
  const Segment segment = {depth, 0, 0};
  multiply_tile(tile_rows, columns, &segment, 1, rows, b, b_row_stride, c, c_row_stride, accumulate);
}

template void multiply_tile<float>(int64_t, int64_t, const Segment*, int64_t, const float* const*, const float*,
                                   int64_t, float*, int64_t, bool);
template void multiply_tile<double>(int64_t, int64_t, const Segment*, int64_t, const double* const*, const double*,
                                    int64_t, double*, int64_t, bool);
template void multiply_tile<float>(int64_t, int64_t, int64_t, const float* const*, const float*, int64_t, float*,
                                   int64_t, bool);
template void multiply_tile<double>(int64_t, int64_t, int64_t, const double* const*, const double*, int64_t, double*,
                                    int64_t, bool);
#if defined(DLKERNELS_AVX512_BF16)
template void multiply_tile<bfloat16>(int64_t, int64_t, const Segment*, int64_t, const bfloat16* const*,
                                      const bfloat16*, int64_t, float*, int64_t, bool);
template void multiply_tile<bfloat16>(int64_t, int64_t, int64_t, const bfloat16* const*, const bfloat16*, int64_t,
                                      float*, int64_t, bool);
#endif

}  // namespace dlkernels::DLKERNELS_ISA
