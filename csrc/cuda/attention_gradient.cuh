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
template <class Pass, class Scalar, class T, int kSecondTiles>
__device__ void weigh(const AttentionArgs<Scalar>& args, const ScoreBlock& block, T (&scores)[kScoreTiles][4],
                      const T (&second)[kSecondTiles][4]) {
  const ScoreRules<Scalar> rules(args, block);
  const T scale = Pass::pass == AttentionPass::mask ? T(1) : args.scale;
  auto weight = [&](int j, int i, int64_t query, int64_t key, const QueryStatistics<T>& of_query, bool kept) {
    const T p = rules.exists(query, key)
                    ? exp(rules.score(scores[j][i], query, key) - of_query.maximum) * of_query.factor
                    : T(0);
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
      for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = half * 2 + e;
          scores[j][i] = weight(j, i, query, ScorePlace(block, j, i).column, of_query, (kept >> (2 * j + e) & 1) != 0);
        }
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
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
