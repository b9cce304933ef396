// What the passes of attention share. Each of them computes blocks of 64 x 64 scores (64 x 32 of float32 and float64),
// turns them into weights in registers, and multiplies these with rows of one of the inputs:
//
//   pass      rows      columns   scores     second product   weights                    result
//   forward   queries   keys      Q K^T                       P, under the maxima so far  P V
//   query     queries   keys      Q K^T      dO V^T           dS scale                   dS K
//   key       keys      queries   K Q^T      V dO^T           dS^T scale                 dS^T Q
//   value     keys      queries   K Q^T                       P^T, what dropout leaves   P^T dO
//   mask      queries   keys      Q K^T      dO V^T           dS                         their sum
//
// A block of threads owns 64 rows (a warp sixteen) and a part of the result's columns, and goes over the blocks of its
// columns in order: every sum has one owner and one order. Slabs of 64 lines of 128 bytes come through a ring in shared
// memory, in the order in which they are used; those of the rows stay there where they fit. A slab that was the right
// operand of the scores along its lines is one of the result across them.
#pragma once

#include "cpu/attention.h"
#include "cuda/lay_out.cuh"
#include "cuda/philox.cuh"
#include "cuda/product.cuh"
#include "cuda/reduce.cuh"

namespace dlkernels::DLKERNELS_ISA {

enum class AttentionPass { forward, query, key, value, mask };

inline constexpr int kAttentionBlock = 64;  // rows of a block
template <class Scalar>                     // columns: fewer of those whose products take more registers
inline constexpr int kScoreColumns = sizeof(Scalar) == 2 ? 64 : 32;
inline constexpr int kAttentionThreads = kAttentionBlock / kUnitRows * kWarpSize;
template <class Scalar>
inline constexpr int kScoreTiles = kScoreColumns<Scalar> / kUnitColumns;
// What a thread has of a block of scores.
template <class Scalar>
using Scores = accumulate_t<Scalar>[kScoreTiles<Scalar>][4];

// ---- where things are ----------------------------------------------------------------------------------------------

__device__ inline int64_t batch_offset(const AttentionSizes& sizes, const int64_t* strides, int64_t batch) {
  int64_t offset = 0;
  for (int64_t d = sizes.batch_dims - 1; d >= 0; --d) {
    offset += batch % sizes.batch_sizes[d] * strides[d];
    batch /= sizes.batch_sizes[d];
  }
  return offset;
}

template <class Scalar, class Pointer>
__device__ Scalar* head_of(const AttentionSizes& sizes, const AttentionTensor<Pointer>& tensor, int64_t batch,
                           int64_t head) {
  return static_cast<Scalar*>(tensor.data) + batch_offset(sizes, tensor.batch_strides, batch) +
         head * tensor.head_stride;
}

template <class Scalar>
struct AttentionArgs {
  using T = accumulate_t<Scalar>;
  AttentionSizes sizes;
  AttentionTensor<const void*> query, key, value, grad_output;  // rows at multiples of 16 bytes
  AttentionMask<const void*> mask;
  bool is_causal;
  T scale, kept;  // kept: what a probability that dropout leaves is multiplied by
  // A score is its product times score_scale (plus the mask), its weight exp((score - the row's largest) weight_scale):
  // the difference is exact near the largest score, however large that is. One is the scale, the other 1: the second,
  // where there is a mask or no positive scale.
  T score_scale, weight_scale;
  uint64_t dropout_threshold;
  const uint64_t* dropout_seed;  // null without dropout
  T *maxima, *sums;              // [batches, heads, L]
  const T* dots;                 // D, the same
  AttentionTensor<void*> result, exact_result;
  AttentionMask<void*> grad_mask;
  int64_t column_parts;  // of the result's columns
  bool keeps_rows;       // in shared memory

