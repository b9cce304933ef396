// Products of two matrices on Hopper's own instructions (hopper.cuh), for half types whose lines begin at multiples of
// 16 bytes: the same sums in the same order as multiply_tiles (product.cuh), so the same bits where both cut the depth
// alike.
//
// A block has three groups of 128 threads. One thread of the first orders copies of the operands' tiles into a ring of
// stages, as far ahead as there is room; the other two groups multiply 64 rows of the tile each and say, a warp at a
// time, which stage they have read. A barrier in shared memory for either news of every stage is all that passes
// between them: no thread ever waits for the whole block. As many blocks as the device has room for take tiles in turn,
// dealt so that those computed at the same time share rows and columns in the second-level cache.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/product.cuh"

namespace dlkernels::DLKERNELS_ISA {

template <int kColumns, int kStages>
struct HopperShape {
  static constexpr int multipliers = 2, rows = multipliers * kGroupRows, columns = kColumns, depth = kBoxLength;
  static constexpr int threads = (1 + multipliers) * kGroupThreads, stages = kStages;
  static constexpr int left_bytes = rows * kBoxLineBytes, stage_bytes = left_bytes + columns * kBoxLineBytes;
  static constexpr int products = kColumns / kGroupColumns;  // side by side, of a group
  static constexpr int64_t shared_bytes = kBoxAlignment + int64_t{stages} * (stage_bytes + 2 * int64_t{kBarrierBytes});
};
using WideHopperProduct = HopperShape<256, 4>;
using NarrowHopperProduct = HopperShape<128, 6>;

#if DLKERNELS_HAS_HOPPER

// Item `index` of the work: tiles of one slice after another; in a slice bands of rows, each column by column.
struct HopperItem {
  static constexpr int64_t band = 16;
  int64_t slice, first_row, first_column, first_depth, steps;

  template <class Shape>
  __device__ static HopperItem of(const ProductPlan& plan, int64_t index) {
    const int64_t tiles = plan.row_tiles * plan.column_tiles, slice = index / tiles, tile = index % tiles;
    const int64_t top = tile / (band * plan.column_tiles) * band, place = tile - top * plan.column_tiles;
    const int64_t height = plan.row_tiles - top < band ? plan.row_tiles - top : band;
    const int64_t begin = slice * plan.slice_depth;
    const int64_t end = begin + plan.slice_depth < plan.depth ? begin + plan.slice_depth : plan.depth;
    return {slice, (top + place % height) * Shape::rows, place / height * Shape::columns, begin,
            ceil_div(end - begin, Shape::depth)};
  }
};

// The ring of a block in its shared memory.
template <class Shape>
struct HopperRing {
  unsigned char* tiles;
  MessageBarrier *filled, *read;  // of each stage

  __device__ HopperRing() : tiles(first_box(shared_memory<unsigned char>())) {
    filled = reinterpret_cast<MessageBarrier*>(tiles + Shape::stages * Shape::stage_bytes);
    read = filled + Shape::stages;
  }
  __device__ unsigned char* left(int stage) const { return tiles + stage * Shape::stage_bytes; }
  __device__ unsigned char* right(int stage) const { return left(stage) + Shape::left_bytes; }
};

// A stage, and the parity of the times that it has been used before.
template <class Shape>
struct Turn {
  int stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage < Shape::stages) return;
    stage = 0, parity ^= 1;
  }
};

// The boxes of kRows rows from first_row, 64 deep.
template <int kRows, bool kAlongDepth>
__device__ __forceinline__ void copy_rows(MessageBarrier& filled, unsigned char* tile, const BoxMap& boxes,
                                          int64_t first_row, int64_t first_depth) {
  if constexpr (kAlongDepth) {
    filled.copy_box(tile, boxes, first_row, first_depth);
  } else {
#pragma unroll
    for (int row = 0; row < kRows; row += kBoxLength)
      filled.copy_box(tile + row * kBoxLineBytes, boxes, first_depth, first_row + row);
  }
}

template <class Shape, bool kLeftAlongDepth, bool kRightAlongDepth>
__device__ void fill_ring(const ProductPlan& plan, const BoxMap& left, const BoxMap& right,
                          const HopperRing<Shape>& ring) {
  Turn<Shape> turn;
  for (int64_t index = blockIdx.x; index < plan.blocks(); index += gridDim.x) {
    const HopperItem item = HopperItem::of<Shape>(plan, index);
    for (int64_t step = 0; step < item.steps; ++step, turn.advance()) {
      ring.read[turn.stage].wait(turn.parity ^ 1);
      MessageBarrier& filled = ring.filled[turn.stage];
      filled.arrive_expecting(Shape::stage_bytes);
      const int64_t depth = item.first_depth + step * Shape::depth;
      copy_rows<Shape::rows, kLeftAlongDepth>(filled, ring.left(turn.stage), left, item.first_row, depth);
      copy_rows<Shape::columns, kRightAlongDepth>(filled, ring.right(turn.stage), right, item.first_column, depth);
    }
  }
}

// Called by the lanes of a warp together.
__device__ __forceinline__ void say_read(MessageBarrier& read) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) read.arrive();
}

