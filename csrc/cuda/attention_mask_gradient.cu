// The gradient of attention's float mask: the scores' gradient, summed over what the mask is broadcast to.
//
// A block owns a block of scores' worth of the mask, or as many as it has, and goes over every head that shares them
// and, where rows or columns are broadcast, over all of these. It sums element by element, and along what is broadcast
// at the end.
#include "cuda/attention_gradient.cuh"
#include "cuda/attention_parts.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// The heads of a call split by whether the mask is its own for them: of `owned` tuples each is broadcast to `shared`
// heads. The dimensions are the batch dimensions and, last, the heads.
struct MaskHeads {
  int64_t dims, sizes[kAttentionBatchDims + 1], strides[kAttentionBatchDims + 1];  // strides of the gradient
  int64_t owned = 1, shared = 1;

  MaskHeads(const AttentionSizes& call, const AttentionMask<void*>& mask) : dims(call.batch_dims + 1) {
    for (int64_t d = 0; d < dims; ++d) {
      const bool is_head = d == dims - 1;
      sizes[d] = is_head ? call.heads : call.batch_sizes[d];
      strides[d] = is_head ? mask.head_stride : mask.batch_strides[d];
      (strides[d] == 0 ? shared : owned) *= sizes[d];
    }
  }
  // The place, counted over batches x heads, of the j-th head that shares the i-th tuple's mask.
  __device__ int64_t place(int64_t i, int64_t j) const {
    int64_t place = 0, weight = 1;
    for (int64_t d = dims - 1; d >= 0; --d) {
      int64_t& index = strides[d] == 0 ? j : i;
      place += index % sizes[d] * weight;
      index /= sizes[d];
      weight *= sizes[d];
    }
    return place;
  }
  // Of the i-th tuple in the gradient.
  __device__ int64_t offset(int64_t i) const {
    int64_t offset = 0;
    for (int64_t d = dims - 1; d >= 0; --d) {
      if (strides[d] == 0) continue;
      offset += i % sizes[d] * strides[d];
      i /= sizes[d];
    }
    return offset;
  }
};

template <class Scalar, class T>
__device__ void store_element(const AttentionMask<void*>& mask, int64_t offset, T value) {
  if (mask.type == AttentionMaskType::float32) {
    static_cast<float*>(mask.data)[offset] = static_cast<float>(value);
  } else {
    static_cast<Scalar*>(mask.data)[offset] = narrow<Scalar>(value);
  }
}

// The sums of a block of scores, one row or column of them, or one number, where the mask is broadcast. `square` is
// shared.
template <class Scalar, class T = accumulate_t<Scalar>>
__device__ void store_sums(const AttentionArgs<Scalar>& args, int64_t offset, int64_t first_row, int64_t first_column,
                           const Scores<Scalar>& sums, T* square) {
  constexpr int kColumns = kScoreColumns<Scalar>, kPitch = kColumns + 1;
  const AttentionMask<void*>& mask = args.grad_mask;
  __syncthreads();  // of the last slabs, which were here
#pragma unroll
  for (int j = 0; j < kScoreTiles<Scalar>; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const ScorePlace at({0, 0, 0, 0, 0}, j, i);
      square[at.row * kPitch + at.column] = sums[j][i];
    }
  }
  __syncthreads();
  const int rows = mask.row_stride == 0 ? 1 : kAttentionBlock, columns = mask.column_stride == 0 ? 1 : kColumns;
  for (int place = static_cast<int>(threadIdx.x); place < rows * columns; place += kAttentionThreads) {
    const int row = place / columns, column = place % columns;
    if (rows > 1 && first_row + row >= args.sizes.query_length) continue;
    if (columns > 1 && first_column + column >= args.sizes.key_length) continue;
    T sum = T(0);
    for (int r = row; r < (rows > 1 ? row + 1 : kAttentionBlock); ++r) {
      for (int c = column; c < (columns > 1 ? column + 1 : kColumns); ++c) sum += square[r * kPitch + c];
    }
    store_element<Scalar>(
        mask, offset + (first_row + row) * mask.row_stride + (first_column + column) * mask.column_stride, sum);
  }
}

