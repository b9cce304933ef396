// Blocks of attention's backward pass, which its gradients share.
//
// Scores are recomputed, transposed: S^T = K Q^T and dP^T = V dO^T. So P^T and dS^T are what dV = P^T dO and dK = dS^T
// Q need as left operands and dQ^T = K^T dS^T, turned, as right operand, and a row's maximum, sum and D are lanes of a
// vector: only matrices of the size of the inputs are ever transposed. By multiply-adds, scores and D take their
// products in the order in which forward (and dP) takes them, so that P is forward's P to the bit and dP - D cancels
// exactly in a row that has all its weight on one key.
#pragma once

#include <type_traits>

#include "attention_parts.h"
#include "attention_products.h"

namespace dlkernels::DLKERNELS_ISA {

inline constexpr int64_t kBackwardKeys = 192, kBackwardQueries = 128;  // of a block; keys begin at kPhiloxGroups
inline constexpr int64_t kDiagonalKeys = 32;  // the steps in which products follow the diagonal of a causal mask

inline int64_t query_blocks(const AttentionSizes& sizes) {
  return ceil_div(sizes.query_length, kBackwardQueries);
}

// Whether D is summed from P and dP, which one block of keys has together: rounding then leaves less of the gradients
// of rows with most of their weight on one key. The rounding of half types hides it.
template <class Scalar>
inline bool has_own_dots(const AttentionSizes& sizes) {
  return sizeof(Scalar) == sizeof(accumulate_t<Scalar>) && sizes.key_length <= kBackwardKeys;
}

// ---- operands ------------------------------------------------------------------------------------------------------

// The query side of one head and block of kBackwardQueries.
template <class Products>
struct QueryBlock {
  using T = typename Products::Sum;
  using Right = typename Products::RightColumns;
  int64_t begin, count;       // queries
  Right query_transposed;     // [E, count]
  Right gradient_transposed;  // [E_v, count]: dO^T
  Right query;                // [count, E]
  Right gradient;             // [count, E_v]
  const T* row_max;           // [kBackwardQueries]; infinite where the row saw nothing but -inf
  const T* row_factor;        // [kBackwardQueries]: 1 / sum; zero there
  const T* row_dot;           // [kBackwardQueries]: D, unless blocks sum it themselves
};

// The key side of one block.
template <class Products>
struct KeyBlock {
  int64_t begin, count;
  typename Products::LeftRows key, value;
};

// Packed query blocks of `heads` heads, beginning with `first_head`.
template <class Scalar, class Products>
class QuerySide {
 public:
  using T = accumulate_t<Scalar>;

