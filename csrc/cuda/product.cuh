// Products of two matrices that are nowhere in memory as such: product[i][j] = sum over k of left(i, k) right(j, k).
// An operand is a source, which says where its elements are (rows of a matrix, patches of an image); a sink takes the
// elements of the product.
//
// A block computes one tile of the product, a warp a part of it in registers. Tiles of the operands go through a ring
// of `stages` places in shared memory: while the matrix units work on one, the next are on their way. Few tiles and
// much depth: the depth is cut into slices, whose sums are kept and added in their order.
#pragma once

#include "cuda/tile.cuh"

namespace dlkernels::DLKERNELS_ISA {

// ---- sources -------------------------------------------------------------------------------------------------------
// A source has
//   Scalar, along_depth      the type, and whether a line is a row (or else a position of the depth)
//   Line line(int64_t)       what is known of a line, Along along(int64_t) what is known of a place in all lines
//   chunk(Line, Along)       a pointer to 16 bytes, and how many numbers from there are in the matrix
// of_group(g) is the source of one of several products.

template <class Scalar>
struct Chunk {
  const Scalar* data;
  int count;
};

// A dense matrix of lines, which begin at multiples of 16 bytes.
template <class Scalar_, bool kAlongDepth>
struct MatrixLines {
  using Scalar = Scalar_;
  static constexpr bool along_depth = kAlongDepth;
  const Scalar* data;
  int64_t lines, length, stride;  // stride: numbers from line to line
  int64_t group_stride = 0;       // numbers from one group's matrix to the next

  __device__ __forceinline__ MatrixLines of_group(int64_t group) const {
    return {data + group * group_stride, lines, length, stride};
  }

  struct Line {
    const Scalar* data;  // null where there is none
  };
  struct Along {
    int64_t offset;
    int count;
  };
  __device__ __forceinline__ Line line(int64_t index) const {
    return {index < lines ? data + index * stride : nullptr};
  }
  __device__ __forceinline__ Along along(int64_t place) const {
    const int64_t left = length - place;
    return {left > 0 ? place : 0, static_cast<int>(left < 0                    ? 0
                                                   : left < Pack<Scalar>::size ? left
                                                                               : Pack<Scalar>::size)};
  }
  __device__ __forceinline__ Chunk<Scalar> chunk(const Line& line, const Along& along) const {
    return {line.data + along.offset, line.data == nullptr ? 0 : along.count};
  }
};

// ---- a sink: rows of a matrix, and a number added to every column ---------------------------------------------------

template <class Out, class Bias = Out>
struct StoreRows {
  Out* out;
  int64_t stride;
  const Bias* bias = nullptr;  // of a column

  template <class T>
  __device__ __forceinline__ void operator()(int64_t, int64_t row, int64_t column, const T (&values)[2],
                                             int count) const {
    Out results[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool has_bias = bias != nullptr && i < count;
      results[i] = narrow<Out>(has_bias ? values[i] + widen(bias[column + i]) : values[i]);
    }
    store_pair(out + row * stride + column, results, count);
  }
};

// ---- loading a tile of a source ------------------------------------------------------------------------------------

// What a thread knows of its lines, or of its place in them, stays the same from tile to tile along the depth.
template <class Source, int kRows, int kThreads>
class Loader {
 public:
  using Scalar = typename Source::Scalar;
  using Place = Tile<Scalar, kRows, Source::along_depth>;

  __device__ Loader(const Source& source, int64_t first_row) : source_(source) {
    if constexpr (Source::along_depth) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) fixed_[i] = source.line(first_row + line_of(i));
    } else {
      fixed_[0] = source.along(first_row + chunk_of_thread() * Place::chunk_size);
    }
  }

  // Begins to copy the tile at depth k; the caller commits.
  __device__ __forceinline__ void load(int64_t k, Scalar* tile) const {
    const auto along = [&] {
      if constexpr (Source::along_depth)
        return source_.along(k + chunk_of_thread() * Place::chunk_size);
      else
        return fixed_[0];
    }();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto line = [&] {
        if constexpr (Source::along_depth)
          return fixed_[i];
        else
          return source_.line(k + line_of(i));
      }();
      const Chunk<Scalar> chunk = source_.chunk(line, along);
      copy_chunk(tile + Place::chunk_offset(line_of(i), chunk_of_thread()), chunk.data, chunk.count);
    }
  }

 private:
  static constexpr int kCount = Place::lines * Place::line_chunks / kThreads;
  static_assert(kThreads % Place::line_chunks == 0 && kCount * kThreads == Place::lines * Place::line_chunks);
  __device__ __forceinline__ static int chunk_of_thread() { return static_cast<int>(threadIdx.x) % Place::line_chunks; }
  __device__ __forceinline__ static int line_of(int i) {
    return static_cast<int>(threadIdx.x) / Place::line_chunks + i * (kThreads / Place::line_chunks);
  }

  const Source& source_;
  std::conditional_t<Source::along_depth, decltype(std::declval<Source>().line(0)),
                     decltype(std::declval<Source>().along(0))>
      fixed_[Source::along_depth ? kCount : 1];
};

