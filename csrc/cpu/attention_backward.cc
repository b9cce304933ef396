// Attention backward, for query, key and value: see attention.h for the idea, attention_backward.h for one block.
//
// A task owns some key blocks of one kv head and visits the query blocks of the heads that share it in order; their
// operands are packed once a task. dK and dV of a block are complete when its queries have passed; dQ is summed
// transposed. Where heads are few, the keys of a head are split into parts that sum into their own dQ, added in order
// afterwards.
#include "attention_backward.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// Elements of the transposed dQ of one kv head's queries: [group, block, E, kBackwardQueries].
int64_t query_gradient_rows(const AttentionSizes& sizes) {
  return round_up(sizes.head_size, kTileHeight);
}
int64_t query_gradient_size(const AttentionSizes& sizes) {
  return sizes.heads / sizes.kv_heads * query_blocks(sizes) * query_gradient_rows(sizes) * kBackwardQueries;
}

// dQ of one kv head's queries: the sum of `parts` transposed pieces, in order, turned back.
template <class Scalar, class T = accumulate_t<Scalar>>
void store_query_gradient(const AttentionBackwardArgs& args, int64_t batch, int64_t kv_head, T* pieces, int64_t parts) {
  const AttentionSizes& sizes = args.sizes;
  const int64_t E = sizes.head_size, group = sizes.heads / sizes.kv_heads, size = query_gradient_size(sizes);
  for (int64_t part = 1; part < parts; ++part) add_to(pieces, pieces + part * size, size);
  Scratch<T> rows(kBackwardQueries * E);
  for (int64_t h = 0; h < group; ++h) {
    const Head<Scalar> out = head_of<Scalar>(sizes, args.grad_query, batch, kv_head * group + h);
    for (int64_t b = 0; b < query_blocks(sizes); ++b) {
      const T* block = pieces + (h * query_blocks(sizes) + b) * query_gradient_rows(sizes) * kBackwardQueries;
      const int64_t begin = b * kBackwardQueries, count = min_of(kBackwardQueries, sizes.query_length - begin);
      transpose(block, kBackwardQueries, E, count, rows.data(), E);
      for (int64_t q = 0; q < count; ++q) narrow_row(rows.data() + q * E, E, out.row(begin + q));
    }
  }
}

// dK and dV of some key blocks of one kv head, and what these keys give to its transposed dQ.
template <class Scalar, class Products>
class BackwardTask {
 public:
  using T = accumulate_t<Scalar>;

  BackwardTask(const AttentionBackwardArgs& args, int64_t batch, int64_t kv_head, int64_t block_keys, T* query_gradient)
      : args_(args),
        batch_(batch),
        kv_head_(kv_head),
        group_(args.sizes.heads / args.sizes.kv_heads),
        block_keys_(block_keys),
        key_columns_(round_up(args.sizes.head_size, Products::kColumnRoom)),
        value_columns_(round_up(args.sizes.value_size, Products::kColumnRoom)),
        query_side_(args, batch, kv_head * group_, group_, products_),
        blocks_(args, products_),
        key_(Products::left_size(block_keys, args.sizes.head_size)),
        value_(Products::left_size(block_keys, args.sizes.value_size)),
        key_transposed_(Products::left_size(args.sizes.head_size, block_keys)),
        grad_key_(block_keys * key_columns_),
        grad_value_(block_keys * value_columns_),
        query_gradient_(query_gradient) {}

  // Returns whether the products were exact; where not, the gradients are to be computed again.
  bool run(int64_t first, int64_t last) {
    fill(query_gradient_, T(0), args_.grad_query.data != nullptr ? query_gradient_size(args_.sizes) : 0);
    for (int64_t block = first; block < last; ++block) run_block(block * block_keys_);
    return products_.is_exact();
  }

