// Attention backward, for query, key and value: see cpu/attention.h for the idea, attention_pass.cuh for the passes.
//
// Each gradient is a pass of its own, which computes the scores again: seven products more than four, and in return no
// sum that blocks add to, and no memory but D.
#include "cuda/attention_gradient.cuh"
#include "cuda/attention_parts.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// The blocks of scores of a block of keys: all query blocks, of each head that shares them.
struct QueryBlocks {
  ScoreBlock first;
  int64_t group, blocks, skipped;  // skipped: those whose queries come before all keys of a causal mask

  __device__ QueryBlocks(const ScoreBlock& at, int64_t heads_of_group, int64_t query_length, bool is_causal)
      : first(at), group(heads_of_group), skipped(is_causal ? at.first_row / kAttentionBlock : 0) {
    const int64_t all = ceil_div(query_length, kAttentionBlock);
    blocks = all > skipped ? all - skipped : 0;
  }
  __device__ int64_t count() const { return group * blocks; }
  __device__ ScoreBlock operator()(int64_t i) const {
    ScoreBlock block = first;
    block.head = first.kv_head * group + i / blocks;
    block.first_column = (skipped + i % blocks) * kAttentionBlock;
    return block;
  }
};

template <class Pass, class Scalar = typename Pass::Scalar>
__device__ void store_result(const Pass& pass, const AttentionArgs<Scalar>& args, const ScoreBlock& first, int64_t head,
                             int64_t rows, int64_t width, int64_t part) {
  Scalar* out = head_of<Scalar>(args.sizes, args.result, first.batch, head);
#pragma unroll
  for (int t = 0; t < Pass::columns / kUnitColumns; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = ScorePlace(first, 0, half * 2).row;
      const int64_t column = part * Pass::columns + t * kUnitColumns + Lane().column;
      if (row >= rows || column >= width) continue;
      const auto* sums = pass.result[t / Pass::result_tiles][t % Pass::result_tiles] + half * 2;
      store_pair(out + row * args.result.row_stride + column, {narrow<Scalar>(sums[0]), narrow<Scalar>(sums[1])},
                 column + 1 < width ? 2 : 1);
    }
  }
}

template <class Pass, class Scalar = typename Pass::Scalar>
__global__ void __launch_bounds__(kAttentionThreads, 1) differentiate(AttentionArgs<Scalar> args) {
  const AttentionSizes& sizes = args.sizes;
  constexpr bool of_queries = Pass::rows_are_queries;
  const int64_t heads = of_queries ? sizes.heads : sizes.kv_heads;
  const int64_t rows = of_queries ? sizes.query_length : sizes.key_length;
  const int64_t row_blocks = ceil_div(rows, kAttentionBlock);
  const int64_t part = blockIdx.x % args.column_parts, place = blockIdx.x / args.column_parts;
  const int64_t head = place % heads, batch = place / heads % sizes.batches, turn = place / heads / sizes.batches;
  // Those that see most under a causal mask come first: late queries, and early keys.
  const int64_t row_block = of_queries ? row_blocks - 1 - turn : turn;
  const ScoreBlock first = {batch, head, of_queries ? head / args.group() : head, row_block * kAttentionBlock, 0};
  Pass pass(args);
  auto body = [&](const ScoreBlock& block, auto& scores, auto& second) { weigh<Pass>(args, block, scores, second); };
  const int64_t first_slab = part * (Pass::columns / Pass::Slab::depth);
  if constexpr (of_queries) {
    const int64_t past_rows = first.first_row + kAttentionBlock;
    const int64_t seen = args.is_causal && past_rows < sizes.key_length ? past_rows : sizes.key_length;
    auto block_of = [&](int64_t i) {
      ScoreBlock block = first;
      block.first_column = i * kAttentionBlock;
      return block;
    };
    pass.run(ceil_div(seen, kAttentionBlock), first_slab, block_of, body);
  } else {
    const QueryBlocks blocks(first, args.group(), sizes.query_length, args.is_causal);
    pass.run(blocks.count(), first_slab, blocks, body);
  }
  store_result(pass, args, first, head, rows, Pass::pass == AttentionPass::value ? sizes.value_size : sizes.head_size,
               part);
}

template <AttentionPass kPass, class Scalar>
void launch_gradient(AttentionArgs<Scalar> args, const AttentionTensor<void*>& result) {
  if (result.data == nullptr) return;
  constexpr bool of_queries = kPass == AttentionPass::query;
  const AttentionSizes& sizes = args.sizes;
  args.result = result, args.keeps_rows = true;
  const int64_t blocks = sizes.batches * (of_queries ? sizes.heads : sizes.kv_heads) *
                         ceil_div(of_queries ? sizes.query_length : sizes.key_length, kAttentionBlock);
  const int64_t columns = kPass == AttentionPass::value ? sizes.value_size : sizes.head_size;
  with_column_slabs<Scalar>(columns, [&](auto slabs) {
    using Pass = AttentionBlock<Scalar, kPass, slabs()>;
    launch_pass<Pass>(args, blocks, columns, differentiate<Pass>);
  });
}

template <class Scalar>
void backward_typed(const AttentionBackwardArgs& given) {
  const AttentionArgs<Scalar> args = gradient_args<Scalar>(given);
  launch_gradient<AttentionPass::query>(args, given.grad_query);
  launch_gradient<AttentionPass::key>(args, given.grad_key);
  launch_gradient<AttentionPass::value>(args, given.grad_value);
  if (given.grad_mask.type != AttentionMaskType::none) attention_mask_gradient(args, given.grad_mask);
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& args) {
  dispatch(args.dtype, [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace dlkernels::DLKERNELS_ISA