template <class Pass, class Scalar = typename Pass::Scalar>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    sum_score_gradients(const __grid_constant__ AttentionArgs<Scalar> args, const __grid_constant__ MaskHeads heads) {
  const int64_t row_blocks = ceil_div(args.sizes.query_length, kAttentionBlock);
  const int64_t column_blocks = ceil_div(args.sizes.key_length, kScoreColumns<Scalar>);
  const bool all_rows = args.grad_mask.row_stride == 0, all_columns = args.grad_mask.column_stride == 0;
  const int64_t own_rows = all_rows ? 1 : row_blocks, own_columns = all_columns ? 1 : column_blocks;
  const int64_t column = blockIdx.x % own_columns, row = blockIdx.x / own_columns % own_rows;
  const int64_t owned = blockIdx.x / own_columns / own_rows;
  const int64_t turns_of_rows = all_rows ? row_blocks : 1, turns_of_columns = all_columns ? column_blocks : 1;
  Pass pass(args);
  Scores<Scalar> sums = {};
  auto block_of = [&](int64_t i) {
    const int64_t place = heads.place(owned, i / turns_of_columns / turns_of_rows), head = place % args.sizes.heads;
    return ScoreBlock{static_cast<int>(place / args.sizes.heads), static_cast<int>(head),
                      static_cast<int>(head / args.group()),
                      (row + i / turns_of_columns % turns_of_rows) * kAttentionBlock,
                      (column + i % turns_of_columns) * kScoreColumns<Scalar>};
  };
  pass.run(heads.shared * turns_of_rows * turns_of_columns, 0, block_of,
           [&](const ScoreBlock& block, auto& scores, auto& second) {
             weigh<Pass>(args, block, scores, second);
#pragma unroll
             for (int j = 0; j < kScoreTiles<Scalar>; ++j) {
#pragma unroll
               for (int i = 0; i < 4; ++i) sums[j][i] += scores[j][i];
             }
           });
  store_sums(args, heads.offset(owned), row * kAttentionBlock, column * kScoreColumns<Scalar>, sums,
             shared_memory<accumulate_t<Scalar>>());
}

}  // namespace

template <class Scalar>
void attention_mask_gradient(const AttentionArgs<Scalar>& common, const AttentionMask<void*>& gradient) {
  using Pass = AttentionBlock<Scalar, AttentionPass::mask, 0>;
  AttentionArgs<Scalar> args = common;
  args.grad_mask = gradient;
  args.column_parts = 1;
  const AttentionSizes& sizes = args.sizes;
  const MaskHeads heads(sizes, gradient);
  const int64_t rows = gradient.row_stride == 0 ? 1 : ceil_div(sizes.query_length, kAttentionBlock);
  const int64_t columns = gradient.column_stride == 0 ? 1 : ceil_div(sizes.key_length, kScoreColumns<Scalar>);
  const int64_t square_bytes = kAttentionBlock * (kScoreColumns<Scalar> + 1) * sizeof(accumulate_t<Scalar>);
  const int64_t ring_bytes = Pass::shared_bytes(sizes, false);
  launch({heads.owned * rows * columns, kAttentionThreads, ring_bytes > square_bytes ? ring_bytes : square_bytes},
         sum_score_gradients<Pass>, args, heads);
}

template void attention_mask_gradient(const AttentionArgs<float>&, const AttentionMask<void*>&);
template void attention_mask_gradient(const AttentionArgs<double>&, const AttentionMask<void*>&);
template void attention_mask_gradient(const AttentionArgs<bfloat16>&, const AttentionMask<void*>&);
template void attention_mask_gradient(const AttentionArgs<float16>&, const AttentionMask<void*>&);

}  // namespace dlkernels::DLKERNELS_ISA
