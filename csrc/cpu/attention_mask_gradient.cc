// The gradient of attention's float mask: the scores' gradient, summed over what the mask is broadcast to. Tasks own
// mask elements and visit, in order, every head that shares them, so that no two tasks add to one element. The gradient
// is taken in the type of the sums: it is not rounded on the way.
#include "attention_backward.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// The heads of a call split by whether the mask is its own for them: of `owned` tuples each is broadcast to `shared`
// heads. The dimensions are the batch dimensions and, last, the heads.
struct MaskHeads {
  int64_t dims, sizes[kAttentionBatchDims + 1];
  bool broadcast[kAttentionBatchDims + 1];
  int64_t owned = 1, shared = 1;

  MaskHeads(const AttentionSizes& call, const AttentionMask<void*>& mask) : dims(call.batch_dims + 1) {
    for (int64_t d = 0; d < dims; ++d) {
      const bool is_head = d == dims - 1;
      sizes[d] = is_head ? call.heads : call.batch_sizes[d];
      broadcast[d] = (is_head ? mask.head_stride : mask.batch_strides[d]) == 0;
      (broadcast[d] ? shared : owned) *= sizes[d];
    }
  }

  // The place, counted over batches x heads, of the j-th head that shares the i-th tuple's mask.
  int64_t place(int64_t i, int64_t j) const {
    int64_t place = 0, weight = 1;
    for (int64_t d = dims - 1; d >= 0; --d) {
      int64_t& index = broadcast[d] ? j : i;
      place += index % sizes[d] * weight;
      index /= sizes[d];
      weight *= sizes[d];
    }
    return place;
  }
};

// Adds a block of dS^T to the mask's elements: element (q, k) is at q * row_stride + k * column_stride. A block is
// summed along what is broadcast before it is added.
template <class T>
void add_block_to_mask(const T* gradient, int64_t stride, int64_t keys, int64_t queries, T* at, int64_t row_stride,
                       int64_t column_stride) {
  T total = 0;
  for (int64_t k = 0; k < keys; ++k) {
    const T* line = gradient + k * stride;
    if (row_stride != 0) {
      for (int64_t q = 0; q < queries; ++q) at[q * row_stride + k * column_stride] += line[q];
    } else {
      Vec<T> sum = Vec<T>::zero();
      int64_t q = 0;
      for (; q + Vec<T>::size <= queries; q += Vec<T>::size) sum += load(line + q);
      if (q < queries) sum += load(line + q, queries - q);
      if (column_stride != 0) {
        at[k * column_stride] += reduce_add(sum);
      } else {
        total += reduce_add(sum);
      }
    }
  }
  if (row_stride == 0 && column_stride == 0) *at += total;
}

// The elements that a task owns become zero.
template <class T>
void clear_task(const AttentionBackwardArgs& args, const MaskHeads& heads, int64_t owned, int64_t first_key,
                int64_t last_key, T* sums) {
  const AttentionMask<void*>& mask = args.grad_mask;
  const int64_t place = heads.place(owned, 0), batch = place / args.sizes.heads, head = place % args.sizes.heads;
  T* head_sums = sums + batch_offset(args.sizes, mask.batch_strides, batch) + head * mask.head_stride;
  for (int64_t q = 0; q < (mask.row_stride == 0 ? 1 : args.sizes.query_length); ++q) {
    for (int64_t k = first_key; k < last_key; ++k) head_sums[q * mask.row_stride + k * mask.column_stride] = 0;
  }
}

// Returns whether the products were exact.
template <class Scalar, class Products>
bool mask_task(const AttentionBackwardArgs& args, const MaskHeads& heads, int64_t owned, int64_t block_keys,
               int64_t first, int64_t last, accumulate_t<Scalar>* sums) {
  using T = accumulate_t<Scalar>;
  const AttentionSizes& sizes = args.sizes;
  const AttentionMask<void*>& mask = args.grad_mask;
  const int64_t E = sizes.head_size, value_size = sizes.value_size;
  Products products;
  BackwardBlocks<Scalar, Products, /*kKeepsGradient=*/true> blocks(args, products);
  Scratch<typename Products::Left> key_rows(Products::left_size(block_keys, E)),
      value_rows(Products::left_size(block_keys, value_size));
  clear_task(args, heads, owned, first * block_keys, min_of(last * block_keys, sizes.key_length), sums);
  for (int64_t shared = 0; shared < heads.shared; ++shared) {
    const int64_t place = heads.place(owned, shared), batch = place / sizes.heads, head = place % sizes.heads;
    const int64_t kv_head = head / (sizes.heads / sizes.kv_heads);
    const QuerySide<Scalar, Products> query_side(args, batch, head, 1, products);
    const auto key = head_of<Scalar>(sizes, args.key, batch, kv_head);
    const auto value = head_of<Scalar>(sizes, args.value, batch, kv_head);
    T* head_sums = sums + batch_offset(sizes, mask.batch_strides, batch) + head * mask.head_stride;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * block_keys, count = min_of(block_keys, sizes.key_length - begin);
      const KeyBlock<Products> keys = {begin, count, products.pack_left(rows_of(key, begin), count, E, key_rows.data()),
                                       products.pack_left(rows_of(value, begin), count, value_size, value_rows.data())};
      for (int64_t b = args.is_causal ? begin / kBackwardQueries : 0; b < query_blocks(sizes); ++b) {
        const QueryBlock<Products>& queries = query_side.block(0, b);
        blocks.compute(batch, head, keys, queries, T(1));
        add_block_to_mask(blocks.exact_gradient(), kBackwardQueries, count, queries.count,
                          head_sums + queries.begin * mask.row_stride + begin * mask.column_stride, mask.row_stride,
                          mask.column_stride);
      }
    }
  }
  return products.is_exact();
}

template <class Scalar>
void mask_gradient(const AttentionBackwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const AttentionSizes& sizes = args.sizes;
  const MaskHeads heads(sizes, args.grad_mask);
  const int64_t block_keys = balanced_block(sizes.key_length, kBackwardKeys, kPhiloxGroup);
  const int64_t blocks = ceil_div(sizes.key_length, block_keys);
  const int64_t parts = args.grad_mask.column_stride == 0 ? 1 : max_of(blocks, 1);
  Scratch<T> sums(args.grad_mask_size);
  fill(sums.data(), T(0), args.grad_mask_size);  // what no task owns, as where there is no query
  parallel_for(heads.owned * parts, grain_of(sizes, heads.owned * parts), [&](int64_t task) {
    const int64_t part = task % parts;
    auto run = [&](auto* products) {
      using Products = std::remove_pointer_t<decltype(products)>;
      return mask_task<Scalar, Products>(args, heads, task / parts, block_keys, part * blocks / parts,
                                         (part + 1) * blocks / parts, sums.data());
    };
    if constexpr (sizeof(Scalar) == sizeof(T)) {
      choose_products<Scalar>(sizes, run);
    } else {  // the products of half types round what they multiply
      run(static_cast<MultiplyAdds<T>*>(nullptr));
    }
  });
  if (args.grad_mask.type == AttentionMaskType::float32) {
    float* out = static_cast<float*>(args.grad_mask.data);
    for (int64_t i = 0; i < args.grad_mask_size; ++i) out[i] = static_cast<float>(sums[i]);
  } else {
    narrow_row(sums.data(), args.grad_mask_size, static_cast<Scalar*>(args.grad_mask.data));
  }
}

}  // namespace

void attention_mask_gradient(const AttentionBackwardArgs& args) {
  dispatch(args.dtype, [&](auto* type) { mask_gradient<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace dlkernels::DLKERNELS_ISA