  QuerySide(const AttentionBackwardArgs& args, int64_t batch, int64_t first_head, int64_t heads, Products& products)
      : blocks_(heads * query_blocks(args.sizes)),
        blocks_of_head_(query_blocks(args.sizes)),
        across_(Products::right_size(args.sizes.head_size, kBackwardQueries)),
        gradient_across_(Products::right_size(args.sizes.value_size, kBackwardQueries)),
        along_(Products::right_size(kBackwardQueries, args.sizes.head_size)),
        gradient_along_(Products::right_size(kBackwardQueries, args.sizes.value_size)),
        panels_(heads * blocks_of_head_ * (across_ + gradient_across_ + along_ + gradient_along_)),
        rows_(heads * blocks_of_head_ * 3 * kBackwardQueries) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t b = 0; b < blocks_of_head_; ++b) {
        blocks_[h * blocks_of_head_ + b] = pack(args, batch, first_head + h, h * blocks_of_head_ + b, b, products);
      }
    }
  }

  const QueryBlock<Products>& block(int64_t head, int64_t index) const {
    return blocks_[head * blocks_of_head_ + index];
  }

 private:
  QueryBlock<Products> pack(const AttentionBackwardArgs& args, int64_t batch, int64_t head, int64_t place,
                            int64_t index, Products& products) {
    const AttentionSizes& sizes = args.sizes;
    const auto query = head_of<Scalar>(sizes, args.query, batch, head);
    const auto gradient = head_of<Scalar>(sizes, args.grad_output, batch, head);
    const int64_t E = sizes.head_size, value_size = sizes.value_size, begin = index * kBackwardQueries,
                  count = min_of(kBackwardQueries, sizes.query_length - begin);
    auto* panels = panels_.data() + place * (across_ + gradient_across_ + along_ + gradient_along_);
    T* rows = rows_.data() + place * 3 * kBackwardQueries;
    T *row_max = rows, *row_factor = rows + kBackwardQueries, *row_dot = row_factor + kBackwardQueries;
    const QueryBlock<Products> block = {
        begin,
        count,
        products.pack_right(columns_of(query, begin), E, count, panels),
        products.pack_right(columns_of(gradient, begin), value_size, count, panels + across_),
        products.pack_right(rows_of(query, begin), count, E, panels + across_ + gradient_across_),
        products.pack_right(rows_of(gradient, begin), count, value_size, panels + across_ + gradient_across_ + along_),
        row_max,
        row_factor,
        row_dot};
    // The rounding of a half-precision output would be most of the error of D.
    constexpr bool is_rounded = sizeof(Scalar) < sizeof(T);
    const auto output = head_of<T>(sizes, is_rounded ? args.exact_output : args.output, batch, head);
    if (has_few_rows(sizes)) {  // as dP
      for (int64_t q = 0; q < count; ++q) row_dot[q] = dot(output.row(begin + q), gradient.row(begin + q), value_size);
    } else if (!has_own_dots<Scalar>(sizes)) {
      products.row_dots(block.gradient_transposed, rows_of(output, begin), rows_of(gradient, begin), value_size, count,
                        row_dot);
    }
    const int64_t line = (batch * sizes.heads + head) * sizes.query_length + begin;
    const T* maxima = static_cast<const T*>(args.statistics) + line;
    const T* sums = maxima + sizes.batches * sizes.heads * sizes.query_length;
    for (int64_t q = 0; q < kBackwardQueries; ++q) {
      const bool sees_keys = q < count && maxima[q] != -kInfinity<T>;
      row_max[q] = sees_keys ? maxima[q] : kInfinity<T>;
      row_factor[q] = q >= count || sums[q] == 0 ? T(0) : 1 / sums[q];
    }
    return block;
  }

  Scratch<QueryBlock<Products>> blocks_;
  int64_t blocks_of_head_;
  int64_t across_, gradient_across_, along_, gradient_along_;  // elements of each right operand of a block
  Scratch<typename Products::Right> panels_;
  Scratch<T> rows_;
};

// ---- one block of the scores' gradient -----------------------------------------------------------------------------

// kKeepsGradient: dS^T stays in the type of the sums too, where products store it in another.
template <class Scalar, class Products, bool kKeepsGradient = false>
class BackwardBlocks {
 public:
  using T = accumulate_t<Scalar>;
  using Left = typename Products::Left;
  using LeftRows = typename Products::LeftRows;
  using Keys = KeyBlock<Products>;
  using Queries = QueryBlock<Products>;
  static constexpr int64_t kStride = kBackwardQueries;  // of the transposed scores

  BackwardBlocks(const AttentionBackwardArgs& args, Products& products)
      : args_(args),
        products_(products),
        scores_(kBlock),
        weight_gradient_(kBlock),
        weights_(kInPlace ? 0 : Products::left_size(kBackwardKeys, kStride)),
        gradient_(kInPlace ? 0 : Products::left_size(kBackwardKeys, kStride)),
        turned_(Products::right_size(kBackwardKeys, kStride)),
        bias_(args.mask.type != AttentionMaskType::none || !(args.scale > 0) ? kBlock : 0),
        keep_(args.dropout_p > 0 ? kBlock : 0),
        keep_row_(kBackwardKeys),
        own_dots_(has_own_dots<Scalar>(args.sizes) ? kStride : 0) {
    if (args.mask.type == AttentionMaskType::none && bias_.data() != nullptr) fill(bias_.data(), T(0), kBlock);
  }

