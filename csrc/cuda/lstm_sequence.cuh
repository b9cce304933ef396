// What both directions of an LSTM do step after step: small products of a weight that stays where it is, in one kernel
// whose blocks meet after every step.
//
// A block owns 32 columns of the product (eight hidden units of four gates, or 32 of anything else) and takes rows,
// sequences of the batch, a tile at a time. Its part of the weight is loaded once and stays in shared memory for all
// steps where it fits; otherwise it comes through the ring with the rows. Each warp multiplies sixteen rows with all
// columns over one of the parts that a tile's depth is cut into; the parts are added in shared memory.
#pragma once

#include <vector>

#include "cpu/lstm.h"
#include "cuda/lay_out.cuh"
#include "cuda/multiply.cuh"

namespace dlkernels::DLKERNELS_ISA {

inline constexpr int kGates = 4;
inline constexpr int kStepThreads = 256, kStepWarps = kStepThreads / kWarpSize;
inline constexpr int kStepColumns = 32, kStepUnits = kStepColumns / kGates;

// ---- the rows of a sequence ----------------------------------------------------------------------------------------

// Rows are (step, sequence) pairs, packed: step t has running(t) sequences from row first_row(t).
struct Steps {
  int64_t steps, batch;
  bool reverse;
  const int64_t* sizes;   // [steps] on the device, or null: all have `batch`
  const int64_t* firsts;  // [steps]

  static Steps of(const LstmLayer& layer) {
    Steps steps = {layer.steps, layer.batch, layer.reverse, nullptr, nullptr};
    if (layer.batch_sizes == nullptr) return steps;
    std::vector<int64_t> numbers(layer.batch_sizes, layer.batch_sizes + layer.steps);
    numbers.resize(2 * layer.steps, 0);
    for (int64_t t = 1; t < layer.steps; ++t) numbers[layer.steps + t] = numbers[layer.steps + t - 1] + numbers[t - 1];
    steps.sizes = copy_to_device(numbers.data(), 2 * layer.steps);
    steps.firsts = steps.sizes + layer.steps;
    return steps;
  }
  __device__ int64_t running(int64_t step) const {
    return step < 0 || step >= steps ? 0 : sizes == nullptr ? batch : sizes[step];
  }
  __device__ int64_t first_row(int64_t step) const { return firsts == nullptr ? step * batch : firsts[step]; }
  // In the order in which the layer goes.
  __device__ int64_t step_of(int64_t turn) const { return reverse ? steps - 1 - turn : turn; }
  __device__ int64_t before(int64_t step) const { return reverse ? step + 1 : step - 1; }
  __device__ int64_t after(int64_t step) const { return reverse ? step - 1 : step + 1; }
  // The step and the sequence of a row.
  __device__ int64_t step_of_row(int64_t row) const {
    if (firsts == nullptr) return row / batch;
    int64_t begin = 0, end = steps;  // the last step that begins at or before the row
    while (end - begin > 1) {
      const int64_t middle = (begin + end) / 2;
      (firsts[middle] <= row ? begin : end) = middle;
    }
    return begin;
  }
};

// ---- the product of a step -----------------------------------------------------------------------------------------

// Columns as the rows of a dense weight: column c of a block is its row, or, in gates, a gate of a unit.
template <class Scalar_>
struct StepWeight {
  using Scalar = Scalar_;
  static constexpr bool along_depth = true;
  const Scalar* data;
  int64_t columns, depth, stride;  // columns: hidden units where they are gates
  bool gates;

  using Line = typename MatrixLines<Scalar, true>::Line;
  using Along = typename MatrixLines<Scalar, true>::Along;
  // `column` counts blocks of 32, of eight units in gates: gate g of unit u is column 8 g + u.
  __device__ __forceinline__ Line line(int64_t column) const {
    if (!gates) return all().line(column);
    const int64_t block = column / kStepColumns, unit = block * kStepUnits + column % kStepUnits;
    const int64_t gate = column % kStepColumns / kStepUnits;
    return {unit < columns ? data + (gate * columns + unit) * stride : nullptr};
  }
  __device__ __forceinline__ Along along(int64_t place) const { return all().along(place); }
  __device__ __forceinline__ Chunk<Scalar> chunk(const Line& line, const Along& along) const {
    return all().chunk(line, along);
  }
  int64_t blocks() const { return ceil_div(columns, gates ? kStepUnits : kStepColumns); }
  int64_t slabs() const { return ceil_div(depth, kTileDepth<Scalar>); }

 private:
  __device__ __forceinline__ MatrixLines<Scalar, true> all() const { return {data, columns, depth, stride}; }
};

// The shared memory of a block: [kStages][left tile, right tile][sums][resident weight]
template <class Scalar_>
class StepProduct {
 public:
  using Scalar = Scalar_;
  using T = accumulate_t<Scalar>;
  static constexpr int parts = Tile<Scalar, 16, true>::units;  // of a tile's depth
  static constexpr int rows = kStepWarps / parts * kUnitRows;
  using LeftTile = Tile<Scalar, rows, true>;
  using RightTile = Tile<Scalar, kStepColumns, true>;

  static int64_t shared_bytes(int64_t resident_slabs) {
    return (kStages * (LeftTile::size + RightTile::size) + resident_slabs * RightTile::size) *
               static_cast<int64_t>(sizeof(Scalar)) +
           kSums * static_cast<int64_t>(sizeof(T));
  }
  // Slabs of a weight that can stay, all or none.
  static int64_t resident_slabs(int64_t slabs) { return shared_bytes(slabs) <= most_shared_bytes() ? slabs : 0; }