// ---- the kernel ----------------------------------------------------------------------------------------------------

// kRows x kColumns of the product in a block, kWarpRows x kWarpColumns in a warp.
template <int kRows, int kColumns, int kWarpRows, int kWarpColumns>
struct ProductShape {
  static constexpr int rows = kRows, columns = kColumns, warp_rows = kWarpRows, warp_columns = kWarpColumns;
  static constexpr int warps_across = kColumns / kWarpColumns;
  static constexpr int threads = kRows / kWarpRows * warps_across * kWarpSize;
  static constexpr int stages = 3;
  static constexpr int stage_bytes = (kRows + kColumns) * 128;
};
using LargeProduct = ProductShape<128, 128, 64, 32>;
using SmallProduct = ProductShape<64, 64, 32, 32>;

// How a product is cut: [groups][slices][column tiles][row tiles], row tiles next to one another.
struct ProductPlan {
  int64_t rows, columns, depth;
  int64_t groups = 1;
  int64_t row_tiles, column_tiles;
  int64_t slices, slice_depth;
  void* partials = nullptr;  // sums of the slices, [slices][groups][rows][columns], where there is more than one

  __host__ __device__ int64_t blocks() const { return groups * slices * column_tiles * row_tiles; }
};

// What a warp computes of a tile: its sums, and the rows and columns that this lane has of them.
template <class Scalar, class Shape>
struct WarpProduct {
  using T = accumulate_t<Scalar>;
  static constexpr int down = Shape::warp_rows / kUnitRows, across = Shape::warp_columns / kUnitColumns;
  T sums[down][across][4];
  int first_row, first_column;

  __device__ WarpProduct()
      : first_row(static_cast<int>(threadIdx.x) / kWarpSize / Shape::warps_across * Shape::warp_rows),
        first_column(static_cast<int>(threadIdx.x) / kWarpSize % Shape::warps_across * Shape::warp_columns) {
#pragma unroll
    for (int i = 0; i < down * across * 4; ++i) sums[i / 4 / across][i / 4 % across][i % 4] = T(0);
  }

  template <class LeftTile, class RightTile>
  __device__ __forceinline__ void add(const Scalar* left, const Scalar* right) {
    [[maybe_unused]] constexpr int kUnitsAtOnce =
        sizeof(Scalar) == 2 ? LeftTile::units : 1;  // the parts of float32 fill the registers
#pragma unroll kUnitsAtOnce
    for (int unit = 0; unit < LeftTile::units; ++unit) {
      Prepared<LeftFragment<Scalar>> lefts[down];
#pragma unroll
      for (int i = 0; i < down; ++i) lefts[i] = prepare(load_left<LeftTile>(left, first_row + i * kUnitRows, unit));
#pragma unroll
      for (int j = 0; j < across; j += 2) {
        RightFragment<Scalar> rights[2];
        load_right<RightTile>(right, first_column + j * kUnitColumns, unit, rights);
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const Prepared<RightFragment<Scalar>> prepared = prepare(rights[b]);
#pragma unroll
          for (int i = 0; i < down; ++i) multiply_add(sums[i][j + b], lefts[i], prepared);
        }
      }
    }
  }

  // body(row, column, values): two neighbouring columns of a row of the tile.
  template <class Body>
  __device__ __forceinline__ void for_each_pair(Body&& body) const {
    const Lane lane;
#pragma unroll
    for (int i = 0; i < down; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < across; ++j) {
          const T values[2] = {sums[i][j][half * 2], sums[i][j][half * 2 + 1]};
          body(first_row + i * kUnitRows + half * 8 + lane.row, first_column + j * kUnitColumns + lane.column, values);
        }
      }
    }
  }
};

// Columns j and j + 1 of row i, as far as they exist: to the sink, or to the slice's sums.
template <class T, class Sink>
__device__ __forceinline__ void store_pair_of_product(const ProductPlan& plan, const Sink& sink, int64_t slice,
                                                      int64_t group, int64_t i, int64_t j, const T (&values)[2]) {
  if (i >= plan.rows || j >= plan.columns) return;
  const int count = j + 1 < plan.columns ? 2 : 1;
  if (plan.partials == nullptr) return sink(group, i, j, values, count);
  T* out = static_cast<T*>(plan.partials) + ((slice * plan.groups + group) * plan.rows + i) * plan.columns + j;
  for (int c = 0; c < count; ++c) out[c] = values[c];
}