  // P^T and dS^T of a block. `factor` is the scale for dQ and dK, 1 for the mask.
  void compute(int64_t batch, int64_t head, const Keys& keys, const Queries& queries, T factor) {
    if (has_few_rows(args_.sizes)) {
      dot_visible(batch, head, keys, queries);
    } else {
      multiply_visible(keys, queries, keys.key, args_.sizes.head_size, queries.query_transposed, scores_.data());
      multiply_visible(keys, queries, keys.value, args_.sizes.value_size, queries.gradient_transposed,
                       weight_gradient_.data());
    }
    const bool has_bias = bias_.data() != nullptr, has_keep = keep_.data() != nullptr;
    if (has_bias) load_bias(batch, head, keys, queries);
    if (has_keep) load_keep(batch, head, keys, queries);
    if (has_bias) {
      has_keep ? turn_scores<true, true>(keys, queries, factor) : turn_scores<true, false>(keys, queries, factor);
    } else {
      has_keep ? turn_scores<false, true>(keys, queries, factor) : turn_scores<false, false>(keys, queries, factor);
    }
  }

  // sums[k] += sum over the queries that see key k of P^T[k][q] dO[q], or of dS^T[k][q] Q[q].
  void add_to_value(const Keys& keys, const Queries& queries, T* sums, int64_t stride) {
    add_to_keys(keys, queries, weights(), queries.gradient, args_.sizes.value_size, sums, stride);
  }
  void add_to_key(const Keys& keys, const Queries& queries, T* sums, int64_t stride) {
    add_to_keys(keys, queries, gradient(), queries.query, args_.sizes.head_size, sums, stride);
  }

  // sums[.][q] += sum over the keys that query q sees of left[.][k] dS^T[k][q].
  void add_to_query(const Keys& keys, const Queries& queries, LeftRows left, T* sums) {
    const auto right = products_.turn(gradient(), keys.count, queries.count, turned_.data());
    for (int64_t q = 0; q < queries.count; q += kColumnStep) {
      const int64_t columns = min_of(kColumnStep, queries.count - q),
                    visible = visible_keys(keys, queries, q + columns);
      products_.multiply(args_.sizes.head_size, columns, visible, left, right.at(0, q), sums + q, kStride, true);
    }
  }

  // dS^T, not rounded.
  const T* exact_gradient() const {
    static_assert(kInPlace || kKeepsGradient);
    return weight_gradient_.data();
  }

 private:
  static constexpr bool kInPlace = std::is_same_v<Left, T>;
  static constexpr int64_t kBlock = kBackwardKeys * kStride, kColumnStep = Products::kColumnStep;

  LeftRows rows_in(const Scratch<Left>& own, const Scratch<T>& place) const {
    if constexpr (kInPlace) {
      return {place.data(), kStride};
    } else {
      return {own.data(), Products::left_stride(kStride)};
    }
  }
  LeftRows weights() const { return rows_in(weights_, scores_); }
  LeftRows gradient() const { return rows_in(gradient_, weight_gradient_); }

  void load_bias(int64_t batch, int64_t head, const Keys& keys, const Queries& queries) {
    const int64_t offset = mask_head_offset(args_.sizes, args_.mask, batch, head);
    for (int64_t q = 0; q < queries.count; ++q) {
      visit_mask_row<Scalar>(args_.mask, offset, queries.begin + q, keys.begin, keys.count,
                             [&](int64_t k, T value) { bias_[k * kStride + q] = value; });
    }
  }

  void load_keep(int64_t batch, int64_t head, const Keys& keys, const Queries& queries) {
    const T factor = args_.dropout_p < 1 ? static_cast<T>(1 / (1 - args_.dropout_p)) : T(0);
    for (int64_t q = 0; q < queries.count; ++q) {
      draw_keep_row(*args_.dropout_seed, args_.dropout_p, batch * args_.sizes.heads + head, queries.begin + q,
                    keys.begin, keys.count, keep_row_.data());
      for (int64_t k = 0; k < keys.count; ++k) keep_[k * kStride + q] = keep_row_[k] * factor;
    }
  }

  // How many keys of the block the queries before `end` see, and the first query that sees key `k`.
  int64_t visible_keys(const Keys& keys, const Queries& queries, int64_t end) const {
    return args_.is_causal ? max_of(min_of(keys.count, queries.begin + end - keys.begin), 0) : keys.count;
  }
  int64_t first_query(const Keys& keys, const Queries& queries, int64_t k) const {
    return args_.is_causal ? min_of(max_of(keys.begin + k - queries.begin, 0), queries.count) : 0;
  }

