// What the gradients of attention share: probabilities from the rows' statistics, and the gradient of the scores.
#pragma once

#include "cuda/attention_pass.cuh"

namespace dlkernels::DLKERNELS_ISA {

// Of a query: its maximum, infinite where it saw nothing but -inf; 1 / its sum, zero there; and D.
template <class T>
struct QueryStatistics {
  T maximum, factor, dot;
};

template <class Scalar>
__device__ __forceinline__ QueryStatistics<accumulate_t<Scalar>> statistics_of(const AttentionArgs<Scalar>& args,
                                                                               const ScoreBlock& block, int64_t query) {
  using T = accumulate_t<Scalar>;
  if (query >= args.sizes.query_length) return {static_cast<T>(INFINITY), T(0), T(0)};
  const int64_t line = args.line(block.batch, block.head) + query;
  const T maximum = args.maxima[line], sum = args.sums[line];
  return {maximum == -static_cast<T>(INFINITY) ? static_cast<T>(INFINITY) : maximum, sum == T(0) ? T(0) : T(1) / sum,
          args.dots == nullptr ? T(0) : args.dots[line]};
}

// Scores become the weights of a pass: dS scale, dS (of a mask), or what dropout leaves of P.
template <class Pass, class Scalar, int kSecondTiles, class T = accumulate_t<Scalar>>
__device__ void weigh(const AttentionArgs<Scalar>& args, const ScoreBlock& block, Scores<Scalar>& scores,
                      const accumulate_t<Scalar> (&second)[kSecondTiles][4]) {
  const ScoreRules<Scalar> rules(args, block, Pass::rows_are_queries);
  const T scale = Pass::pass == AttentionPass::mask ? T(1) : args.scale;
  auto probability = [&](T score, const QueryStatistics<T>& of_query) {
    // Turned products may round otherwise than forward's; of huge scores that is no small exponent. NaN stays.
    const T difference = score > of_query.maximum ? T(0) : score - of_query.maximum;
    return exp(difference * args.weight_scale) * of_query.factor;
  };
  auto weight = [&](int j, int i, int64_t query, int64_t key, const QueryStatistics<T>& of_query, bool kept) {
    const T p = rules.exists(query, key) ? probability(rules.score(scores[j][i], query, key), of_query) : T(0);
    if constexpr (Pass::has_second) {
      const T grad_p = kept ? second[j][i] * args.kept : T(0);
      return p * (grad_p - of_query.dot) * scale;
    } else {
      return kept ? p * args.kept : T(0);
    }
  };
  if constexpr (Pass::rows_are_queries) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t query = ScorePlace(block, 0, half * 2).row;
      const QueryStatistics<T> of_query = statistics_of(args, block, query);
      const uint32_t kept = rules.kept_of_row(query);
#pragma unroll
      for (int j = 0; j < kScoreTiles<Scalar>; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = half * 2 + e;
          scores[j][i] = weight(j, i, query, ScorePlace(block, j, i).column, of_query, (kept >> (2 * j + e) & 1) != 0);
        }
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kScoreTiles<Scalar>; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t query = ScorePlace(block, j, e).column;
        const QueryStatistics<T> of_query = statistics_of(args, block, query);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = half * 2 + e;
          const int64_t key = ScorePlace(block, j, i).row;
          scores[j][i] = weight(j, i, query, key, of_query, rules.is_kept(query, key));
        }
      }
    }
  }
}

// D = sum over the columns of dO O: a warp a row.
template <class Scalar, class Output>
__global__ void __launch_bounds__(256, 1)
    compute_dots(AttentionSizes sizes, AttentionTensor<const void*> grad_output, AttentionTensor<const void*> output,
                 accumulate_t<Scalar>* dots) {
  using T = accumulate_t<Scalar>;
  const int64_t line = (int64_t{blockIdx.x} * 256 + threadIdx.x) / kWarpSize, row = line % sizes.query_length;
  const int64_t head = line / sizes.query_length % sizes.heads, batch = line / sizes.query_length / sizes.heads;
  if (batch >= sizes.batches) return;
  const Scalar* gradient = head_of<const Scalar>(sizes, grad_output, batch, head) + row * grad_output.row_stride;
  const Output* out = head_of<const Output>(sizes, output, batch, head) + row * output.row_stride;
  T sum = T(0);
  for (int64_t c = threadIdx.x % kWarpSize; c < sizes.value_size; c += kWarpSize)
    sum += widen(gradient[c]) * widen(out[c]);
  sum = reduce_warp(sum, Add());
  if (threadIdx.x % kWarpSize == 0) dots[line] = sum;
}

