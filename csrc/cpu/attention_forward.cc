// Attention forward: see attention.h for the idea, attention_products.h for its products.
//
// A task owns some query rows of one kv head: rows of all query heads that share it, one after another. For each block
// of keys it packs K^T and V once; then for each block of its rows:
//   scores = Q K^T            kept in the first-level cache
//   P = exp(scale (scores - row maximum)), written as the left operand of
//   output += P V             a larger maximum rescales what was summed before (online softmax)
// Where there is a mask, or no positive scale, scores are scaled and masked first, and the scale of P is 1.
// Output, maxima and sums stay in scratch until the last block.
#include <type_traits>

#include "attention_parts.h"
#include "attention_products.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// Starts of key blocks are multiples of kPhiloxGroup. Few rows to a block: its scores stay in the first-level cache,
// and under a causal mask little is computed in vain.
constexpr int64_t kMostKeys = 256, kMostTaskBlocks = 16;  // keys of a block, row blocks of a task
constexpr int64_t kRowStep = kHasTiles ? kTileHeight : kTileRows, kBlockRows = kHasTiles ? 32 : 24;

template <class T>
T max_of_row(const T* scores, int64_t count) {
  constexpr int64_t lanes = Vec<T>::size;
  Vec<T> partial[kTileVectors];
  for (int64_t v = 0; v < kTileVectors; ++v) partial[v] = -kInfinity<T>;
  int64_t i = 0;
  for (; i + kTileVectors * lanes <= count; i += kTileVectors * lanes) {
    for (int64_t v = 0; v < kTileVectors; ++v) partial[v] = max(partial[v], load(scores + i + v * lanes));
  }
  for (; i < count; i += lanes) partial[0] = max(partial[0], load(scores + i));
  for (int64_t v = 1; v < kTileVectors; ++v) partial[0] = max(partial[0], partial[v]);
  return reduce_max(partial[0]);
}

// The query rows of one task, and the scratch that it works in.
template <class Scalar, class Products>
class ForwardTask {
 public:
  using T = accumulate_t<Scalar>;
  using Left = typename Products::Left;

  ForwardTask(const AttentionForwardArgs& args, int64_t batch, int64_t kv_head, int64_t row_begin, int64_t rows)
      : args_(args),
        batch_(batch),
        kv_head_(kv_head),
        row_begin_(row_begin),
        rows_(rows),
        block_rows_(balanced_block(rows, kBlockRows, kRowStep)),
        block_keys_(balanced_block(args.sizes.key_length, kMostKeys, kPhiloxGroup)),
        value_stride_(round_up(args.sizes.value_size, Products::kColumnRoom)),
        output_(round_up(rows, Products::kRowStep) * value_stride_),
        row_max_(rows),
        row_sum_(rows),
        keep_(args.dropout_p > 0 ? block_keys_ : 0),
        scores_(round_up(block_rows_, Products::kRowStep) * block_keys_),
        weights_(kInPlace ? 0 : Products::left_size(block_rows_, block_keys_)),
        query_(Products::left_size(rows + Products::kRowStep, args.sizes.head_size)),
        key_panels_(Products::right_size(args.sizes.head_size, block_keys_)),
        value_panels_(Products::right_size(block_keys_, args.sizes.value_size)) {}

  // Returns whether the products were exact; where not, the output is to be computed again.
  bool run() {
    load_query();
    for_each_key_block([&](int64_t begin, int64_t keys) { add_key_block(begin, keys); });
    store_output();
    return products_.is_exact();
  }

  // The same for few rows, which read keys and values where they are.
  void run_unpacked() {
    clear();
    for_each_key_block([&](int64_t begin, int64_t keys) { add_key_block_unpacked(begin, keys); });
    store_output();
  }

 private:
  static constexpr bool kInPlace = std::is_same_v<Left, T>;  // weights take the place of the scores