  __device__ StepProduct()
      : ring_(shared_memory<Scalar>()),
        sums_(reinterpret_cast<T*>(ring_ + kStages * (LeftTile::size + RightTile::size))),
        resident_(reinterpret_cast<Scalar*>(sums_ + kSums)) {}

  // Begins to load the columns of a block to stay; they are there after the next product.
  __device__ void keep(const StepWeight<Scalar>& weight, int64_t block) const {
    const Loader<StepWeight<Scalar>, kStepColumns, kStepThreads> loader(weight, block * kStepColumns);
    for (int64_t slab = 0; slab < ceil_div(weight.depth, RightTile::depth); ++slab) {
      loader.load(slab * RightTile::depth, resident_ + slab * RightTile::size);
    }
    commit_copies();
  }

  // The product of rows from first_row of `left` with the columns of a block; then sum(row, column) is there for all.
  __device__ void multiply(const MatrixLines<Scalar, true>& left, int64_t first_row, const StepWeight<Scalar>& weight,
                           int64_t block, bool is_resident) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, part = warp % parts, row = warp / parts * kUnitRows;
    const Loader<MatrixLines<Scalar, true>, rows, kStepThreads> left_loader(left, first_row);
    const Loader<StepWeight<Scalar>, kStepColumns, kStepThreads> right_loader(weight, block * kStepColumns);
    const int64_t slabs = ceil_div(weight.depth, LeftTile::depth);
    auto load = [&](int64_t slab) {
      Scalar* stage = ring_ + slab % kStages * (LeftTile::size + RightTile::size);
      if (slab < slabs) {
        left_loader.load(slab * LeftTile::depth, stage);
        if (!is_resident) right_loader.load(slab * LeftTile::depth, stage + LeftTile::size);
      }
      commit_copies();
    };
    for (int slab = 0; slab < kStages - 1; ++slab) load(slab);
    T sums[kStepColumns / kUnitColumns][4] = {};
    for (int64_t slab = 0; slab < slabs; ++slab) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // this slab is there, and the last one is no longer read
      load(slab + kStages - 1);
      const Scalar* stage = ring_ + slab % kStages * (LeftTile::size + RightTile::size);
      const Scalar* right = is_resident ? resident_ + slab * RightTile::size : stage + LeftTile::size;
      const auto prepared_left = prepare(load_left<LeftTile>(stage, row, part));
#pragma unroll
      for (int j = 0; j < kStepColumns / kUnitColumns; j += 2) {
        RightFragment<Scalar> rights[2];
        load_right<RightTile>(right, j * kUnitColumns, part, rights);
#pragma unroll
        for (int b = 0; b < 2; ++b) multiply_add(sums[j + b], prepared_left, prepare(rights[b]));
      }
    }
    share(part, row, sums);
  }

  __device__ T sum(int row, int column) const {
    T sum = T(0);
#pragma unroll
    for (int part = 0; part < parts; ++part) sum += sums_[(part * rows + row) * kPitch + column];
    return sum;
  }

 private:
  static constexpr int kStages = 3;
  static constexpr int kPitch = kStepColumns + 4, kSums = parts * rows * kPitch;  // of a row: no bank is met twice

  // The last product's sums are no longer read: the barrier of a slab came after that.
  __device__ void share(int part, int row, const T (&sums)[kStepColumns / kUnitColumns][4]) const {
    const Lane lane;
#pragma unroll
    for (int j = 0; j < kStepColumns / kUnitColumns; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums_[(part * rows + row + i / 2 * 8 + lane.row) * kPitch + j * kUnitColumns + lane.column + i % 2] =
            sums[j][i];
      }
    }
    __syncthreads();
  }

  Scalar* ring_;
  T* sums_;
  Scalar* resident_;
};

// How the columns and rows of a step's product are dealt to the blocks of a grid.
struct StepPlan {
  int64_t column_blocks, row_blocks;
  int64_t grid, row_step;  // blocks from one that has the same columns to the next
  int64_t resident_slabs;

  template <class Scalar>
  static StepPlan of(const StepWeight<Scalar>& weight, int64_t batch, int64_t at_once, int64_t resident_slabs) {
    StepPlan plan = {weight.blocks(), ceil_div(batch, StepProduct<Scalar>::rows), 0, 1, resident_slabs};
    if (plan.column_blocks <= at_once) {
      plan.row_step = at_once / plan.column_blocks < plan.row_blocks ? at_once / plan.column_blocks : plan.row_blocks;
      plan.grid = plan.column_blocks * plan.row_step;
    } else {
      plan.grid = plan.row_blocks == 0 ? 0 : at_once;  // a block has several parts of the columns, none of which stays
      plan.resident_slabs = 0;
    }
    return plan;
  }
  __device__ int64_t first_column_block() const { return blockIdx.x % column_blocks; }
  // body(column block, row block) for all that this block has.
  template <class Body>
  __device__ void for_each_tile(Body&& body) const {
    if (gridDim.x >= column_blocks && blockIdx.x >= column_blocks * row_step) return;  // a rest that divides nothing
    for (int64_t column = first_column_block(); column < column_blocks; column += gridDim.x) {
      for (int64_t row = blockIdx.x / column_blocks; row < row_blocks; row += row_step) body(column, row);
    }
  }
};

// The same for a product of other columns in the same grid.
template <class Scalar>
StepPlan with_grid(const StepWeight<Scalar>& weight, const StepPlan& plan) {
  StepPlan other = plan;
  other.column_blocks = weight.blocks(), other.resident_slabs = 0;
  other.row_step = plan.grid < other.column_blocks ? 1 : plan.grid / other.column_blocks;
  return other;
}

}  // namespace dlkernels::DLKERNELS_ISA