template <class Scalar, class Shape, bool kLeftAlongDepth, bool kRightAlongDepth, class Sink>
__device__ void multiply_ring(const ProductPlan& plan, const HopperRing<Shape>& ring, const Sink& sink) {
  constexpr int kSteps = Shape::depth / kGroupStepDepth;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  Turn<Shape> turn;
  for (int64_t index = blockIdx.x; index < plan.blocks(); index += gridDim.x) {
    const HopperItem item = HopperItem::of<Shape>(plan, index);
    GroupSums products[Shape::products] = {};
    int last_stage = 0;
    for (int64_t step = 0; step < item.steps; ++step, turn.advance()) {
      ring.filled[turn.stage].wait(turn.parity);
      const BoxOperand<kLeftAlongDepth> left(ring.left(turn.stage) + group * kGroupRows * kBoxLineBytes);
      const BoxOperand<kRightAlongDepth> right(ring.right(turn.stage));
      begin_products();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int p = 0; p < Shape::products; ++p) {
          constexpr int kBytes = kGroupColumns * kBoxLineBytes;
          multiply_boxes<Scalar, kLeftAlongDepth, kRightAlongDepth>(products[p], left.at(k), right.at(k, p * kBytes));
        }
      }
      commit_products();
      wait_for_products<1>();  // those of the last step are done
      if (step > 0) say_read(ring.read[last_stage]);
      last_stage = turn.stage;
    }
    wait_for_products<0>();
    say_read(ring.read[last_stage]);

    const int row = group * kGroupRows + thread / kWarpSize * 16 + thread % kWarpSize / 4;
#pragma unroll
    for (int p = 0; p < Shape::products; ++p) {
#pragma unroll
      for (int pair = 0; pair < 32; ++pair) {  // of columns: two of every eight, of two rows in turn
        const float values[2] = {products[p].sums[2 * pair], products[p].sums[2 * pair + 1]};
        const int column = p * kGroupColumns + pair / 2 * 8 + thread % 4 * 2;
        store_pair_of_product(plan, sink, item.slice, 0, item.first_row + row + pair % 2 * 8,
                              item.first_column + column, values);
      }
    }
  }
}

#endif  // DLKERNELS_HAS_HOPPER

template <class Scalar, class Shape, bool kLeftAlongDepth, bool kRightAlongDepth, class Sink>
__global__ void __launch_bounds__(Shape::threads, 1)
    multiply_on_hopper(ProductPlan plan, const __grid_constant__ BoxMap left, const __grid_constant__ BoxMap right,
                       Sink sink) {
#if DLKERNELS_HAS_HOPPER
  const HopperRing<Shape> ring;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Shape::stages; ++stage) {
      ring.filled[stage].initialize(1);
      ring.read[stage].initialize(Shape::multipliers * kGroupThreads / kWarpSize);
    }
    MessageBarrier::publish();
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    give_registers_back<40>();
    if (threadIdx.x == 0) fill_ring<Shape, kLeftAlongDepth, kRightAlongDepth>(plan, left, right, ring);
  } else {
    take_registers<232>();
    multiply_ring<Scalar, Shape, kLeftAlongDepth, kRightAlongDepth>(plan, ring, sink);
  }
#endif
}

// ---- launching -----------------------------------------------------------------------------------------------------

template <class Source>
inline constexpr bool is_lines = false;
template <class Scalar, bool kAlongDepth>
inline constexpr bool is_lines<MatrixLines<Scalar, kAlongDepth>> = true;

template <class Left, class Right>
inline constexpr bool can_be_boxes = is_lines<Left> && is_lines<Right> && sizeof(typename Left::Scalar) == 2;

template <class Shape, class Left, class Right, class Sink>
void multiply_boxes_as(const ProductPlan& plan, const Left& left, const Right& right, const Sink& sink) {
  using Scalar = typename Left::Scalar;
  auto map = [](const auto& source, int tile_rows) {
    return map_boxes(source.data, source.lines, source.length, source.stride,
                     source.along_depth ? tile_rows : kBoxLength);
  };
  const int64_t blocks = plan.blocks() < processors() ? plan.blocks() : processors();
  launch({blocks, Shape::threads, Shape::shared_bytes},
         multiply_on_hopper<Scalar, Shape, Left::along_depth, Right::along_depth, Sink>, plan, map(left, Shape::rows),
         map(right, Shape::columns), sink);
  add_slices_of(plan, sink, float());
}

// What the copying unit's 32-bit places and whole boxes allow.
inline bool fits_boxes(int64_t rows, int64_t columns, int64_t depth, int64_t groups) {
  constexpr int64_t kMost = 0x7fffffff - 256;
  return groups == 1 && rows >= kGroupRows && columns >= kBoxLength && depth >= kBoxLength && rows <= kMost &&
         columns <= kMost && depth <= kMost;
}

template <class Left, class Right, class Sink>
void multiply_as_boxes(int64_t rows, int64_t columns, int64_t depth, const Left& left, const Right& right,
                       const Sink& sink) {
  using Scalar = typename Left::Scalar;
  const int64_t tiles = ceil_div(rows, WideHopperProduct::rows) * ceil_div(columns, WideHopperProduct::columns);
  auto run = [&](auto shape) {
    using Shape = decltype(shape);
    multiply_boxes_as<Shape>(plan_product<Scalar, Shape>(rows, columns, depth, 1), left, right, sink);
  };
  if (tiles >= processors()) return run(WideHopperProduct());
  run(NarrowHopperProduct());
}

}  // namespace dlkernels::DLKERNELS_ISA
