// Winograd's minimal filtering of a 3x3 kernel at stride one, one tile of outputs at a time: two signals become
// polynomials, products of polynomials become products of their values at a few points, and the values become outputs.
// In one dimension, for m outputs from m + 2 inputs d and 3 weights g,
//
//   y = A^T [(G g) . (B^T d)]       m + 2 products in place of 3 m
//
// with . the product point by point. Its adjoints give the gradients with the same three matrices; of the weights, for
// instance, G^T [(B^T d) . (A dy)]. A tile in two dimensions applies each matrix along the columns and then the rows.
//
// m = 2 takes the points 0, 1, -1 and infinity; m = 4 takes 0, 1, -1, 1/2, -2 and infinity, whose rounding errors are
// about half those of the usual 0, 1, -1, 2, -2 (Barabasz et al. 2020).
#pragma once

#include "simd.h"

namespace dlkernels::DLKERNELS_ISA {

// The matrices as functions. Every argument is an array of vectors; results alias nothing.
template <int Outputs>
struct Filter;

template <>
struct Filter<2> {
  static constexpr int points = 4;

  template <class V>
  static DLKERNELS_INLINE void input(const V* d, V* v) {  // B^T
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }
  template <class V>
  static DLKERNELS_INLINE void weight(const V* g, V* u) {  // G
    const V even = V(0.5f) * (g[0] + g[2]), odd = V(0.5f) * g[1];
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  }
  template <class V>
  static DLKERNELS_INLINE void output(const V* m, V* y) {  // A^T
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  }
  template <class V>
  static DLKERNELS_INLINE void output_adjoint(const V* y, V* m) {  // A
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = y[1];
  }
  template <class V>
  static DLKERNELS_INLINE void weight_adjoint(const V* u, V* g) {  // G^T
    const V even = V(0.5f) * (u[1] + u[2]);
    g[0] = u[0] + even;
    g[1] = V(0.5f) * (u[1] - u[2]);
    g[2] = even + u[3];
  }
};

template <>
struct Filter<4> {
  static constexpr int points = 6;

  template <class V>
  static DLKERNELS_INLINE void input(const V* d, V* v) {
    const V even = d[4] - d[2], odd = d[3] - d[1];
    v[0] = fma(V(1.5f), odd, (d[0] - d[2]) + even);
    v[1] = fma(V(1.5f), d[2] + d[3], even + odd);
    v[2] = fma(V(1.5f), d[3] - d[2], even - odd);
    v[3] = fma(V(2.0f), odd, even);
    v[4] = fma(V(-0.5f), odd, even);
    v[5] = fma(V(1.5f), even, (d[5] - d[3]) - odd);
  }
  template <class V>
  static DLKERNELS_INLINE void weight(const V* g, V* u) {
    const V third = V(1.0f / 3), even = third * (g[0] + g[2]);
    u[0] = g[0];
    u[1] = fma(third, g[1], even);
    u[2] = fma(third, g[1], -even);
    u[3] = V(-16.0f / 15) * fma(V(0.25f), g[2], fma(V(0.5f), g[1], g[0]));
    u[4] = V(1.0f / 15) * fma(V(4.0f), g[2], fma(V(-2.0f), g[1], g[0]));
    u[5] = g[2];
  }
  template <class V>
  static DLKERNELS_INLINE void output(const V* m, V* y) {
    const V sum = m[1] + m[2], difference = m[1] - m[2];
    y[0] = (m[0] + sum) + (m[3] + m[4]);
    y[1] = fma(V(-2.0f), m[4], fma(V(0.5f), m[3], difference));
    y[2] = fma(V(4.0f), m[4], fma(V(0.25f), m[3], sum));
    y[3] = fma(V(-8.0f), m[4], fma(V(0.125f), m[3], difference)) + m[5];
  }
  template <class V>
  static DLKERNELS_INLINE void output_adjoint(const V* y, V* m) {
    const V even = y[0] + y[2], odd = y[1] + y[3];
    m[0] = y[0];
    m[1] = even + odd;
    m[2] = even - odd;
    m[3] = fma(V(0.125f), y[3], fma(V(0.25f), y[2], fma(V(0.5f), y[1], y[0])));
    m[4] = fma(V(-8.0f), y[3], fma(V(4.0f), y[2], fma(V(-2.0f), y[1], y[0])));
    m[5] = y[3];
  }
  template <class V>
  static DLKERNELS_INLINE void weight_adjoint(const V* u, V* g) {
    const V third = V(1.0f / 3), half = V(-16.0f / 15) * u[3], two = V(1.0f / 15) * u[4];
    const V even = third * (u[1] - u[2]);
    g[0] = (u[0] + even) + (half + two);
    g[1] = fma(third, u[1] + u[2], fma(V(0.5f), half, V(-2.0f) * two));
    g[2] = (even + u[5]) + fma(V(0.25f), half, V(4.0f) * two);
  }
};

// A tile of Rows x Columns outputs on vectors V. Values are read with load(i, j) and written with store(i, j, value).
template <class V, int Rows, int Columns>
struct TileFilter {
  using Down = Filter<Rows>;
  using Across = Filter<Columns>;
  static constexpr int rows = Rows, columns = Columns;
  static constexpr int points_y = Down::points, points_x = Across::points;
  static constexpr int points = points_y * points_x;