  // Both products are there: scores become P^T, after dropout, and dP^T becomes dS^T.
  template <bool kBias, bool kKeep>
  void turn_scores(const Keys& keys, const Queries& queries, T factor) {
    if constexpr (sizeof(Scalar) == sizeof(T)) {
      if (own_dots_.data() != nullptr) {
        sum_own_dots<kBias, kKeep>(keys, queries);
        return sweep<kBias, kKeep, true>(keys, queries, factor);
      }
    }
    sweep<kBias, kKeep, false>(keys, queries, factor);
  }

  // Scores become P^T, and D is summed from it and dP^T.
  template <bool kBias, bool kKeep>
  void sum_own_dots(const Keys& keys, const Queries& queries) {
    constexpr int64_t lanes = Vec<T>::size;
    fill(own_dots_.data(), T(0), kStride);
    for (int64_t k = 0; k < keys.count; ++k) {
      const int64_t first = first_query(keys, queries, k);
      for (int64_t q = first / lanes * lanes; q < queries.count; q += lanes) {
        const int64_t at = k * kStride + q;
        Vec<T> p = probability<kBias>(queries, at, q);
        if (q < first) p = select(first_lanes<T>(first - q), Vec<T>::zero(), p);
        store(scores_.data() + at, p);
        Vec<T> dp = load(weight_gradient_.data() + at);
        if constexpr (kKeep) dp *= load(keep_.data() + at);
        if (q < first) dp = select(first_lanes<T>(first - q), Vec<T>::zero(), dp);
        store(own_dots_.data() + q, fma(p, dp, load(own_dots_.data() + q)));
      }
    }
  }

  // One sweep. kOwnDots: P^T is there, and D.
  template <bool kBias, bool kKeep, bool kOwnDots>
  void sweep(const Keys& keys, const Queries& queries, T factor) {
    constexpr int64_t lanes = Vec<T>::size, step = 2 * lanes;
    const Vec<T> zero = Vec<T>::zero();
    Vec<T> probability_check = zero, check = zero;  // what a weight is has nothing in it that cannot be split
    for (int64_t k = 0; k < keys.count; ++k) {
      Left *weight_row = weights().at(k, 0).data, *gradient_row = gradient().at(k, 0).data;
      const int64_t first = first_query(keys, queries, k);
      for (int64_t q = 0; q < queries.count; q += step) {
        if (q + step <= first || first == queries.count) {  // no products are there for these
          Products::put(weight_row, q, zero, zero, probability_check);
          put_gradient(gradient_row, k, q, zero, zero, check);
          continue;
        }
        Vec<T> weight[2], slope[2];
        for (int64_t v = 0; v < 2; ++v) {
          const int64_t begin = q + v * lanes;
          weigh<kBias, kKeep, kOwnDots>(queries, k, begin, factor, weight[v], slope[v]);
          if (first > begin || queries.count < begin + lanes) {
            const Mask<T> unseen = first_lanes<T>(max_of(min_of(first - begin, lanes), 0));
            const Mask<T> real = first_lanes<T>(max_of(min_of(queries.count - begin, lanes), 0));
            weight[v] = select(real, select(unseen, zero, weight[v]), zero);
            slope[v] = select(real, select(unseen, zero, slope[v]), zero);
          }
        }
        Products::put(weight_row, q, weight[0], weight[1], probability_check);
        put_gradient(gradient_row, k, q, slope[0], slope[1], check);
      }
    }
    products_.check(check);
  }

  DLKERNELS_INLINE void put_gradient(Left* row, int64_t k, int64_t q, Vec<T> first, Vec<T> second, Vec<T>& check) {
    Products::put(row, q, first, second, check);
    if constexpr (kKeepsGradient && !kInPlace) {
      store(weight_gradient_.data() + k * kStride + q, first);
      store(weight_gradient_.data() + k * kStride + q + Vec<T>::size, second);
    }
  }

  // A vector of P^T, from scores.
  template <bool kBias>
  DLKERNELS_INLINE Vec<T> probability(const Queries& queries, int64_t at, int64_t q) const {
    Vec<T> score = load(scores_.data() + at);
    T scale = static_cast<T>(args_.scale);
    if constexpr (kBias) score = fma(score, Vec<T>(scale), load(bias_.data() + at)), scale = 1;  // as forward does
    // Forward's products may round otherwise; of huge scores that is no small exponent.
    const Vec<T> row_max = load(queries.row_max + q);
    return Weights<Products>(scale)(min(row_max, score), row_max) * load(queries.row_factor + q);
  }