// ---- a gradient from a pass ----------------------------------------------------------------------------------------

// The blocks of scores of a block of keys: all query blocks, of each head that shares them.
template <int kQueries>
struct QueryBlocks {
  ScoreBlock first;
  int64_t group, blocks, skipped;  // skipped: those whose queries come before all keys of a causal mask

  __device__ QueryBlocks(const ScoreBlock& at, int64_t heads_of_group, int64_t query_length, bool is_causal)
      : first(at), group(heads_of_group), skipped(is_causal ? at.first_row / kQueries : 0) {
    const int64_t all = ceil_div(query_length, kQueries);
    blocks = all > skipped ? all - skipped : 0;
  }
  __device__ int64_t count() const { return group * blocks; }
  __device__ ScoreBlock operator()(int64_t i) const {
    ScoreBlock block = first;
    block.head = static_cast<int>(first.kv_head * group + i / blocks);
    block.first_column = (skipped + i % blocks) * kQueries;
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
__global__ void __launch_bounds__(kAttentionThreads, 1)
    differentiate(const __grid_constant__ AttentionArgs<Scalar> args) {
  const AttentionSizes& sizes = args.sizes;
  constexpr bool of_queries = Pass::rows_are_queries;
  const int64_t heads = of_queries ? sizes.heads : sizes.kv_heads;
  const int64_t rows = of_queries ? sizes.query_length : sizes.key_length;
  const int64_t row_blocks = ceil_div(rows, kAttentionBlock);
  const int64_t part = blockIdx.x % args.column_parts, place = blockIdx.x / args.column_parts;
  const int64_t turn = place / heads / sizes.batches;
  const int head = static_cast<int>(place % heads), batch = static_cast<int>(place / heads % sizes.batches);
  // Those that see most under a causal mask come first: late queries, and early keys.
  const int64_t row_block = of_queries ? row_blocks - 1 - turn : turn;
  const ScoreBlock first = {batch, head, static_cast<int>(of_queries ? head / args.group() : head),
                            row_block * kAttentionBlock, 0};
  Pass pass(args);
  auto body = [&](const ScoreBlock& block, auto& scores, auto& second) { weigh<Pass>(args, block, scores, second); };
  const int64_t first_slab = part * (Pass::columns / Pass::Slab::depth);
  if constexpr (of_queries) {
    const int64_t past_rows = first.first_row + kAttentionBlock;
    const int64_t seen = args.is_causal && past_rows < sizes.key_length ? past_rows : sizes.key_length;
    auto block_of = [&](int64_t i) {
      ScoreBlock block = first;
      block.first_column = i * kScoreColumns<Scalar>;
      return block;
    };
    pass.run(ceil_div(seen, kScoreColumns<Scalar>), first_slab, block_of, body);
  } else {
    const QueryBlocks<kScoreColumns<Scalar>> blocks(first, args.group(), sizes.query_length, args.is_causal);
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
AttentionArgs<Scalar> gradient_args(const AttentionBackwardArgs& given) {
  using T = accumulate_t<Scalar>;
  const AttentionSizes& sizes = given.sizes;
  AttentionArgs<Scalar> args = common_args<Scalar>(given, const_cast<void*>(given.statistics));
  args.grad_output =
      with_aligned_rows<Scalar>(sizes, given.grad_output, sizes.heads, sizes.query_length, sizes.value_size);
  const int64_t lines = sizes.batches * sizes.heads * sizes.query_length;
  T* dots = workspace<T>(lines);
  // The rounding of a half-precision output would be most of the error of D.
  constexpr bool is_rounded = !std::is_same_v<Scalar, T>;
  launch({ceil_div(lines, 256 / kWarpSize), 256}, compute_dots<Scalar, T>, sizes, given.grad_output,
         is_rounded ? given.exact_output : given.output, dots);
  args.dots = dots;
  return args;
}

}  // namespace dlkernels::DLKERNELS_ISA