  __device__ int64_t group() const { return sizes.heads / sizes.kv_heads; }
  __device__ int64_t line(int64_t batch, int64_t head) const {
    return (batch * sizes.heads + head) * sizes.query_length;
  }
};

// A block of scores: of a query head, from a row and a column on.
struct ScoreBlock {
  int batch, head, kv_head;  // below 2^31, as blocks of a launch are
  int64_t first_row, first_column;
};

// What is added to the score of a query and a key.
template <class Scalar>
__device__ __forceinline__ accumulate_t<Scalar> mask_at(const AttentionMask<const void*>& mask, int64_t offset) {
  using T = accumulate_t<Scalar>;
  switch (mask.type) {
    case AttentionMaskType::none:
      return T(0);
    case AttentionMaskType::boolean:
      return static_cast<const uint8_t*>(mask.data)[offset] != 0 ? T(0) : -static_cast<T>(INFINITY);
    case AttentionMaskType::element:
      return widen(static_cast<const Scalar*>(mask.data)[offset]);
    case AttentionMaskType::float32:
      return static_cast<T>(static_cast<const float*>(mask.data)[offset]);
  }
  return T(0);
}

// ---- weights as left operands --------------------------------------------------------------------------------------

// Unit `unit` of the depth of sixteen rows of weights, which are where a product left them. float32 and float64: words
// l % 4 and l % 4 + 4 of a group are columns 2 (l % 4) and the next; load_across() takes its lines in the same order.
template <class Scalar>
__device__ __forceinline__ LeftFragment<Scalar> left_of_weights(const Scores<Scalar>& weights, int unit) {
  LeftFragment<Scalar> fragment;
  if constexpr (sizeof(Scalar) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = weights[unit * 2 + i / 2] + i % 2 * 2;
      fragment.words[i] = narrow<Scalar>(pair[0]).bits | uint32_t{narrow<Scalar>(pair[1]).bits} << 16;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4 * kUnitGroups<Scalar>; ++i) {
      fragment.words[i] = weights[unit * kUnitGroups<Scalar> + i / 4][i % 2 * 2 + i % 4 / 2];
#if !defined(DLKERNELS_SIMT)
      if constexpr (sizeof(Scalar) == 4) asm volatile("" : "+f"(fragment.words[i]));  // split anew for every slab
#endif
    }
  }
  return fragment;
}

// This thread's lane, hidden from the optimiser: it would compute every address that follows from it ahead of a loop,
// and keep them all in registers.
__device__ __forceinline__ int hidden_lane() {
  int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#if !defined(DLKERNELS_SIMT)
  asm volatile("" : "+r"(lane));
#endif
  return lane;
}

// Two right fragments of a slab whose lines are the depth: of its elements from `first` and from first + 8.
template <class Slab>
__device__ __forceinline__ void load_across(const typename Slab::Scalar* slab, int first, int unit,
                                            RightFragment<typename Slab::Scalar> (&fragments)[2]) {
  using Scalar = typename Slab::Scalar;
  const int lane = hidden_lane();
  if constexpr (sizeof(Scalar) == 2) {
    uint32_t words[4];
    const int upper_element = lane / 16, upper_line = lane / 8 % 2;
    load_matrices<true>(words, slab + Slab::offset(unit * 16 + upper_line * 8 + lane % 8, first + upper_element * 8));
#pragma unroll
    for (int i = 0; i < 4; ++i) fragments[i / 2].words[i % 2] = words[i];
  } else {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
#pragma unroll
      for (int i = 0; i < 2 * kUnitGroups<Scalar>; ++i) {
        const int line = (unit * kUnitGroups<Scalar> + i / 2) * kGroupWords + lane % 4 * 2 + i % 2;
        fragments[f].words[i] = slab[Slab::offset(line, first + f * 8 + lane / 4)];
      }
    }
  }
}

// ---- one pass ------------------------------------------------------------------------------------------------------

template <class Scalar_, AttentionPass kPass, int kColumnSlabs>
class AttentionBlock {
 public:
  using Scalar = Scalar_;
  using T = accumulate_t<Scalar>;
  using Slab = Tile<Scalar, kScoreColumns<Scalar>, true>;
  using RowSlab = Tile<Scalar, kAttentionBlock, true>;
  static constexpr AttentionPass pass = kPass;
  static constexpr bool rows_are_queries = kPass != AttentionPass::key && kPass != AttentionPass::value;
  static constexpr bool has_second =
      kPass == AttentionPass::query || kPass == AttentionPass::key || kPass == AttentionPass::mask;
  static constexpr int stages = 3, columns = kColumnSlabs * Slab::depth;
  static constexpr int result_tiles = Slab::depth / kUnitColumns;  // of a slab