  int64_t head(int64_t row) const {
    return kv_head_ * (args_.sizes.heads / args_.sizes.kv_heads) + (row_begin_ + row) / args_.sizes.query_length;
  }
  int64_t position(int64_t row) const { return (row_begin_ + row) % args_.sizes.query_length; }
  Head<const Scalar> head_of_kv(const AttentionTensor<const void*>& tensor) const {
    return head_of<Scalar>(args_.sizes, tensor, batch_, kv_head_);
  }

  // How many of the keys from key_begin on the rows [begin, end) see.
  int64_t visible_keys(int64_t begin, int64_t end, int64_t key_begin, int64_t keys) const {
    if (!args_.is_causal) return keys;
    const int64_t last = head(begin) == head(end - 1) ? position(end - 1) : args_.sizes.query_length - 1;
    return max_of(min_of(keys, last + 1 - key_begin), 0);
  }

  template <class Body>
  void for_each_key_block(Body&& body) {
    const int64_t key_length = visible_keys(0, rows_, 0, args_.sizes.key_length);
    for (int64_t begin = 0; begin < key_length; begin += block_keys_) {
      body(begin, min_of(block_keys_, key_length - begin));
    }
  }

  void clear() {
    fill(row_max_.data(), -kInfinity<T>, rows_);
    fill(row_sum_.data(), T(0), rows_);
    fill(output_.data(), T(0), round_up(rows_, Products::kRowStep) * value_stride_);
  }

  void load_query() {
    clear();
    const int64_t E = args_.sizes.head_size;
    for (int64_t r = 0, count; r < rows_; r += count) {  // the rows of one head at a time
      count = min_of(rows_ - r, args_.sizes.query_length - position(r));
      const auto query = head_of<Scalar>(args_.sizes, args_.query, batch_, head(r));
      products_.pack_left(rows_of(query, position(r)), count, E, query_.data() + r * Products::left_stride(E));
    }
  }

  void add_mask(int64_t row, T* scores, int64_t key_begin, int64_t keys) const {
    const T scale = static_cast<T>(args_.scale);
    visit_mask_row<Scalar>(args_.mask, mask_head_offset(args_.sizes, args_.mask, batch_, head(row)), position(row),
                           key_begin, keys, [=](int64_t i, T value) { scores[i] = scores[i] * scale + value; });
  }

  // weights[i] = exp(scale * (scores[i] - shift)) for `count` whole vectors, or what dropout leaves of it; returns the
  // sum of all. Beyond them weights become zero, as far as a product of depth `keys` reads.
  template <bool kKeep>
  T exponentiate_row(const T* scores, int64_t count, int64_t keys, T scale, T shift, Left* weights) {
    constexpr int64_t lanes = Vec<T>::size;
    const Weights<Products> weight_of(scale);
    const Vec<T> shifts = shift, zero = Vec<T>::zero();
    Vec<T> first_sum = zero, second_sum = zero, check = zero;  // weights can always be split
    auto weigh = [&](int64_t i, Vec<T>& sum) {
      const Vec<T> p = weight_of(load(scores + i), shifts);
      sum += p;
      if constexpr (kKeep) return p * load(keep_.data() + i);
      return p;
    };
    int64_t i = 0;
    for (; i + 2 * lanes <= count; i += 2 * lanes) {
      const Vec<T> first = weigh(i, first_sum), second = weigh(i + lanes, second_sum);
      Products::put(weights, i, first, second, check);
    }
    if (i < count) Products::put(weights, i, weigh(i, first_sum), zero, check), i += 2 * lanes;
    for (; i < keys; i += 2 * lanes) Products::put(weights, i, zero, zero, check);
    return reduce_add(first_sum + second_sum);
  }

