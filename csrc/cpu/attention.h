// Scaled dot-product attention without its L x S matrices (Dao et al., "FlashAttention", 2022), on raw pointers.
//
//   S = scale Q K^T + mask      P_ij = exp(S_ij - max_i) / sum_i      O = dropout(P) V
//
// forward   attention_forward.cc: online softmax over blocks of keys; each row's largest score and sum are kept.
// backward  attention_backward.cc; with D_i = sum_j dP_ij P_ij = dO_i . O_i:
//             dV = P^T dO     dP = dO V^T     dS = P (dP - D) scale     dQ = dS K     dK = dS^T Q
// mask      A float mask that wants its gradient gets it from a pass of its own, attention_mask_gradient.cc.
// dropout   The keep mask is drawn again in backward from (seed, head, row, column); see philox.h.
//
// Reads every input once per task; 4 L S E operations a head forward, 10 L S E backward (14 with a mask's gradient).
// Tasks, blocks and the order of every sum follow from the shape alone.
#pragma once

#include "types.h"

namespace dlkernels {

// Leading dimensions before the heads; every tensor has its own strides over them, zero where it is broadcast.
inline constexpr int64_t kAttentionBatchDims = 16;

// What the tensors of one call have in common.
struct AttentionSizes {
  int64_t batch_dims;                        // how many of batch_sizes count
  int64_t batch_sizes[kAttentionBatchDims];  // outermost first
  int64_t batches;                           // their product
  int64_t heads;                             // of query, output and mask; a multiple of kv_heads
  int64_t kv_heads;                          // of key and value: head h reads kv head h / (heads / kv_heads)
  int64_t query_length;                      // L
  int64_t key_length;                        // S
  int64_t head_size;                         // E, of query and key
  int64_t value_size;                        // E_v, of value and output
};

// A tensor [batch..., heads, rows, columns] of the call's element type. Strides count elements; columns are contiguous.
template <class Pointer>
struct AttentionTensor {
  Pointer data;
  int64_t batch_strides[kAttentionBatchDims];
  int64_t head_stride;
  int64_t row_stride;
};

enum class AttentionMaskType : int32_t { none, boolean, element, float32 };  // element: the call's element type

// A mask seen as [batch..., heads, L, S], never expanded in memory: strides are zero where it is broadcast.
template <class Pointer>
struct AttentionMask {
  AttentionMaskType type;
  Pointer data;  // null where type is none
  int64_t batch_strides[kAttentionBatchDims];
  int64_t head_stride;
  int64_t row_stride;
  int64_t column_stride;
};

struct AttentionForwardArgs {
  DType dtype;
  AttentionSizes sizes;
  AttentionTensor<const void*> query;   // [..., heads, L, E]
  AttentionTensor<const void*> key;     // [..., kv_heads, S, E]
  AttentionTensor<const void*> value;   // [..., kv_heads, S, E_v]
  AttentionMask<const void*> mask;      // boolean: false adds -inf; otherwise added to the scaled scores
  bool is_causal;                       // row i sees keys 0 .. i
  double scale;                         // of the scores
  double dropout_p;                     // of the probabilities, in [0, 1]
  const uint64_t* dropout_seed;         // [1], read where dropout_p > 0
  AttentionTensor<void*> output;        // [..., heads, L, E_v]; aliases nothing
  AttentionTensor<void*> exact_output;  // as output, in float32; data null for float32 and float64
  void* statistics;                     // [2, batches, heads, L], contiguous, of the type that sums have: each row's
                                        // largest score (without a mask and of a positive scale: before it is scaled),
                                        // and its sum of exp(score - largest)
};

struct AttentionBackwardArgs {
  DType dtype;
  AttentionSizes sizes;
  AttentionTensor<const void*> grad_output;  // as output
  AttentionTensor<const void*> query, key, value, output, exact_output;
  const void* statistics;
  AttentionMask<const void*> mask;
  bool is_causal;
  double scale;
  double dropout_p;
  const uint64_t* dropout_seed;
  AttentionTensor<void*> grad_query;  // [..., heads, L, E]; data null where it is not wanted
  AttentionTensor<void*> grad_key;    // [..., kv_heads, S, E]; data null where it is not wanted
  AttentionTensor<void*> grad_value;  // [..., kv_heads, S, E_v]; data null where it is not wanted
  AttentionMask<void*> grad_mask;     // type none where it is not wanted; holds grad_mask_size elements, contiguous
  int64_t grad_mask_size;
};

struct AttentionKernels {
  void (*forward)(const AttentionForwardArgs&);
  void (*backward)(const AttentionBackwardArgs&);
};

}  // namespace dlkernels

#if defined(DLKERNELS_ISA)
namespace dlkernels::DLKERNELS_ISA {
void attention_forward(const AttentionForwardArgs& args);
void attention_backward(const AttentionBackwardArgs& args);  // query, key and value; a mask by the next
void attention_mask_gradient(const AttentionBackwardArgs& args);
AttentionKernels attention_kernels();
}  // namespace dlkernels::DLKERNELS_ISA
#endif