  // B^T d B: points from the (Rows + 2) x (Columns + 2) inputs that the tile's outputs read.
  template <class Load, class Store>
  static DLKERNELS_INLINE void input(Load&& load, Store&& store) {
    apply<points_y, points_x, points_y, points_x>(
        load, store, [](const V* in, V* out) { Down::input(in, out); },
        [](const V* in, V* out) { Across::input(in, out); });
  }
  // G g G^T: points from 3 x 3 weights.
  template <class Load, class Store>
  static DLKERNELS_INLINE void weight(Load&& load, Store&& store) {
    apply<3, 3, points_y, points_x>(
        load, store, [](const V* in, V* out) { Down::weight(in, out); },
        [](const V* in, V* out) { Across::weight(in, out); });
  }
  // A^T m A: outputs from points.
  template <class Load, class Store>
  static DLKERNELS_INLINE void output(Load&& load, Store&& store) {
    apply<points_y, points_x, Rows, Columns>(
        load, store, [](const V* in, V* out) { Down::output(in, out); },
        [](const V* in, V* out) { Across::output(in, out); });
  }
  // A dy A^T: points from the gradient of the outputs.
  template <class Load, class Store>
  static DLKERNELS_INLINE void output_adjoint(Load&& load, Store&& store) {
    apply<Rows, Columns, points_y, points_x>(
        load, store, [](const V* in, V* out) { Down::output_adjoint(in, out); },
        [](const V* in, V* out) { Across::output_adjoint(in, out); });
  }
  // G^T u G: the gradient of 3 x 3 weights from points.
  template <class Load, class Store>
  static DLKERNELS_INLINE void weight_adjoint(Load&& load, Store&& store) {
    apply<points_y, points_x, 3, 3>(
        load, store, [](const V* in, V* out) { Down::weight_adjoint(in, out); },
        [](const V* in, V* out) { Across::weight_adjoint(in, out); });
  }

 private:
  template <int InRows, int InColumns, int OutRows, int OutColumns, class Load, class Store, class DownMatrix,
            class AcrossMatrix>
  static DLKERNELS_INLINE void apply(Load&& load, Store&& store, DownMatrix&& down, AcrossMatrix&& across) {
    V half[OutRows][InColumns];
#pragma GCC unroll 6
    for (int j = 0; j < InColumns; ++j) {
      V in[InRows], out[OutRows];
#pragma GCC unroll 6
      for (int i = 0; i < InRows; ++i) in[i] = load(i, j);
      down(in, out);
#pragma GCC unroll 6
      for (int i = 0; i < OutRows; ++i) half[i][j] = out[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < OutRows; ++i) {
      V out[OutColumns];
      across(half[i], out);
#pragma GCC unroll 6
      for (int j = 0; j < OutColumns; ++j) store(i, j, out[j]);
    }
  }
};

}  // namespace dlkernels::DLKERNELS_ISA