  // Scores of a row, as the product left them, become weights: probabilities up to the row's sum. Output, summed so far
  // under the old maximum, is rescaled to the new one.
  void soften_row(int64_t row, T* scores, int64_t key_begin, int64_t keys, Left* weights) {
    T scale = static_cast<T>(args_.scale);
    if (args_.mask.type != AttentionMaskType::none) {
      add_mask(row, scores, key_begin, keys);
      scale = 1;
    } else if (!(scale > 0)) {  // -inf, below, keeps its sign only under a positive scale
      scale_row(scores, keys, scale);
      scale = 1;
    }
    constexpr int64_t lanes = Vec<T>::size;
    const int64_t seen = args_.is_causal ? max_of(min_of(keys, position(row) + 1 - key_begin), 0) : keys;
    const int64_t whole = round_up(seen, lanes);
    if (seen < whole) {
      T* last = scores + whole - lanes;
      store(last, select(first_lanes<T>(lanes - (whole - seen)), load(last), Vec<T>(-kInfinity<T>)));
    }
    T& row_max = row_max_[row];
    const T block_max = max_of_row(scores, whole);
    if (block_max > row_max) {
      if (row_max > -kInfinity<T>) {
        const T decay = exp_of_negative(Vec<T>((row_max - block_max) * scale))[0];
        row_sum_[row] *= decay;
        scale_row(output_.data() + row * value_stride_, args_.sizes.value_size, decay);
      }
      row_max = block_max;
    }
    const T shift = row_max == -kInfinity<T> ? T(0) : row_max;  // nothing seen but -inf: exp(-inf - 0) is 0, not NaN
    if (args_.dropout_p > 0) {
      draw_keep_row(*args_.dropout_seed, args_.dropout_p, batch_ * args_.sizes.heads + head(row), position(row),
                    key_begin, keys, keep_.data());
      row_sum_[row] += exponentiate_row<true>(scores, whole, keys, scale, shift, weights);
    } else {
      row_sum_[row] += exponentiate_row<false>(scores, whole, keys, scale, shift, weights);
    }
  }

  void add_key_block(int64_t key_begin, int64_t keys) {
    const int64_t E = args_.sizes.head_size, value_size = args_.sizes.value_size;
    const auto key_panels =
        products_.pack_right(columns_of(head_of_kv(args_.key), key_begin), E, keys, key_panels_.data());
    const auto value_panels =
        products_.pack_right(rows_of(head_of_kv(args_.value), key_begin), keys, value_size, value_panels_.data());
    const int64_t query_stride = Products::left_stride(E), weight_stride = Products::left_stride(block_keys_);
    Left* weights = weights_.data();
    if constexpr (kInPlace) weights = scores_.data();
    for (int64_t begin = 0; begin < rows_; begin += block_rows_) {
      const int64_t end = min_of(begin + block_rows_, rows_);
      const int64_t visible = visible_keys(begin, end, key_begin, keys);
      if (visible == 0) continue;
      products_.multiply(end - begin, visible, E, {query_.data() + begin * query_stride, query_stride}, key_panels,
                         scores_.data(), block_keys_, false);
      for (int64_t r = begin; r < end; ++r) {
        soften_row(r, scores_.data() + (r - begin) * block_keys_, key_begin, visible,
                   weights + (r - begin) * weight_stride);
      }
      products_.multiply(end - begin, value_size, visible, {weights, weight_stride}, value_panels,
                         output_.data() + begin * value_stride_, value_stride_, true);
    }
  }

  void add_key_block_unpacked(int64_t key_begin, int64_t keys) {
    const int64_t E = args_.sizes.head_size, value_size = args_.sizes.value_size;
    const auto key = head_of_kv(args_.key), value = head_of_kv(args_.value);
    // Values in the type of the sums: where they are, or widened.
    const Scratch<T> widened(std::is_same_v<Scalar, T> ? 0 : keys * value_size);
    Panels<T> values = plain_panels(widened.data(), value_size);
    if constexpr (std::is_same_v<Scalar, T>) {
      values = plain_panels(value.row(key_begin), value.row_stride);
    } else {
      pack_rows(rows_of(value, key_begin), keys, value_size, widened.data(), value_size);
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t visible = visible_keys(r, r + 1, key_begin, keys);
      if (visible == 0) continue;
      const Scalar* query = head_of<Scalar>(args_.sizes, args_.query, batch_, head(r)).row(position(r));
      for (int64_t k = 0; k < visible; ++k) scores_[k] = dot(query, key.row(key_begin + k), E);
      soften_row(r, scores_.data(), key_begin, visible, scores_.data());
      multiply<T>(1, value_size, visible, scores_.data(), block_keys_, values, output_.data() + r * value_stride_,
                  value_stride_, true);
    }
  }