  static int64_t row_slabs(const AttentionSizes& sizes) {
    return ceil_div(sizes.head_size, Slab::depth) + (has_second ? ceil_div(sizes.value_size, Slab::depth) : 0);
  }
  static int64_t shared_bytes(const AttentionSizes& sizes, bool keeps_rows) {
    return (stages * Slab::size + (keeps_rows ? row_slabs(sizes) : stages) * RowSlab::size) *
           static_cast<int64_t>(sizeof(Scalar));
  }

  __device__ explicit AttentionBlock(const AttentionArgs<Scalar>& args)
      : args_(args),
        scores_slabs_(ceil_div(args.sizes.head_size, Slab::depth)),
        second_slabs_(has_second ? ceil_div(args.sizes.value_size, Slab::depth) : 0),
        ring_(shared_memory<Scalar>()),
        rows_(ring_ + stages * Slab::size) {}

  // body(block, scores, second) for every block of scores, once both products are there; leaves weights in `scores`.
  // block_of(i) is block i of `blocks`. The product of the weights is added to `result`.
  template <class BlockOf, class Body>
  __device__ void run(int64_t blocks, int64_t first_slab, BlockOf&& block_of, Body&& body) {
    first_slab_ = first_slab;
    Cursor ahead = {0, 0, blocks > 0 ? block_of(0) : ScoreBlock{}};
    auto load_next = [&] {
      if (ahead.block < blocks) {
        load(ahead);
        ++loaded_;
        if (++ahead.part == parts()) {
          ahead.part = 0, ++ahead.block;
          if (ahead.block < blocks) ahead.at = block_of(ahead.block);
        }
      }
      commit_copies();
    };
    if (args_.keeps_rows && blocks > 0) load_rows(ahead.at);
    for (int i = 0; i < stages - 1; ++i) load_next();
    // The next slab of the ring, once it is there.
    auto next = [&] {
      wait_for_copies<stages - 2>();
      __syncthreads();  // it is there, and the slab before it is no longer read
      load_next();
      return stage(used_++);
    };
    for (int64_t i = 0; i < blocks; ++i) {
      Scores<Scalar> scores = {};
      T second[has_second ? kScoreTiles<Scalar> : 1][4] = {};
      for (int64_t part = 0; part < scores_slabs_; ++part) multiply_rows(next(), part, scores);
      if constexpr (has_second) {
        for (int64_t part = 0; part < second_slabs_; ++part) multiply_rows(next(), scores_slabs_ + part, second);
      }
      body(block_of(i), scores, second);
#pragma unroll
      for (int slab = 0; slab < kColumnSlabs; ++slab) multiply_weights(next(), scores, result[slab]);
    }
  }

  T result[kColumnSlabs > 0 ? kColumnSlabs : 1][result_tiles][4] = {};

 private:
  struct Cursor {
    int64_t block, part;
    ScoreBlock at;
  };
  using Rows = MatrixLines<Scalar, true>;

  __device__ int64_t parts() const { return scores_slabs_ + second_slabs_ + kColumnSlabs; }
  __device__ Scalar* stage(int64_t index) const {
    return ring_ + index % stages * (Slab::size + (args_.keeps_rows ? 0 : RowSlab::size));
  }

  __device__ Rows queries(const AttentionTensor<const void*>& tensor, const ScoreBlock& at, int64_t width) const {
    return {head_of<const Scalar>(args_.sizes, tensor, at.batch, at.head), args_.sizes.query_length, width,
            tensor.row_stride};
  }
  __device__ Rows keys(const AttentionTensor<const void*>& tensor, const ScoreBlock& at, int64_t width) const {
    return {head_of<const Scalar>(args_.sizes, tensor, at.batch, at.kv_head), args_.sizes.key_length, width,
            tensor.row_stride};
  }
  // The operands of the scores (or of the second product) on the side of the queries, or of the keys.
  __device__ Rows operand(const ScoreBlock& at, bool is_second, bool of_queries) const {
    const int64_t width = is_second ? args_.sizes.value_size : args_.sizes.head_size;
    if (of_queries) return queries(is_second ? args_.grad_output : args_.query, at, width);
    return keys(is_second ? args_.value : args_.key, at, width);
  }
  // What the weights are multiplied with.
  __device__ Rows factor(const ScoreBlock& at) const {
    constexpr bool is_value = kPass == AttentionPass::forward || kPass == AttentionPass::value;
    return operand(at, is_value, !rows_are_queries);
  }