// A sink is called as sink(group, row, column, values, count): count, one or two, neighbouring columns of a row.
template <class Shape, class Left, class Right, class Sink>
__global__ void __launch_bounds__(Shape::threads, 1)
    multiply_tiles(ProductPlan plan, Left left_of_all, Right right_of_all, Sink sink) {
  using Scalar = typename Left::Scalar;
  using T = accumulate_t<Scalar>;
  using LeftLoader = Loader<Left, Shape::rows, Shape::threads>;
  using RightLoader = Loader<Right, Shape::columns, Shape::threads>;
  using LeftTile = typename LeftLoader::Place;
  using RightTile = typename RightLoader::Place;
  const int64_t tiles = plan.row_tiles * plan.column_tiles, tile = blockIdx.x % tiles;
  const int64_t slice = blockIdx.x / tiles % plan.slices, group = blockIdx.x / tiles / plan.slices;
  const int64_t first_row = tile % plan.row_tiles * Shape::rows, first_column = tile / plan.row_tiles * Shape::columns;
  const Left left = left_of_all.of_group(group);
  const Right right = right_of_all.of_group(group);
  const LeftLoader left_loader(left, first_row);
  const RightLoader right_loader(right, first_column);

  Scalar* stages = shared_memory<Scalar>();
  const int64_t begin = slice * plan.slice_depth;
  const int64_t end = begin + plan.slice_depth < plan.depth ? begin + plan.slice_depth : plan.depth;
  const int64_t steps = ceil_div(end - begin, LeftTile::depth);
  auto load = [&](int64_t step) {
    Scalar* stage = stages + step % Shape::stages * (LeftTile::size + RightTile::size);
    if (step < steps) {
      left_loader.load(begin + step * LeftTile::depth, stage);
      right_loader.load(begin + step * LeftTile::depth, stage + LeftTile::size);
    }
    commit_copies();  // a group for every step, also for those that do not exist
  };
  for (int step = 0; step < Shape::stages - 1; ++step) load(step);
  WarpProduct<Scalar, Shape> product;
  for (int64_t step = 0; step < steps; ++step) {
    wait_for_copies<Shape::stages - 2>();
    __syncthreads();  // this step's tiles are there, and the last step's are no longer read
    load(step + Shape::stages - 1);
    const Scalar* stage = stages + step % Shape::stages * (LeftTile::size + RightTile::size);
    product.template add<LeftTile, RightTile>(stage, stage + LeftTile::size);
  }

  product.for_each_pair([&](int row, int column, const T(&values)[2]) {
    store_pair_of_product(plan, sink, slice, group, first_row + row, first_column + column, values);
  });
}

template <class T, class Sink>
__global__ void __launch_bounds__(256, 1) add_slices(ProductPlan plan, Sink sink) {
  const int64_t size = plan.groups * plan.rows * plan.columns;
  const int64_t index = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (index >= size) return;
  T sum[2] = {T(0), T(0)};
  for (int64_t slice = 0; slice < plan.slices; ++slice)
    sum[0] += static_cast<const T*>(plan.partials)[slice * size + index];
  sink(index / plan.columns / plan.rows, index / plan.columns % plan.rows, index % plan.columns, sum, 1);
}

// ---- launching -----------------------------------------------------------------------------------------------------

// Cuts the depth where there are fewer tiles than multiprocessors; a slice has at least kFewestSteps tiles of depth.
template <class Scalar, class Shape>
ProductPlan plan_product(int64_t rows, int64_t columns, int64_t depth, int64_t groups) {
  constexpr int64_t kFewestSteps = 8;
  ProductPlan plan{rows, columns, depth, groups, ceil_div(rows, Shape::rows), ceil_div(columns, Shape::columns),
                   1,    depth};
  const int64_t tiles = plan.blocks(), steps = ceil_div(depth, kTileDepth<Scalar>);
  if (tiles == 0 || steps < 2 * kFewestSteps) return plan;
  const int64_t wanted = processors() / tiles, most = steps / kFewestSteps;
  if (wanted < 2) return plan;
  const int64_t slice_steps = ceil_div(steps, wanted < most ? wanted : most);
  plan.slices = ceil_div(steps, slice_steps), plan.slice_depth = slice_steps * kTileDepth<Scalar>;
  plan.partials = workspace<accumulate_t<Scalar>>(plan.slices, groups, rows, columns);
  return plan;
}

// Sums of type T, where there are several slices.
template <class Sink, class T>
void add_slices_of(const ProductPlan& plan, const Sink& sink, T) {
  if (plan.partials == nullptr) return;
  launch({ceil_div(plan.groups * plan.rows * plan.columns, 256), 256}, add_slices<T, Sink>, plan, sink);
}

template <class Shape, class Left, class Right, class Sink>
void multiply_as(const ProductPlan& plan, const Left& left, const Right& right, const Sink& sink) {
  launch({plan.blocks(), Shape::threads, Shape::stages * Shape::stage_bytes}, multiply_tiles<Shape, Left, Right, Sink>,
         plan, left, right, sink);
  add_slices_of(plan, sink, accumulate_t<typename Left::Scalar>());
}

}  // namespace dlkernels::DLKERNELS_ISA
