// Attention forward: see cpu/attention.h for the idea, attention_pass.cuh for the passes.
//
// Weights are exp(scale (score - the row's largest so far)); a larger one rescales what was summed before (online
// softmax). The lanes that share a row find its maximum together and keep their own sums until the end. Late rows,
// which see most under a causal mask, come first.
#include "cuda/attention_parts.cuh"
#include "cuda/attention_pass.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// Over the four lanes that have a row.
template <class T, class Combine>
__device__ __forceinline__ T reduce_row(T value, Combine combine) {
  value = combine(value, __shfl_xor_sync(kAllLanes, value, 1));
  return combine(value, __shfl_xor_sync(kAllLanes, value, 2));
}

// The softmax of two rows, as far as their keys have passed.
template <class T>
struct RowSoftmax {
  T maximum[2] = {-static_cast<T>(INFINITY), -static_cast<T>(INFINITY)};
  T sum[2] = {T(0), T(0)};  // of this lane

  // Scores become weights; returns in `decay` what sums before have to be multiplied by.
  template <class Scalar>
  __device__ void soften(const ScoreRules<Scalar>& rules, Scores<Scalar>& scores, T (&decay)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T largest = maximum[half];
#pragma unroll
      for (int j = 0; j < kScoreTiles<Scalar>; ++j) {
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) {
          const ScorePlace at(rules.block, j, i);
          scores[j][i] = rules.exists(at.row, at.column) ? rules.score(scores[j][i], at.row, at.column)
                                                         : -static_cast<T>(INFINITY);
          largest = Greater()(scores[j][i], largest);
        }
      }
      largest = reduce_row(largest, Greater());
      const T shift = largest == -static_cast<T>(INFINITY) ? T(0) : largest;
      decay[half] = exp((maximum[half] - shift) * rules.args.weight_scale);
      maximum[half] = largest;
      sum[half] *= decay[half];
      const uint32_t kept = rules.kept_of_row(ScorePlace(rules.block, 0, half * 2).row);
#pragma unroll
      for (int j = 0; j < kScoreTiles<Scalar>; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          T& weight = scores[j][half * 2 + e];
          weight = exp((weight - shift) * rules.args.weight_scale);
          sum[half] += weight;
          if ((kept >> (2 * j + e) & 1) == 0) weight = T(0);
        }
      }
    }
  }
};

template <class Pass, class Scalar = typename Pass::Scalar>
__global__ void __launch_bounds__(kAttentionThreads, 1) attend(const __grid_constant__ AttentionArgs<Scalar> args) {
  using T = accumulate_t<Scalar>;
  const AttentionSizes& sizes = args.sizes;
  const int64_t row_blocks = ceil_div(sizes.query_length, kAttentionBlock);
  const int64_t part = blockIdx.x % args.column_parts, place = blockIdx.x / args.column_parts;
  const int head = static_cast<int>(place % sizes.heads);
  const int batch = static_cast<int>(place / sizes.heads % sizes.batches);
  const int64_t row_block = row_blocks - 1 - place / sizes.heads / sizes.batches;
  const ScoreBlock first = {batch, head, static_cast<int>(head / args.group()), row_block * kAttentionBlock, 0};
  const int64_t past_rows = first.first_row + kAttentionBlock;
  const int64_t seen = args.is_causal && past_rows < sizes.key_length ? past_rows : sizes.key_length;

  Pass pass(args);
  RowSoftmax<T> rows;
  auto block_of = [&](int64_t i) {
    ScoreBlock block = first;
    block.first_column = i * kScoreColumns<Scalar>;
    return block;
  };
  pass.run(ceil_div(seen, kScoreColumns<Scalar>), part * (Pass::columns / Pass::Slab::depth), block_of,
           [&](const ScoreBlock& block, auto& scores, auto&) {
             T decay[2];
             rows.soften(ScoreRules<Scalar>(args, block, true), scores, decay);
#pragma unroll
             for (auto& slab : pass.result) {
#pragma unroll
               for (auto& tile : slab) {
#pragma unroll
                 for (int i = 0; i < 4; ++i) tile[i] *= decay[i / 2];
               }
             }
           });

  Scalar* out = head_of<Scalar>(sizes, args.result, batch, head);
  float* exact = args.exact_result.data == nullptr ? nullptr : head_of<float>(sizes, args.exact_result, batch, head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const ScorePlace at(first, 0, half * 2);
    const T sum = reduce_row(rows.sum[half], Add()), factor = sum == T(0) ? T(0) : args.kept / sum;
    if (at.row >= sizes.query_length) continue;
    if (part == 0 && Lane().column == 0) {
      args.maxima[args.line(batch, head) + at.row] = rows.maximum[half];
      args.sums[args.line(batch, head) + at.row] = sum;
    }
#pragma unroll
    for (int t = 0; t < Pass::columns / kUnitColumns; ++t) {
      const T* sums = pass.result[t / Pass::result_tiles][t % Pass::result_tiles] + half * 2;
      const int64_t column = part * Pass::columns + t * kUnitColumns + Lane().column;
      if (column >= sizes.value_size) continue;
      const T values[2] = {sums[0] * factor, sums[1] * factor};
      const int count = column + 1 < sizes.value_size ? 2 : 1;
      store_pair(out + at.row * args.result.row_stride + column, {narrow<Scalar>(values[0]), narrow<Scalar>(values[1])},
                 count);
      if (exact == nullptr) continue;
      store_pair(exact + at.row * args.exact_result.row_stride + column,
                 {static_cast<float>(values[0]), static_cast<float>(values[1])}, count);
    }
  }
}

template <class Scalar>
void forward_typed(const AttentionForwardArgs& given) {
  const AttentionSizes& sizes = given.sizes;
  AttentionArgs<Scalar> args = common_args<Scalar>(given, given.statistics);
  args.result = given.output, args.exact_result = given.exact_output;
  args.keeps_rows = true;
  const int64_t blocks = sizes.batches * sizes.heads * ceil_div(sizes.query_length, kAttentionBlock);
  const int64_t columns = sizes.value_size > 0 ? sizes.value_size : 1;  // statistics are wanted in any case
  with_column_slabs<Scalar>(sizes.value_size, [&](auto slabs) {
    using Pass = AttentionBlock<Scalar, AttentionPass::forward, slabs()>;
    launch_pass<Pass>(args, blocks, columns, attend<Pass>);
  });
}

}  // namespace

void attention_forward(const AttentionForwardArgs& args) {
  dispatch(args.dtype, [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace dlkernels::DLKERNELS_ISA