  template <int kLines = kScoreColumns<Scalar>>
  __device__ void load_slab(const Rows& lines, int64_t first_line, int64_t slab, Scalar* to) const {
    Loader<Rows, kLines, kAttentionThreads>(lines, first_line).load(slab * Slab::depth, to);
  }
  __device__ void load_row_slab(const ScoreBlock& at, int64_t part, Scalar* to) const {
    const bool is_second = part >= scores_slabs_;
    load_slab<kAttentionBlock>(operand(at, is_second, rows_are_queries), at.first_row,
                               is_second ? part - scores_slabs_ : part, to);
  }
  __device__ void load_rows(const ScoreBlock& at) const {
    for (int64_t part = 0; part < scores_slabs_ + second_slabs_; ++part) {
      load_row_slab(at, part, rows_ + part * RowSlab::size);
    }
    commit_copies();
  }
  __device__ void load(const Cursor& cursor) const {
    Scalar* to = stage(loaded_);
    const int64_t of_products = scores_slabs_ + second_slabs_;
    if (cursor.part >= of_products) {
      return load_slab(factor(cursor.at), cursor.at.first_column, first_slab_ + cursor.part - of_products, to);
    }
    const bool is_second = cursor.part >= scores_slabs_;
    load_slab(operand(cursor.at, is_second, !rows_are_queries), cursor.at.first_column,
              is_second ? cursor.part - scores_slabs_ : cursor.part, to);
    if (!args_.keeps_rows) load_row_slab(cursor.at, cursor.part, to + Slab::size);
  }

  __device__ __forceinline__ void multiply_rows(const Scalar* slab, int64_t part, Scores<Scalar>& sums) const {
    const Scalar* left = args_.keeps_rows ? rows_ + part * RowSlab::size : slab + Slab::size;
    const int row = static_cast<int>(threadIdx.x) / kWarpSize * kUnitRows;
#pragma unroll 1
    for (int unit = 0; unit < Slab::units; ++unit) {
      const auto prepared_left = prepare(load_left<RowSlab>(left, row, unit));
#pragma unroll
      for (int j = 0; j < kScoreTiles<Scalar>; j += 2) {
        RightFragment<Scalar> rights[2];
        load_right<Slab>(slab, j * kUnitColumns, unit, rights);
#pragma unroll
        for (int b = 0; b < 2; ++b) multiply_add(sums[j + b], prepared_left, prepare(rights[b]));
      }
    }
  }

  __device__ __forceinline__ void multiply_weights(const Scalar* slab, const Scores<Scalar>& weights,
                                                   T (&sums)[result_tiles][4]) const {
#pragma unroll
    for (int unit = 0; unit < kScoreColumns<Scalar> / kUnitDepth<Scalar>; ++unit) {
      const auto left = prepare(left_of_weights<Scalar>(weights, unit));
#pragma unroll
      for (int j = 0; j < result_tiles; j += 2) {
        RightFragment<Scalar> rights[2];
        load_across<Slab>(slab, j * kUnitColumns, unit, rights);
#pragma unroll
        for (int b = 0; b < 2; ++b) multiply_add(sums[j + b], left, prepare(rights[b]));
      }
    }
  }

  const AttentionArgs<Scalar>& args_;
  int64_t scores_slabs_, second_slabs_, first_slab_ = 0;
  int64_t loaded_ = 0, used_ = 0;  // slabs of the ring, counted without end
  Scalar *ring_, *rows_;
};

// ---- elements of a block of scores ---------------------------------------------------------------------------------

// The place of element i of tile j of this thread: i is 2 h + e, of the upper or lower eight rows and of two columns.
struct ScorePlace {
  int64_t row, column;
  __device__ __forceinline__ ScorePlace(const ScoreBlock& block, int tile, int i)
      : row(block.first_row + static_cast<int64_t>(threadIdx.x) / kWarpSize * kUnitRows + i / 2 * 8 + Lane().row),
        column(block.first_column + tile * kUnitColumns + Lane().column + i % 2) {}
};