  // O = output / sum / (1 - p); a row that sees nothing but -inf has sum 0 and gives 0.
  void store_output() {
    const int64_t value_size = args_.sizes.value_size;
    const T kept = args_.dropout_p < 1 ? static_cast<T>(1 / (1 - args_.dropout_p)) : T(0);
    const int64_t all_rows = args_.sizes.batches * args_.sizes.heads * args_.sizes.query_length;
    T* statistics = static_cast<T*>(args_.statistics);
    for (int64_t r = 0; r < rows_; ++r) {
      T* output = output_.data() + r * value_stride_;
      scale_row(output, value_size, row_sum_[r] == 0 ? T(0) : kept / row_sum_[r]);
      narrow_row(output, value_size, head_of<Scalar>(args_.sizes, args_.output, batch_, head(r)).row(position(r)));
      if constexpr (sizeof(Scalar) < sizeof(T)) {
        narrow_row(output, value_size, head_of<T>(args_.sizes, args_.exact_output, batch_, head(r)).row(position(r)));
      }
      const int64_t line = (batch_ * args_.sizes.heads + head(r)) * args_.sizes.query_length + position(r);
      statistics[line] = row_max_[r];
      statistics[all_rows + line] = row_sum_[r];
    }
  }

  const AttentionForwardArgs& args_;
  int64_t batch_, kv_head_;
  int64_t row_begin_, rows_;         // of the group * L rows that share the kv head
  int64_t block_rows_, block_keys_;  // sizes of a block
  int64_t value_stride_;
  Scratch<T> output_;                                            // [rows, value_stride], not yet divided by the sums
  Scratch<T> row_max_, row_sum_;                                 // [rows]
  Scratch<T> keep_;                                              // [block_keys]
  Scratch<T> scores_;                                            // [block_rows, block_keys]
  Scratch<Left> weights_;                                        // the same, as a left operand
  Scratch<Left> query_;                                          // [rows, E]
  Scratch<typename Products::Right> key_panels_, value_panels_;  // K^T and V of the key block
  Products products_;
};

template <class Scalar>
void forward_call(const AttentionForwardArgs& args) {
  const AttentionSizes& sizes = args.sizes;
  const int64_t kv_heads = sizes.batches * sizes.kv_heads, rows = sizes.heads / sizes.kv_heads * sizes.query_length;
  const int64_t step = balanced_block(rows, kBlockRows, kRowStep), steps = ceil_div(rows, step);
  const int64_t task_rows =
      has_few_rows(sizes) ? rows : step * max_of(min_of(kMostTaskBlocks, steps * kv_heads / kWantedTasks), 1);
  const int64_t pieces = ceil_div(rows, task_rows);
  parallel_for(kv_heads * pieces, grain_of(sizes, kv_heads * pieces), [&](int64_t task) {
    const int64_t index = task / pieces, begin = from_both_ends(task % pieces, pieces) * task_rows;
    const int64_t batch = index / sizes.kv_heads, kv_head = index % sizes.kv_heads;
    const int64_t count = min_of(task_rows, rows - begin);
    if (has_few_rows(sizes)) {
      ForwardTask<Scalar, MultiplyAdds<accumulate_t<Scalar>>>(args, batch, kv_head, begin, count).run_unpacked();
      return;
    }
    choose_products<Scalar>(sizes, [&](auto* products) {
      using Products = std::remove_pointer_t<decltype(products)>;
      return ForwardTask<Scalar, Products>(args, batch, kv_head, begin, count).run();
    });
  });
}

}  // namespace

void attention_forward(const AttentionForwardArgs& args) {
  if (args.sizes.batches * args.sizes.heads * args.sizes.query_length == 0) return;
  dispatch(args.dtype, [&](auto* type) { forward_call<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace dlkernels::DLKERNELS_ISA