  // A vector of P^T, after dropout, and of dS^T.
  template <bool kBias, bool kKeep, bool kOwnDots>
  DLKERNELS_INLINE void weigh(const Queries& queries, int64_t k, int64_t q, T factor, Vec<T>& weight, Vec<T>& slope) {
    const int64_t at = k * kStride + q;
    const Vec<T> p = kOwnDots ? load(scores_.data() + at) : probability<kBias>(queries, at, q);
    const T* dots = kOwnDots ? own_dots_.data() : queries.row_dot;
    Vec<T> dp = load(weight_gradient_.data() + at);
    weight = p;
    if constexpr (kKeep) {
      const Vec<T> kept = load(keep_.data() + at);
      dp *= kept;
      weight *= kept;
    }
    slope = p * (dp - load(dots + q)) * Vec<T>(factor);
  }

  // A row of `left` for each key times a column for each query, where the query sees the key.
  void multiply_visible(const Keys& keys, const Queries& queries, LeftRows left, int64_t depth,
                        typename Products::RightColumns right, T* product) {
    for (int64_t q = 0; q < queries.count; q += kColumnStep) {
      const int64_t columns = min_of(kColumnStep, queries.count - q);
      products_.multiply(visible_keys(keys, queries, q + columns), columns, depth, left, right.at(0, q), product + q,
                         kStride, false);
    }
  }

  // Both products of few rows: the scores as forward takes them.
  void dot_visible(int64_t batch, int64_t head, const Keys& keys, const Queries& queries) {
    const AttentionSizes& sizes = args_.sizes;
    const int64_t kv_head = head / (sizes.heads / sizes.kv_heads);
    const auto key = head_of<Scalar>(sizes, args_.key, batch, kv_head);
    const auto value = head_of<Scalar>(sizes, args_.value, batch, kv_head);
    const auto query = head_of<Scalar>(sizes, args_.query, batch, head);
    const auto gradient = head_of<Scalar>(sizes, args_.grad_output, batch, head);
    for (int64_t q = 0; q < queries.count; ++q) {
      const int64_t row = queries.begin + q;
      for (int64_t k = 0; k < visible_keys(keys, queries, q + 1); ++k) {
        scores_[k * kStride + q] = dot(query.row(row), key.row(keys.begin + k), sizes.head_size);
        weight_gradient_[k * kStride + q] = dot(gradient.row(row), value.row(keys.begin + k), sizes.value_size);
      }
    }
  }

  void add_to_keys(const Keys& keys, const Queries& queries, LeftRows left, typename Products::RightColumns right,
                   int64_t columns, T* sums, int64_t stride) {
    const int64_t step = args_.is_causal ? kDiagonalKeys : keys.count;
    for (int64_t k = 0; k < keys.count; k += step) {
      const int64_t first = first_query(keys, queries, k) / Products::kDepthStep * Products::kDepthStep;
      products_.multiply(min_of(step, keys.count - k), columns, queries.count - first, left.at(k, first),
                         right.at(first, 0), sums + k * stride, stride, true);
    }
  }

  const AttentionBackwardArgs& args_;
  Products& products_;
  Scratch<T> scores_;           // S^T, [kBackwardKeys, kStride]
  Scratch<T> weight_gradient_;  // dP^T, the same
  Scratch<Left> weights_;       // P^T after dropout, as a left operand; in the place of scores where it is T
  Scratch<Left> gradient_;      // dS^T, as a left operand; in the place of weight_gradient where it is T
  Scratch<typename Products::Right> turned_;  // dS^T, as a right operand
  Scratch<T> bias_;                           // mask^T, as scores; none without a mask and of a positive scale
  Scratch<T> keep_;                           // dropout's factors, as scores; none without dropout
  Scratch<T> keep_row_;                       // [kBackwardKeys]
  Scratch<T> own_dots_;                       // D, where it is summed from P and dP; none otherwise
};

}  // namespace dlkernels::DLKERNELS_ISA