template <class Scalar>
struct ScoreRules {
  using T = accumulate_t<Scalar>;
  const AttentionArgs<Scalar>& args;
  const ScoreBlock& block;
  bool is_whole;  // no score of the block is hidden by an end or by the causal mask
  int64_t mask_offset;

  __device__ ScoreRules(const AttentionArgs<Scalar>& a, const ScoreBlock& b, bool rows_are_queries)
      : args(a),
        block(b),
        is_whole(is_whole_block(rows_are_queries ? b.first_row : b.first_column,
                                rows_are_queries ? kAttentionBlock : kScoreColumns<Scalar>,
                                rows_are_queries ? b.first_column : b.first_row,
                                rows_are_queries ? kScoreColumns<Scalar> : kAttentionBlock)),
        mask_offset(a.mask.type == AttentionMaskType::none
                        ? 0
                        : batch_offset(a.sizes, a.mask.batch_strides, b.batch) + b.head * a.mask.head_stride) {}

  __device__ bool is_whole_block(int64_t first_query, int queries, int64_t first_key, int keys) const {
    return first_query + queries <= args.sizes.query_length && first_key + keys <= args.sizes.key_length &&
           (!args.is_causal || first_key + keys - 1 <= first_query);
  }
  __device__ __forceinline__ bool exists(int64_t query, int64_t key) const {
    if (is_whole) return true;
    return query < args.sizes.query_length && key < args.sizes.key_length && (!args.is_causal || key <= query);
  }
  // The score from its product.
  __device__ __forceinline__ T score(T product, int64_t query, int64_t key) const {
    const T scaled = rounded_product(product, args.score_scale);
    if (args.mask.type == AttentionMaskType::none) return scaled;
    return scaled +
           mask_at<Scalar>(args.mask, mask_offset + query * args.mask.row_stride + key * args.mask.column_stride);
  }
  __device__ uint64_t matrix() const {
    return static_cast<uint64_t>(int64_t{block.batch} * args.sizes.heads + block.head);
  }

  // Whether dropout leaves this thread's columns of a row, a bit for element e of tile j at 2 j + e.
  __device__ uint32_t kept_of_row(int64_t query) const {
    if (args.dropout_seed == nullptr) return 0xffffffffu;
    uint32_t bits = 0;
    const bool upper = block.first_column % kPhiloxGroup != 0;  // of a group that two blocks share
    for (int i = 0; i < 4; ++i) {  // four columns of the first two tiles, each with those sixteen, 32 and 48 after it
      uint32_t words[4];
      const int lane = i / 2 * kUnitColumns + Lane().column + i % 2;
      philox(*args.dropout_seed, matrix(), static_cast<uint64_t>(query),
             static_cast<uint64_t>(block.first_column / kPhiloxGroup), static_cast<uint32_t>(lane), words);
#pragma unroll
      for (int w = 0; w < kScoreTiles<Scalar> / 2; ++w) {
        if ((upper ? words[(w + 2) % 4] : words[w]) >= args.dropout_threshold) bits |= 1u << (4 * w + i);
      }
    }
    return bits;
  }
  __device__ bool is_kept(int64_t query, int64_t key) const {
    if (args.dropout_seed == nullptr) return true;
    uint32_t words[4];
    philox(*args.dropout_seed, matrix(), static_cast<uint64_t>(query), static_cast<uint64_t>(key / kPhiloxGroup),
           static_cast<uint32_t>(key % kPhiloxLanes), words);
    const int word = static_cast<int>(key % kPhiloxGroup) / kPhiloxLanes;
    const uint32_t value = word == 0 ? words[0] : word == 1 ? words[1] : word == 2 ? words[2] : words[3];
    return value >= args.dropout_threshold;
  }
};

// ---- launching -----------------------------------------------------------------------------------------------------

template <class Scalar>
__global__ void __launch_bounds__(256, 1)
    copy_heads(AttentionSizes sizes, AttentionTensor<const void*> tensor, int64_t heads, int64_t rows, int64_t width,
               int64_t padded, Scalar* out) {
  const int64_t index = int64_t{blockIdx.x} * 256 + threadIdx.x, column = index % padded, row = index / padded % rows;
  const int64_t head = index / padded / rows % heads, batch = index / padded / rows / heads;
  if (batch >= sizes.batches) return;
  const Scalar* from = head_of<const Scalar>(sizes, tensor, batch, head) + row * tensor.row_stride;
  out[index] = column < width ? from[column] : Scalar{};
}

