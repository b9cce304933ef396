// What attention's passes share: where heads and masks lie, and how work is cut.
#pragma once

#include "attention.h"
#include "gemm.h"
#include "philox.h"
#include "vmath.h"

namespace dlkernels::DLKERNELS_ISA {

// ---- cutting work --------------------------------------------------------------------------------------------------

inline constexpr int64_t kWantedTasks = 16;  // what a call is split into, where its shape allows

// `length` in blocks of about equal size: at most `block` long, a multiple of `multiple`.
inline int64_t balanced_block(int64_t length, int64_t block, int64_t multiple) {
  const int64_t blocks = max_of(ceil_div(length, block), 1);
  return max_of(round_up(ceil_div(length, blocks), multiple), multiple);
}

// The i-th to run of `count` pieces, taken from both ends in turn: under a causal mask pieces grow or shrink steadily,
// and contiguous ranges of tasks then have the same work.
inline int64_t from_both_ends(int64_t i, int64_t count) {
  return i % 2 == 0 ? i / 2 : count - 1 - i / 2;
}

// Whether a kv head has too few query rows to pay for packing keys and values: a step of generation. Both directions
// then take their scores by dot(), so that they have the same bits.
inline bool has_few_rows(const AttentionSizes& sizes) {
  return sizes.heads / sizes.kv_heads * sizes.query_length <= 2;
}

// A call of little work stays on one thread.
inline int64_t grain_of(const AttentionSizes& sizes, int64_t tasks) {
  const double multiply_adds = static_cast<double>(sizes.batches) * sizes.heads * sizes.query_length *
                               sizes.key_length * (sizes.head_size + sizes.value_size);
  return multiply_adds < 2e5 ? tasks : 1;
}

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// ---- where things are ----------------------------------------------------------------------------------------------

inline int64_t batch_offset(const AttentionSizes& sizes, const int64_t* strides, int64_t batch) {
  int64_t offset = 0;
  for (int64_t d = sizes.batch_dims - 1; d >= 0; --d) {
    offset += batch % sizes.batch_sizes[d] * strides[d];
    batch /= sizes.batch_sizes[d];
  }
  return offset;
}

// One head of a tensor: rows of contiguous columns.
template <class Scalar>
struct Head {
  Scalar* data;
  int64_t row_stride;
  Scalar* row(int64_t i) const { return data + i * row_stride; }
};

template <class Scalar>
inline Head<const Scalar> head_of(const AttentionSizes& sizes, const AttentionTensor<const void*>& tensor,
                                  int64_t batch, int64_t head) {
  const int64_t offset = batch_offset(sizes, tensor.batch_strides, batch) + head * tensor.head_stride;
  return {static_cast<const Scalar*>(tensor.data) + offset, tensor.row_stride};
}
template <class Scalar>
inline Head<Scalar> head_of(const AttentionSizes& sizes, const AttentionTensor<void*>& tensor, int64_t batch,
                            int64_t head) {
  const int64_t offset = batch_offset(sizes, tensor.batch_strides, batch) + head * tensor.head_stride;
  return {static_cast<Scalar*>(tensor.data) + offset, tensor.row_stride};
}

// ---- the mask ------------------------------------------------------------------------------------------------------

// What is added to `count` scores of row `row`, from column `column` on: use(i, value) for each.
template <class Scalar, class Use>
inline void visit_mask_row(const AttentionMask<const void*>& mask, int64_t head_offset, int64_t row, int64_t column,
                           int64_t count, Use&& use) {
  using T = accumulate_t<Scalar>;
  const int64_t stride = mask.column_stride;
  const int64_t offset = head_offset + row * mask.row_stride + column * stride;
  auto visit = [&](auto* data, auto&& value) {
    const auto* p = data + offset;
    if (stride == 1) {  // said apart, so that it can be vectorised
      for (int64_t i = 0; i < count; ++i) use(i, value(p + i));
    } else {
      for (int64_t i = 0; i < count; ++i) use(i, value(p + i * stride));
    }
  };
  switch (mask.type) {
    case AttentionMaskType::none:
      return;
    case AttentionMaskType::boolean:
      return visit(static_cast<const uint8_t*>(mask.data), [](const uint8_t* p) { return *p ? T(0) : -kInfinity<T>; });
    case AttentionMaskType::element:
      return visit(static_cast<const Scalar*>(mask.data), [](const Scalar* p) { return load_one(p); });
    case AttentionMaskType::float32:
      return visit(static_cast<const float*>(mask.data), [](const float* p) { return static_cast<T>(*p); });
  }
}

inline int64_t mask_head_offset(const AttentionSizes& sizes, const AttentionMask<const void*>& mask, int64_t batch,
                                int64_t head) {
  return batch_offset(sizes, mask.batch_strides, batch) + head * mask.head_stride;
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// Rows [begin, ...) of a head as the rows, or as the columns, of an operand.
template <class Scalar>
inline Matrix<Scalar> rows_of(Head<const Scalar> head, int64_t begin) {
  return {head.row(begin), head.row_stride, 1};
}
template <class Scalar>
inline Matrix<Scalar> columns_of(Head<const Scalar> head, int64_t begin) {
  return rows_of(head, begin).transposed();
}

template <class T>
inline void scale_row(T* row, int64_t count, T factor) {
  int64_t i = 0;
  for (; i + Vec<T>::size <= count; i += Vec<T>::size) store(row + i, load(row + i) * Vec<T>(factor));
  if (i < count) store(row + i, load(row + i, count - i) * Vec<T>(factor), count - i);
}

template <class A, class B>
inline accumulate_t<A> dot(const A* a, const B* b, int64_t count) {
  using T = accumulate_t<A>;
  constexpr int64_t lanes = Vec<T>::size;
  Vec<T> first = Vec<T>::zero(), second = Vec<T>::zero();  // short sums round less, and wait less for each other
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    first = fma(load(a + i), load(b + i), first);
    second = fma(load(a + i + lanes), load(b + i + lanes), second);
  }
  if (i + lanes <= count) first = fma(load(a + i), load(b + i), first), i += lanes;
  if (i < count) second = fma(load(a + i, count - i), load(b + i, count - i), second);
  return reduce_add(first + second);
}

}  // namespace dlkernels::DLKERNELS_ISA