 private:
  void run_block(int64_t begin) {
    const AttentionSizes& sizes = args_.sizes;
    const int64_t E = sizes.head_size, count = min_of(block_keys_, sizes.key_length - begin);
    const auto key = head_of<Scalar>(sizes, args_.key, batch_, kv_head_);
    const auto value = head_of<Scalar>(sizes, args_.value, batch_, kv_head_);
    const KeyBlock<Products> keys = {
        begin, count, products_.pack_left(rows_of(key, begin), count, E, key_.data()),
        products_.pack_left(rows_of(value, begin), count, sizes.value_size, value_.data())};
    const auto key_transposed = products_.pack_left(columns_of(key, begin), E, count, key_transposed_.data());
    fill(grad_key_.data(), T(0), block_keys_ * key_columns_);
    fill(grad_value_.data(), T(0), block_keys_ * value_columns_);
    for (int64_t h = 0; h < group_; ++h) {
      for (int64_t b = args_.is_causal ? begin / kBackwardQueries : 0; b < query_blocks(sizes); ++b) {
        const QueryBlock<Products>& queries = query_side_.block(h, b);
        blocks_.compute(batch_, kv_head_ * group_ + h, keys, queries, static_cast<T>(args_.scale));
        if (args_.grad_value.data) blocks_.add_to_value(keys, queries, grad_value_.data(), value_columns_);
        if (args_.grad_key.data) blocks_.add_to_key(keys, queries, grad_key_.data(), key_columns_);
        if (args_.grad_query.data) {
          const int64_t place = (h * query_blocks(sizes) + b) * query_gradient_rows(sizes) * kBackwardQueries;
          blocks_.add_to_query(keys, queries, key_transposed, query_gradient_ + place);
        }
      }
    }
    store_rows(args_.grad_key, begin, count, grad_key_.data(), E, key_columns_);
    store_rows(args_.grad_value, begin, count, grad_value_.data(), sizes.value_size, value_columns_);
  }

  void store_rows(const AttentionTensor<void*>& gradient, int64_t begin, int64_t count, const T* sums, int64_t columns,
                  int64_t stride) const {
    if (gradient.data == nullptr) return;
    const Head<Scalar> out = head_of<Scalar>(args_.sizes, gradient, batch_, kv_head_);
    for (int64_t k = 0; k < count; ++k) narrow_row(sums + k * stride, columns, out.row(begin + k));
  }

  const AttentionBackwardArgs& args_;
  int64_t batch_, kv_head_, group_, block_keys_;
  int64_t key_columns_, value_columns_;  // room for a row of sums
  Products products_;
  QuerySide<Scalar, Products> query_side_;
  BackwardBlocks<Scalar, Products> blocks_;
  Scratch<typename Products::Left> key_, value_, key_transposed_;  // of the key block
  Scratch<T> grad_key_, grad_value_;                               // [block_keys, columns]
  T* query_gradient_;
};

template <class Scalar>
void backward_call(const AttentionBackwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const AttentionSizes& sizes = args.sizes;
  const int64_t kv_heads = sizes.batches * sizes.kv_heads, size = query_gradient_size(sizes);
  const int64_t block_keys = balanced_block(sizes.key_length, kBackwardKeys, kPhiloxGroup);
  const int64_t blocks = ceil_div(sizes.key_length, block_keys);
  const int64_t parts = max_of(min_of(ceil_div(kWantedTasks, kv_heads), blocks), 1);
  const bool wants_query = args.grad_query.data != nullptr;
  Scratch<T> shared(wants_query && parts > 1 ? kv_heads * parts * size : 0);
  parallel_for(kv_heads * parts, grain_of(sizes, kv_heads * parts), [&](int64_t task) {
    const int64_t index = task / parts, part = from_both_ends(task % parts, parts);
    const int64_t batch = index / sizes.kv_heads, kv_head = index % sizes.kv_heads;
    Scratch<T> own(wants_query && parts == 1 ? size : 0);
    T* query_gradient = parts == 1 ? own.data() : shared.data() + (index * parts + part) * size;
    choose_products<Scalar>(sizes, [&](auto* products) {
      using Products = std::remove_pointer_t<decltype(products)>;
      return BackwardTask<Scalar, Products>(args, batch, kv_head, block_keys, query_gradient)
          .run(part * blocks / parts, (part + 1) * blocks / parts);
    });
    if (wants_query && parts == 1) store_query_gradient<Scalar>(args, batch, kv_head, query_gradient, 1);
  });
  if (!wants_query || parts == 1) return;
  parallel_for(kv_heads, grain_of(sizes, kv_heads), [&](int64_t index) {
    store_query_gradient<Scalar>(args, index / sizes.kv_heads, index % sizes.kv_heads,
                                 shared.data() + index * parts * size, parts);
  });
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& args) {
  if (args.sizes.batches * args.sizes.kv_heads == 0) return;
  dispatch(args.dtype, [&](auto* type) { backward_call<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace dlkernels::DLKERNELS_ISA