// A tensor whose rows begin at multiples of 16 bytes: itself, or a copy.
template <class Scalar>
AttentionTensor<const void*> with_aligned_rows(const AttentionSizes& sizes, const AttentionTensor<const void*>& tensor,
                                               int64_t heads, int64_t rows, int64_t width) {
  const Scalar* data = static_cast<const Scalar*>(tensor.data);
  bool aligned =
      is_aligned(data, rows > 1 ? tensor.row_stride : 0) && is_aligned(data, heads > 1 ? tensor.head_stride : 0);
  for (int64_t d = 0; d < sizes.batch_dims; ++d) {
    aligned = aligned && (sizes.batch_sizes[d] <= 1 || is_aligned(data, tensor.batch_strides[d]));
  }
  if (aligned) return tensor;
  const int64_t padded = whole_chunks<Scalar>(width), count = sizes.batches * heads * rows * padded;
  Scalar* out = workspace<Scalar>(count);
  launch({ceil_div(count, 256), 256}, copy_heads<Scalar>, sizes, tensor, heads, rows, width, padded, out);
  AttentionTensor<const void*> copy = {out, {}, rows * padded, padded};
  int64_t stride = heads * rows * padded;
  for (int64_t d = sizes.batch_dims - 1; d >= 0; --d) {
    copy.batch_strides[d] = stride;
    stride *= sizes.batch_sizes[d];
  }
  return copy;
}

// What forward and backward arguments have in common.
template <class Scalar, class Given>
AttentionArgs<Scalar> common_args(const Given& given, void* statistics) {
  using T = accumulate_t<Scalar>;
  const AttentionSizes& sizes = given.sizes;
  AttentionArgs<Scalar> args = {};
  args.sizes = sizes;
  args.query = with_aligned_rows<Scalar>(sizes, given.query, sizes.heads, sizes.query_length, sizes.head_size);
  args.key = with_aligned_rows<Scalar>(sizes, given.key, sizes.kv_heads, sizes.key_length, sizes.head_size);
  args.value = with_aligned_rows<Scalar>(sizes, given.value, sizes.kv_heads, sizes.key_length, sizes.value_size);
  args.mask = given.mask;
  args.is_causal = given.is_causal;
  args.scale = static_cast<T>(given.scale);
  const bool scales_last = given.mask.type == AttentionMaskType::none && args.scale > T(0);
  args.score_scale = scales_last ? T(1) : args.scale, args.weight_scale = scales_last ? args.scale : T(1);
  args.kept = given.dropout_p < 1 ? static_cast<T>(1 / (1 - given.dropout_p)) : T(0);
  args.dropout_threshold = static_cast<uint64_t>(given.dropout_p * 0x1p32);
  args.dropout_seed = given.dropout_p > 0 ? given.dropout_seed : nullptr;
  args.maxima = static_cast<T*>(statistics);
  args.sums = args.maxima + sizes.batches * sizes.heads * sizes.query_length;
  return args;
}

// run(std::integral_constant<int, slabs>()): of the result's columns that a block has.
template <class Scalar, class Run>
void with_column_slabs(int64_t columns, Run&& run) {
  constexpr int kWide = sizeof(Scalar) == 8 ? 2 : static_cast<int>(sizeof(Scalar));
  if constexpr (sizeof(Scalar) < 8) {
    if (columns <= 64) return run(std::integral_constant<int, kWide / 2>());
  }
  run(std::integral_constant<int, kWide>());
}

// Launches kernel(args) over `blocks` blocks for each part of the result's columns, of which there are `columns`.
template <class Pass, class Kernel>
void launch_pass(AttentionArgs<typename Pass::Scalar> args, int64_t blocks, int64_t columns, Kernel* kernel) {
  args.column_parts = columns < 0 ? 1 : ceil_div(columns, Pass::columns > 0 ? Pass::columns : 1);
  args.keeps_rows = args.keeps_rows && Pass::shared_bytes(args.sizes, true) <= most_shared_bytes();
  launch({blocks * args.column_parts, kAttentionThreads, Pass::shared_bytes(args.sizes, args.keeps_rows)}, kernel,
         args);
}

}  // namespace dlkernels::DLKERNELS_ISA
