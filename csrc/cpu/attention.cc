// Scaled dot-product attention without its L x S matrices (Dao et al., "FlashAttention", 2022).
//
//   S = scale Q K^T + mask      P_ij = exp(S_ij - max_i) / sum_i      O = dropout(P) V
//
// forward   A task owns some query rows of one kv head (the rows of all query heads that share it, one after another).
//           For each block of keys: K^T is packed into panels and V into rows, once; then for each block of query rows:
//           scores = Q K^T, row maxima and exponentials in place (online softmax: a larger maximum rescales what was
//           summed before), output += P V. Scores live in the first-level cache; output, maxima and sums in scratch.
// backward  With D_i = sum_j dP_ij P_ij = dO_i . O_i:
//             dV = P^T dO     dP = dO V^T     dS = P (dP - D) scale     dQ = dS K     dK = dS^T Q
//           Scores are recomputed, transposed: S^T = K Q^T and dP^T = V dO^T are what dV and dK need as left operands
//           and dQ^T = K^T dS^T as right operand, and a row's maximum, sum and D are lanes of a vector. So only
//           matrices of the size of the inputs are ever transposed. Scores and D take their products in the order in
//           which forward (and dP) takes them, so that P is forward's P to the bit and dP - D cancels exactly in a row
//           that has all its weight on one key. A task owns some key blocks of one kv head and visits its query blocks
//           in order; where heads are few, the keys of a head are split into parts that sum into their own dQ, added in
//           order afterwards.
// mask      A float mask that wants its gradient gets it from a pass of its own, whose tasks own mask elements and
//           visit, in order, every head that the element is broadcast to.
// dropout   The keep mask is drawn again in backward from (seed, head, row, column); see philox.h.
//
// Reads every input once per task; 4 L S E operations a head forward, 10 L S E backward (14 with a mask's gradient).
// Tasks, blocks and the order of every sum follow from the shape alone.
#include "attention.h"

#include <type_traits>

#include "gemm.h"
#include "philox.h"
#include "vmath.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// ---- block sizes ---------------------------------------------------------------------------------------------------

// Starts of key blocks are multiples of kPhiloxGroup.
// Few rows to a block: its scores stay in the first-level cache, and under a causal mask little is computed in vain.
constexpr int64_t kForwardRows = 24, kForwardKeys = 256, kForwardBlocks = 16;  // query rows, keys, row blocks of a task
constexpr int64_t kFewRows = 2;  // too few query rows to pay for packing keys and values: a step of generation
constexpr int64_t kBackwardKeys = 192, kBackwardQueries = 128;
constexpr int64_t kDiagonalKeys = 24;  // the steps in which products follow the diagonal of a causal mask
constexpr int64_t kWantedTasks = 16;   // what a call is split into, where its shape allows

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// `length` in blocks of about equal size: at most `block` long, a multiple of `multiple`.
int64_t balanced_block(int64_t length, int64_t block, int64_t multiple) {
  const int64_t blocks = max_of(ceil_div(length, block), 1);
  return max_of(round_up(ceil_div(length, blocks), multiple), multiple);
}

// The i-th to run of `count` pieces, taken from both ends in turn: under a causal mask pieces grow or shrink steadily,
// and contiguous ranges of tasks then have the same work.
int64_t from_both_ends(int64_t i, int64_t count) {
  return i % 2 == 0 ? i / 2 : count - 1 - i / 2;
}

// ---- where things are ----------------------------------------------------------------------------------------------

int64_t batch_offset(const AttentionSizes& sizes, const int64_t* strides, int64_t batch) {
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
Head<const Scalar> head_of(const AttentionSizes& sizes, const AttentionTensor<const void*>& tensor, int64_t batch,
                           int64_t head) {
  const int64_t offset = batch_offset(sizes, tensor.batch_strides, batch) + head * tensor.head_stride;
  return {static_cast<const Scalar*>(tensor.data) + offset, tensor.row_stride};
}
template <class Scalar>
Head<Scalar> head_of(const AttentionSizes& sizes, const AttentionTensor<void*>& tensor, int64_t batch, int64_t head) {
  const int64_t offset = batch_offset(sizes, tensor.batch_strides, batch) + head * tensor.head_stride;
  return {static_cast<Scalar*>(tensor.data) + offset, tensor.row_stride};
}

// ---- the mask ------------------------------------------------------------------------------------------------------

// What is added to `count` scores of row `row`, from column `column` on: use(i, value) for each.
template <class Scalar, class Use>
void visit_mask_row(const AttentionMask<const void*>& mask, int64_t head_offset, int64_t row, int64_t column,
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

int64_t mask_head_offset(const AttentionSizes& sizes, const AttentionMask<const void*>& mask, int64_t batch,
                         int64_t head) {
  return batch_offset(sizes, mask.batch_strides, batch) + head * mask.head_stride;
}

// ---- operands ------------------------------------------------------------------------------------------------------

// Products are taken in Factor: in the type of the sums, or in pairs of bfloat16 (pairs.h). Then scores are scaled in
// float32 after the product, and probabilities and the gradients of scores are rounded to bfloat16 before the next.
template <class Scalar, class Factor>
constexpr bool kInPairs = !std::is_same_v<Factor, accumulate_t<Scalar>>;

// Row-major rows in the type of the products: in place where they have it, widened into `buffer` otherwise.
template <class Factor, class Scalar>
Head<const Factor> rows_as(Head<const Scalar> source, int64_t begin, int64_t rows, int64_t columns, Factor* buffer) {
  if constexpr (std::is_same_v<Factor, Scalar>) {
    return {source.row(begin), source.row_stride};
  } else {
    for (int64_t i = 0; i < rows; ++i) widen_row(source.row(begin + i), columns, buffer + i * columns);
    return {buffer, columns};
  }
}

// The panels of a right operand `depth` deep, one after another.
template <class Factor, class Scalar>
void pack_panels(Matrix<Scalar> right, int64_t depth, int64_t columns, Factor* panels) {
  constexpr int64_t width = kTileColumns<Factor>;
  for (int64_t j = 0; j < columns; j += width) {
    pack_panel(right.at(0, j), depth, min_of(width, columns - j), panels, width);
    panels += packed_panels(panels, depth).panel_stride;
  }
}
// Rows [begin, ...) of a head as the rows, or as the columns, of a right operand.
template <class Scalar>
Matrix<Scalar> rows_of(Head<const Scalar> head, int64_t begin) {
  return {head.row(begin), head.row_stride, 1};
}
template <class Scalar>
Matrix<Scalar> columns_of(Head<const Scalar> head, int64_t begin) {
  return rows_of(head, begin).transposed();
}
// Elements of the panels of a right operand.
template <class Factor>
int64_t panels_size(int64_t depth, int64_t columns) {
  return round_up(columns, kTileColumns<Factor>) * round_up(depth, Step<Factor>::depth);
}

// ---- forward -------------------------------------------------------------------------------------------------------

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

// scores[i] = exp(scores[i] - shift); returns their sum.
template <class T>
T exponentiate_row(T* scores, int64_t count, T shift) {
  constexpr int64_t lanes = Vec<T>::size;
  const Vec<T> shifts = shift;
  Vec<T> partial[kTileVectors];
  for (int64_t v = 0; v < kTileVectors; ++v) partial[v] = Vec<T>::zero();
  int64_t i = 0;
  for (; i + kTileVectors * lanes <= count; i += kTileVectors * lanes) {
    for (int64_t v = 0; v < kTileVectors; ++v) {
      const Vec<T> p = exp(load(scores + i + v * lanes) - shifts);
      store(scores + i + v * lanes, p);
      partial[v] += p;
    }
  }
  for (; i < count; i += lanes) {
    const Vec<T> p = exp(load(scores + i) - shifts);
    store(scores + i, p);
    partial[0] += p;
  }
  for (int64_t v = 1; v < kTileVectors; ++v) partial[0] += partial[v];
  return reduce_add(partial[0]);
}

template <class T>
void scale_row(T* row, int64_t count, T factor) {
  int64_t i = 0;
  for (; i + Vec<T>::size <= count; i += Vec<T>::size) store(row + i, load(row + i) * Vec<T>(factor));
  if (i < count) store(row + i, load(row + i, count - i) * Vec<T>(factor), count - i);
}

template <class A, class B>
accumulate_t<A> dot(const A* a, const B* b, int64_t count) {
  using T = accumulate_t<A>;
  Vec<T> sum = Vec<T>::zero();
  int64_t i = 0;
  for (; i + Vec<T>::size <= count; i += Vec<T>::size) sum = fma(load(a + i), load(b + i), sum);
  if (i < count) sum = fma(load(a + i, count - i), load(b + i, count - i), sum);
  return reduce_add(sum);
}

// The running maximum and sum of a row; `scores` become exp(score - maximum), and `output`, summed so far under the old
// maximum, is rescaled to the new one. Scores have room for a whole number of vectors.
template <class T>
void online_softmax_row(T* scores, int64_t count, T* row_max, T* row_sum, T* output, int64_t value_size) {
  const int64_t padded = round_up(count, Vec<T>::size);
  for (int64_t i = count; i < padded; ++i) scores[i] = -kInfinity<T>;
  const T block_max = max_of_row(scores, padded);
  const T new_max = block_max > *row_max ? block_max : *row_max;
  const T shift = new_max == -kInfinity<T> ? T(0) : new_max;  // nothing seen but -inf: exp(-inf - 0) is 0, not NaN
  const T decay = exp(Vec<T>(*row_max - shift))[0];
  *row_sum = *row_sum * decay + exponentiate_row(scores, padded, shift);
  if (new_max != *row_max) scale_row(output, value_size, decay);
  *row_max = new_max;
}

// The query rows of one forward task, and the scratch that it works in.
template <class Scalar>
struct ForwardTask {
  using T = accumulate_t<Scalar>;
  using Factor = factor_t<Scalar>;
  static constexpr bool kPairs = kInPairs<Scalar, Factor>;
  const AttentionForwardArgs& args;
  int64_t batch, kv_head;
  int64_t row_begin, rows;         // of the group * L rows that share the kv head
  int64_t block_rows, block_keys;  // sizes of a block
  Factor* query;                   // [rows, E], scaled unless in pairs
  T* output;                       // [rows, E_v], not yet divided by the sums
  T* row_max;                      // [rows]
  T* row_sum;                      // [rows]
  T* scores;                       // [block_rows, block_keys]
  Factor* probabilities;           // the same, up to each row's sum; in place unless in pairs
  Factor* key_panels;              // K^T of the key block
  Factor* value_panels;            // V of the key block
  T* keep;                         // [block_keys], where there is dropout

  int64_t head(int64_t row) const {
    return kv_head * (args.sizes.heads / args.sizes.kv_heads) + (row_begin + row) / args.sizes.query_length;
  }
  int64_t position(int64_t row) const { return (row_begin + row) % args.sizes.query_length; }

  // How many of the keys from key_begin on the rows [begin, end) see.
  int64_t visible_keys(int64_t begin, int64_t end, int64_t key_begin, int64_t keys) const {
    if (!args.is_causal) return keys;
    const int64_t last = head(begin) == head(end - 1) ? position(end - 1) : args.sizes.query_length - 1;
    return max_of(min_of(keys, last + 1 - key_begin), 0);
  }

  void load_query() {
    const int64_t E = args.sizes.head_size;
    for (int64_t r = 0; r < rows; ++r) {
      const Scalar* source = head_of<Scalar>(args.sizes, args.query, batch, head(r)).row(position(r));
      if constexpr (kPairs) {
        __builtin_memcpy(query + r * E, source, static_cast<size_t>(E) * sizeof(Factor));
      } else {
        widen_row(source, E, query + r * E);
        scale_row(query + r * E, E, static_cast<T>(args.scale));
      }
      row_max[r] = -kInfinity<T>;
      row_sum[r] = 0;
    }
    fill(output, T(0), rows * args.sizes.value_size);
  }

  // Scores of a row, as the product left them, become probabilities up to the row's sum.
  void soften_row(int64_t row, T* row_scores, int64_t key_begin, int64_t keys) {
    if constexpr (kPairs) scale_row(row_scores, keys, static_cast<T>(args.scale));
    if (args.mask.type != AttentionMaskType::none) {
      visit_mask_row<Scalar>(args.mask, mask_head_offset(args.sizes, args.mask, batch, head(row)), position(row),
                             key_begin, keys, [=](int64_t i, T value) { row_scores[i] += value; });
    }
    const int64_t value_size = args.sizes.value_size;
    const int64_t seen = args.is_causal ? max_of(min_of(keys, position(row) + 1 - key_begin), 0) : keys;
    online_softmax_row(row_scores, seen, row_max + row, row_sum + row, output + row * value_size, value_size);
    fill(row_scores + seen, T(0), keys - seen);
    if (args.dropout_p > 0) {
      draw_keep_row(args.dropout_seed, args.dropout_p, batch * args.sizes.heads + head(row), position(row), key_begin,
                    keys, keep);
      for (int64_t i = 0; i < keys; ++i) row_scores[i] *= keep[i];
    }
  }

  // The same as add_key_block for few rows, which read keys and values where they are.
  void add_key_block_unpacked(int64_t key_begin, int64_t keys) {
    const int64_t E = args.sizes.head_size, value_size = args.sizes.value_size;
    const auto key = head_of<Scalar>(args.sizes, args.key, batch, kv_head);
    Scratch<T> buffer(std::is_same_v<Scalar, T> ? 0 : keys * value_size);
    const auto value =
        rows_as(head_of<Scalar>(args.sizes, args.value, batch, kv_head), key_begin, keys, value_size, buffer.data());
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t visible = visible_keys(r, r + 1, key_begin, keys);
      if (visible == 0) continue;
      for (int64_t k = 0; k < visible; ++k) scores[k] = dot(query + r * E, key.row(key_begin + k), E);
      soften_row(r, scores, key_begin, visible);
      multiply<T>(1, value_size, visible, scores, block_keys, plain_panels(value.data, value.row_stride),
                  output + r * value_size, value_size, true);
    }
  }

  void add_key_block(int64_t key_begin, int64_t keys) {
    if (rows <= kFewRows) return add_key_block_unpacked(key_begin, keys);
    const int64_t E = args.sizes.head_size, value_size = args.sizes.value_size;
    const auto key = head_of<Scalar>(args.sizes, args.key, batch, kv_head);
    const auto value = head_of<Scalar>(args.sizes, args.value, batch, kv_head);
    pack_panels(columns_of(key, key_begin), E, keys, key_panels);
    pack_panels(rows_of(value, key_begin), keys, value_size, value_panels);
    for (int64_t begin = 0; begin < rows; begin += block_rows) {
      const int64_t end = min_of(begin + block_rows, rows);
      const int64_t visible = visible_keys(begin, end, key_begin, keys);
      if (visible == 0) continue;
      multiply<Factor>(end - begin, visible, E, query + begin * E, E, packed_panels<Factor>(key_panels, E), scores,
                       block_keys, false);
      for (int64_t r = begin; r < end; ++r) {
        T* row_scores = scores + (r - begin) * block_keys;
        soften_row(r, row_scores, key_begin, visible);
        if constexpr (kPairs) narrow_row(row_scores, visible, probabilities + (r - begin) * block_keys);
      }
      multiply<Factor>(end - begin, value_size, visible, probabilities, block_keys,
                       packed_panels<Factor>(value_panels, keys), output + begin * value_size, value_size, true);
    }
  }

  // O = output / sum / (1 - p); a row that sees nothing but -inf has sum 0 and gives 0.
  void store_output() {
    const int64_t value_size = args.sizes.value_size;
    const T kept = args.dropout_p < 1 ? static_cast<T>(1 / (1 - args.dropout_p)) : T(0);
    const int64_t all_rows = args.sizes.batches * args.sizes.heads * args.sizes.query_length;
    T* statistics = static_cast<T*>(args.statistics);
    for (int64_t r = 0; r < rows; ++r) {
      scale_row(output + r * value_size, value_size, row_sum[r] == 0 ? T(0) : kept / row_sum[r]);
      const Head<Scalar> out = head_of<Scalar>(args.sizes, args.output, batch, head(r));
      narrow_row(output + r * value_size, value_size, out.row(position(r)));
      if constexpr (sizeof(Scalar) < sizeof(T)) {
        narrow_row(output + r * value_size, value_size,
                   head_of<T>(args.sizes, args.exact_output, batch, head(r)).row(position(r)));
      }
      const int64_t line = (batch * args.sizes.heads + head(r)) * args.sizes.query_length + position(r);
      statistics[line] = row_max[r];
      statistics[all_rows + line] = row_sum[r];
    }
  }

  void run() {
    load_query();
    const int64_t key_length = visible_keys(0, rows, 0, args.sizes.key_length);
    for (int64_t begin = 0; begin < key_length; begin += block_keys) {
      add_key_block(begin, min_of(block_keys, key_length - begin));
    }
    store_output();
  }
};

template <class Scalar>
void forward_task(const AttentionForwardArgs& args, int64_t batch, int64_t kv_head, int64_t row_begin, int64_t rows,
                  int64_t block_rows) {
  using T = accumulate_t<Scalar>;
  using Factor = factor_t<Scalar>;
  const int64_t E = args.sizes.head_size, value_size = args.sizes.value_size;
  const int64_t keys = balanced_block(args.sizes.key_length, kForwardKeys, kPhiloxGroup);
  Scratch<T> output(rows * value_size), statistics(2 * rows + keys), scores(block_rows * keys);
  Scratch<Factor> query(rows * E), key_panels(panels_size<Factor>(E, keys)),
      value_panels(panels_size<Factor>(keys, value_size)), rounded(kInPairs<Scalar, Factor> ? block_rows * keys : 0);
  Factor* probabilities = rounded.data();
  if constexpr (!kInPairs<Scalar, Factor>) probabilities = scores.data();
  ForwardTask<Scalar> task{args,
                           batch,
                           kv_head,
                           row_begin,
                           rows,
                           block_rows,
                           keys,
                           query.data(),
                           output.data(),
                           statistics.data(),
                           statistics.data() + rows,
                           scores.data(),
                           probabilities,
                           key_panels.data(),
                           value_panels.data(),
                           statistics.data() + 2 * rows};
  task.run();
}

// Work below which a call stays on one thread, in multiply-adds.
int64_t grain_of(const AttentionSizes& sizes, int64_t tasks) {
  const double work = static_cast<double>(sizes.batches) * sizes.heads * sizes.query_length * sizes.key_length *
                      (sizes.head_size + sizes.value_size);
  return work < 2e5 ? tasks : 1;
}

void forward(const AttentionForwardArgs& args) {
  const AttentionSizes& sizes = args.sizes;
  const int64_t kv_heads = sizes.batches * sizes.kv_heads;
  if (kv_heads == 0 || sizes.heads == 0 || sizes.query_length == 0) return;
  const int64_t rows = sizes.heads / sizes.kv_heads * sizes.query_length;
  const int64_t block_rows = balanced_block(rows, kForwardRows, kTileRows);
  const int64_t blocks = ceil_div(rows, block_rows);
  const int64_t task_rows = block_rows * max_of(min_of(kForwardBlocks, blocks * kv_heads / kWantedTasks), 1);
  const int64_t pieces = ceil_div(rows, task_rows);
  parallel_for(kv_heads * pieces, grain_of(sizes, kv_heads * pieces), [&](int64_t task) {
    const int64_t index = task / pieces, begin = from_both_ends(task % pieces, pieces) * task_rows;
    dispatch(args.dtype, [&](auto* type) {
      using Scalar = std::remove_pointer_t<decltype(type)>;
      forward_task<Scalar>(args, index / sizes.kv_heads, index % sizes.kv_heads, begin, min_of(task_rows, rows - begin),
                           block_rows);
    });
  });
}

// ---- backward: one block of the scores' gradient --------------------------------------------------------------------

// The query side of one head in the type of the products, in blocks of kBackwardQueries: panels of Q^T and dO^T are
// right operands of the transposed scores, panels of Q and dO those of dK and dV.
template <class Factor>
struct QueryBlock {
  using T = accumulate_t<Factor>;
  int64_t begin, count;         // queries
  Factor* query_transposed;     // panels of [E, count], scaled as in forward
  Factor* gradient_transposed;  // panels of [E_v, count]
  Factor* query;                // panels of [count, E]
  Factor* gradient;             // panels of [count, E_v]
  T* row_max;                   // [kBackwardQueries]; infinite where the row saw nothing but -inf
  T* row_factor;                // [kBackwardQueries]: 1 / sum; zero there
  T* row_dot;                   // [kBackwardQueries]: D
};

// The key side of one block.
template <class Factor>
struct KeyBlock {
  int64_t begin, count;
  Head<const Factor> key, value;
};

template <class Scalar, class Factor>
struct BackwardBlocks {
  using T = accumulate_t<Scalar>;
  static constexpr bool kPairs = kInPairs<Scalar, Factor>;
  static constexpr int64_t kStride = kBackwardQueries;  // of the transposed scores
  const AttentionBackwardArgs& args;
  T* scores;              // S^T, [kBackwardKeys, kStride]
  T* weight_gradient;     // dP^T, the same
  Factor* probabilities;  // P^T after dropout, the same; in the place of scores unless in pairs
  Factor* gradient;       // dS^T, the same; in the place of weight_gradient unless in pairs
  Factor* panel;          // of dS^T, where it is in pairs
  T* bias;                // mask^T, the same; null without a mask
  T* keep;                // dropout's factors, the same; null without dropout
  T* keep_row;            // [kBackwardKeys]

  void load_bias(int64_t batch, int64_t head, const KeyBlock<Factor>& keys, const QueryBlock<Factor>& queries) {
    const int64_t offset = mask_head_offset(args.sizes, args.mask, batch, head);
    for (int64_t q = 0; q < queries.count; ++q) {
      visit_mask_row<Scalar>(args.mask, offset, queries.begin + q, keys.begin, keys.count,
                             [&](int64_t k, T value) { bias[k * kStride + q] = value; });
    }
  }

  void load_keep(int64_t batch, int64_t head, const KeyBlock<Factor>& keys, const QueryBlock<Factor>& queries) {
    const T factor = args.dropout_p < 1 ? static_cast<T>(1 / (1 - args.dropout_p)) : T(0);
    for (int64_t q = 0; q < queries.count; ++q) {
      draw_keep_row(args.dropout_seed, args.dropout_p, batch * args.sizes.heads + head, queries.begin + q, keys.begin,
                    keys.count, keep_row);
      for (int64_t k = 0; k < keys.count; ++k) keep[k * kStride + q] = keep_row[k] * factor;
    }
  }

  // How many keys of the block the queries before `end` see, and the first query that sees key `k`.
  int64_t visible_keys(const KeyBlock<Factor>& keys, const QueryBlock<Factor>& queries, int64_t end) const {
    return args.is_causal ? max_of(min_of(keys.count, queries.begin + end - keys.begin), 0) : keys.count;
  }
  int64_t first_query(const KeyBlock<Factor>& keys, const QueryBlock<Factor>& queries, int64_t k) const {
    return args.is_causal ? min_of(max_of(keys.begin + k - queries.begin, 0), queries.count) : 0;
  }

  // Both products are there; one sweep turns scores into P^T and dP^T into dS^T. `factor` is the scale for dQ and dK,
  // 1 for the mask. Lanes beyond the queries hold what was there before and are read by nothing.
  template <bool kBias, bool kKeep>
  void sweep(const KeyBlock<Factor>& keys, const QueryBlock<Factor>& queries, T factor) {
    constexpr int64_t lanes = Vec<T>::size;
    for (int64_t k = 0; k < keys.count; ++k) {
      const int64_t first = first_query(keys, queries, k);
      const int64_t unseen = first == queries.count ? first : first / lanes * lanes;  // no products are there for these
      fill(probabilities + k * kStride, Factor{}, unseen);
      fill(gradient + k * kStride, Factor{}, unseen);
      for (int64_t q = unseen; q < queries.count; q += lanes) {
        const int64_t at = k * kStride + q;
        Vec<T> score = load(scores + at);
        if constexpr (kPairs) score *= Vec<T>(static_cast<T>(args.scale));
        if constexpr (kBias) score += load(bias + at);
        Vec<T> p = exp(score - load(queries.row_max + q)) * load(queries.row_factor + q);
        if (first > q) p = select(first_lanes<T>(min_of(first - q, lanes)), Vec<T>::zero(), p);
        Vec<T> dp = load(weight_gradient + at);
        if constexpr (kKeep) {
          const Vec<T> kept = load(keep + at);
          dp *= kept;
          store(probabilities + at, p * kept);
        } else {
          store(probabilities + at, p);
        }
        store(gradient + at, p * (dp - load(queries.row_dot + q)) * Vec<T>(factor));
      }
    }
  }

  // A row of `left` for each key times panels of a column for each query, where the query sees the key.
  void multiply_visible(const KeyBlock<Factor>& keys, const QueryBlock<Factor>& queries, Head<const Factor> left,
                        int64_t depth, const Factor* panels, T* product) const {
    constexpr int64_t width = kTileColumns<Factor>;
    for (int64_t q = 0; q < queries.count; q += width) {
      const int64_t columns = min_of(width, queries.count - q);
      const Panels<Factor> right = packed_panels(panels, depth);
      multiply<Factor>(visible_keys(keys, queries, q + columns), columns, depth, left.data, left.row_stride, right,
                       product + q, kStride, false);
      panels += right.panel_stride;
    }
  }

  // sums[k] += sum over the queries that see key k of weights[k][q] * right[q], for panels of rows of right.
  void add_to_keys(const KeyBlock<Factor>& keys, const QueryBlock<Factor>& queries, const Factor* weights,
                   const Factor* right, int64_t columns, T* sums) const {
    const int64_t step = args.is_causal ? kDiagonalKeys : keys.count;
    for (int64_t k = 0; k < keys.count; k += step) {
      const int64_t first = first_query(keys, queries, k) / Step<Factor>::depth * Step<Factor>::depth;
      Panels<Factor> panels = packed_panels(right, queries.count);
      panels.data += first * panels.row_stride;
      multiply<Factor>(min_of(step, keys.count - k), columns, queries.count - first, weights + k * kStride + first,
                       kStride, panels, sums + k * columns, columns, true);
    }
  }

  // sums[.][q] += sum over the keys that query q sees of left[.][k] * dS^T[k][q].
  void add_to_queries(const KeyBlock<Factor>& keys, const QueryBlock<Factor>& queries, const Factor* left,
                      int64_t left_stride, T* sums) const {
    constexpr int64_t width = kTileColumns<Factor>;
    for (int64_t q = 0; q < queries.count; q += width) {
      const int64_t columns = min_of(width, queries.count - q), visible = visible_keys(keys, queries, q + columns);
      Panels<Factor> right = plain_panels<Factor>(gradient + q, kStride);
      if constexpr (kPairs) {
        pack_panel(Matrix<Factor>{gradient + q, kStride, 1}, visible, columns, panel, width);
        right = packed_panels<Factor>(panel, visible);
      }
      multiply<Factor>(args.sizes.head_size, columns, visible, left, left_stride, right, sums + q, kStride, true);
    }
  }

  void compute(int64_t batch, int64_t head, const KeyBlock<Factor>& keys, const QueryBlock<Factor>& queries, T factor) {
    multiply_visible(keys, queries, keys.key, args.sizes.head_size, queries.query_transposed, scores);
    multiply_visible(keys, queries, keys.value, args.sizes.value_size, queries.gradient_transposed, weight_gradient);
    if (bias != nullptr) load_bias(batch, head, keys, queries);
    if (keep != nullptr) load_keep(batch, head, keys, queries);
    if (bias != nullptr) {
      keep != nullptr ? sweep<true, true>(keys, queries, factor) : sweep<true, false>(keys, queries, factor);
    } else {
      keep != nullptr ? sweep<false, true>(keys, queries, factor) : sweep<false, false>(keys, queries, factor);
    }
  }
};

// ---- backward: the query side ---------------------------------------------------------------------------------------

int64_t query_blocks(const AttentionSizes& sizes) {
  return ceil_div(sizes.query_length, kBackwardQueries);
}

// Packed query blocks of `heads` heads, beginning with `first_head`.
template <class Scalar, class Factor>
class QuerySide {
 public:
  using T = accumulate_t<Scalar>;

  QuerySide(const AttentionBackwardArgs& args, int64_t batch, int64_t first_head, int64_t heads)
      : sizes_(args.sizes),
        across_(panels_size<Factor>(sizes_.head_size, kBackwardQueries)),
        gradient_across_(panels_size<Factor>(sizes_.value_size, kBackwardQueries)),
        along_(panels_size<Factor>(kBackwardQueries, sizes_.head_size)),
        gradient_along_(panels_size<Factor>(kBackwardQueries, sizes_.value_size)),
        panels_(heads * query_blocks(sizes_) * (across_ + gradient_across_ + along_ + gradient_along_)),
        rows_(heads * query_blocks(sizes_) * 3 * kBackwardQueries),
        output_(kInPairs<Scalar, Factor> ? 0 : panels_size<T>(sizes_.value_size, kBackwardQueries)) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t b = 0; b < query_blocks(sizes_); ++b) pack(args, batch, first_head + h, block(h, b));
    }
  }

  QueryBlock<Factor> block(int64_t head, int64_t index) const {
    const int64_t Q = kBackwardQueries, place = head * query_blocks(sizes_) + index;
    Factor* panels = panels_.data() + place * (across_ + gradient_across_ + along_ + gradient_along_);
    T* rows = rows_.data() + place * 3 * Q;
    return {index * Q,
            min_of(Q, sizes_.query_length - index * Q),
            panels,
            panels + across_,
            panels + across_ + gradient_across_,
            panels + across_ + gradient_across_ + along_,
            rows,
            rows + Q,
            rows + 2 * Q};
  }

 private:
  void pack(const AttentionBackwardArgs& args, int64_t batch, int64_t head, const QueryBlock<Factor>& block) {
    const AttentionSizes& sizes = sizes_;
    const auto query = head_of<Scalar>(sizes, args.query, batch, head);
    const auto gradient = head_of<Scalar>(sizes, args.grad_output, batch, head);
    const int64_t E = sizes.head_size, value_size = sizes.value_size;
    pack_panels(columns_of(query, block.begin), E, block.count, block.query_transposed);
    pack_panels(columns_of(gradient, block.begin), value_size, block.count, block.gradient_transposed);
    pack_panels(rows_of(query, block.begin), block.count, E, block.query);
    pack_panels(rows_of(gradient, block.begin), block.count, value_size, block.gradient);
    // The rounding of a half-precision output would be most of the error of D.
    constexpr bool is_rounded = sizeof(Scalar) < sizeof(T);
    const auto output = head_of<T>(sizes, is_rounded ? args.exact_output : args.output, batch, head);
    if constexpr (kInPairs<Scalar, Factor>) {
      for (int64_t q = 0; q < block.count; ++q) {
        block.row_dot[q] = dot(output.row(block.begin + q), gradient.row(block.begin + q), value_size);
      }
    } else {
      scale_row(block.query_transposed, round_up(block.count, kTileColumns<T>) * E, static_cast<T>(args.scale));
      pack_panels(columns_of(output, block.begin), value_size, block.count, output_.data());
      dot_rows(block.gradient_transposed, output_.data(), value_size, block.row_dot);
    }

    const int64_t line = (batch * sizes.heads + head) * sizes.query_length + block.begin;
    const T* row_max = static_cast<const T*>(args.statistics) + line;
    const T* row_sum = row_max + sizes.batches * sizes.heads * sizes.query_length;
    for (int64_t q = 0; q < kBackwardQueries; ++q) {
      const bool sees_keys = q < block.count && row_max[q] != -kInfinity<T>;
      block.row_max[q] = sees_keys ? row_max[q] : kInfinity<T>;
      block.row_factor[q] = q >= block.count || row_sum[q] == 0 ? T(0) : 1 / row_sum[q];
    }
  }

  // dots[q] = sum over e of a[e][q] * b[e][q], one product after another, for two sets of panels of kBackwardQueries
  // columns; columns that were not packed give rubbish that nothing reads.
  static void dot_rows(const T* a, const T* b, int64_t depth, T* dots) {
    constexpr int64_t width = kTileColumns<T>;
    for (int64_t q = 0; q < kBackwardQueries; q += Vec<T>::size) {
      const int64_t panel = q / width * width * depth + q % width;
      Vec<T> sum = Vec<T>::zero();
      for (int64_t e = 0; e < depth; ++e) {
        sum = fma(load(a + panel + e * width), load(b + panel + e * width), sum);
      }
      store(dots + q, sum);
    }
  }

  const AttentionSizes& sizes_;
  int64_t across_, gradient_across_, along_, gradient_along_;  // elements of each set of panels of a block
  Scratch<Factor> panels_;
  Scratch<T> rows_, output_;
};

// ---- backward: query, key and value ---------------------------------------------------------------------------------

// Elements of the transposed dQ of one kv head's queries: [group, block, E, kBackwardQueries].
int64_t query_gradient_size(const AttentionSizes& sizes) {
  return sizes.heads / sizes.kv_heads * query_blocks(sizes) * sizes.head_size * kBackwardQueries;
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
      const T* block = pieces + (h * query_blocks(sizes) + b) * E * kBackwardQueries;
      const int64_t begin = b * kBackwardQueries, count = min_of(kBackwardQueries, sizes.query_length - begin);
      transpose(block, kBackwardQueries, E, count, rows.data(), E);
      for (int64_t q = 0; q < count; ++q) narrow_row(rows.data() + q * E, E, out.row(begin + q));
    }
  }
}

template <class Scalar, class Factor>
struct BackwardScratch {
  using T = accumulate_t<Scalar>;
  Scratch<T> memory;
  Scratch<Factor> factors;
  BackwardBlocks<Scalar, Factor> blocks;
  explicit BackwardScratch(const AttentionBackwardArgs& args)
      : memory(4 * kBlock + kBackwardKeys),
        factors(kInPairs<Scalar, Factor> ? 2 * kBlock + panels_size<Factor>(kBackwardKeys, 1) : 0),
        blocks{args,
               memory.data(),
               memory.data() + kBlock,
               factors.data(),
               factors.data() + kBlock,
               factors.data() + 2 * kBlock,
               args.mask.type != AttentionMaskType::none ? memory.data() + 2 * kBlock : nullptr,
               args.dropout_p > 0 ? memory.data() + 3 * kBlock : nullptr,
               memory.data() + 4 * kBlock} {
    if constexpr (!kInPairs<Scalar, Factor>) {
      blocks.probabilities = blocks.scores;
      blocks.gradient = blocks.weight_gradient;
    }
  }

 private:
  static constexpr int64_t kBlock = kBackwardKeys * kBackwardQueries;
};

// dK and dV of the key blocks [first, last) of one kv head, and what these keys give to its transposed dQ.
template <class Scalar>
void backward_task(const AttentionBackwardArgs& args, int64_t batch, int64_t kv_head, int64_t block_keys, int64_t first,
                   int64_t last, accumulate_t<Scalar>* query_gradient) {
  using T = accumulate_t<Scalar>;
  using Factor = factor_t<Scalar>;
  const AttentionSizes& sizes = args.sizes;
  const int64_t E = sizes.head_size, value_size = sizes.value_size, group = sizes.heads / sizes.kv_heads;
  const QuerySide<Scalar, Factor> query_side(args, batch, kv_head * group, group);
  BackwardScratch<Scalar, Factor> scratch(args);
  Scratch<Factor> key_buffer(block_keys * E), value_buffer(block_keys * value_size), key_transposed(block_keys * E);
  Scratch<T> grad_key(block_keys * E), grad_value(block_keys * value_size);
  const auto key = head_of<Scalar>(sizes, args.key, batch, kv_head);
  const auto value = head_of<Scalar>(sizes, args.value, batch, kv_head);
  const bool wants_query = args.grad_query.data != nullptr, wants_key = args.grad_key.data != nullptr,
             wants_value = args.grad_value.data != nullptr;
  fill(query_gradient, T(0), wants_query ? query_gradient_size(sizes) : 0);

  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * block_keys, count = min_of(block_keys, sizes.key_length - begin);
    const KeyBlock<Factor> keys{begin, count, rows_as(key, begin, count, E, key_buffer.data()),
                                rows_as(value, begin, count, value_size, value_buffer.data())};
    if (wants_query) transpose(key.row(begin), key.row_stride, count, E, key_transposed.data(), block_keys);
    fill(grad_key.data(), T(0), count * E);
    fill(grad_value.data(), T(0), count * value_size);
    for (int64_t h = 0; h < group; ++h) {
      for (int64_t b = args.is_causal ? begin / kBackwardQueries : 0; b < query_blocks(sizes); ++b) {
        const QueryBlock<Factor> queries = query_side.block(h, b);
        scratch.blocks.compute(batch, kv_head * group + h, keys, queries, static_cast<T>(args.scale));
        if (wants_value) {
          scratch.blocks.add_to_keys(keys, queries, scratch.blocks.probabilities, queries.gradient, value_size,
                                     grad_value.data());
        }
        if (wants_key) {
          scratch.blocks.add_to_keys(keys, queries, scratch.blocks.gradient, queries.query, E, grad_key.data());
        }
        if (wants_query) {
          scratch.blocks.add_to_queries(keys, queries, key_transposed.data(), block_keys,
                                        query_gradient + (h * query_blocks(sizes) + b) * E * kBackwardQueries);
        }
      }
    }
    for (int64_t k = 0; wants_key && k < count; ++k) {
      narrow_row(grad_key.data() + k * E, E, head_of<Scalar>(sizes, args.grad_key, batch, kv_head).row(begin + k));
    }
    for (int64_t k = 0; wants_value && k < count; ++k) {
      narrow_row(grad_value.data() + k * value_size, value_size,
                 head_of<Scalar>(sizes, args.grad_value, batch, kv_head).row(begin + k));
    }
  }
}

template <class Scalar>
void backward_inputs(const AttentionBackwardArgs& args) {
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
    backward_task<Scalar>(args, batch, kv_head, block_keys, part * blocks / parts, (part + 1) * blocks / parts,
                          query_gradient);
    if (wants_query && parts == 1) store_query_gradient<Scalar>(args, batch, kv_head, query_gradient, 1);
  });
  if (!wants_query || parts == 1) return;
  parallel_for(kv_heads, grain_of(sizes, kv_heads), [&](int64_t index) {
    store_query_gradient<Scalar>(args, index / sizes.kv_heads, index % sizes.kv_heads,
                                 shared.data() + index * parts * size, parts);
  });
}

// ---- backward: the mask ---------------------------------------------------------------------------------------------

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

template <class Scalar>
void mask_task(const AttentionBackwardArgs& args, const MaskHeads& heads, int64_t owned, int64_t block_keys,
               int64_t first, int64_t last, accumulate_t<Scalar>* sums) {
  using T = accumulate_t<Scalar>;
  const AttentionSizes& sizes = args.sizes;
  const AttentionMask<void*>& mask = args.grad_mask;
  const int64_t E = sizes.head_size, value_size = sizes.value_size;
  BackwardScratch<Scalar, T> scratch(args);  // the mask's gradient is not rounded on the way
  Scratch<T> key_buffer(block_keys * E), value_buffer(block_keys * value_size);
  for (int64_t shared = 0; shared < heads.shared; ++shared) {
    const int64_t place = heads.place(owned, shared), batch = place / sizes.heads, head = place % sizes.heads;
    const int64_t kv_head = head / (sizes.heads / sizes.kv_heads);
    const QuerySide<Scalar, T> query_side(args, batch, head, 1);
    const auto key = head_of<Scalar>(sizes, args.key, batch, kv_head);
    const auto value = head_of<Scalar>(sizes, args.value, batch, kv_head);
    T* head_sums = sums + batch_offset(sizes, mask.batch_strides, batch) + head * mask.head_stride;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * block_keys, count = min_of(block_keys, sizes.key_length - begin);
      const KeyBlock<T> keys{begin, count, rows_as(key, begin, count, E, key_buffer.data()),
                             rows_as(value, begin, count, value_size, value_buffer.data())};
      for (int64_t b = args.is_causal ? begin / kBackwardQueries : 0; b < query_blocks(sizes); ++b) {
        const QueryBlock<T> queries = query_side.block(0, b);
        scratch.blocks.compute(batch, head, keys, queries, T(1));
        add_block_to_mask(scratch.blocks.gradient, kBackwardQueries, count, queries.count,
                          head_sums + queries.begin * mask.row_stride + begin * mask.column_stride, mask.row_stride,
                          mask.column_stride);
      }
    }
  }
}

template <class Scalar>
void backward_mask(const AttentionBackwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const AttentionSizes& sizes = args.sizes;
  const MaskHeads heads(sizes, args.grad_mask);
  const int64_t block_keys = balanced_block(sizes.key_length, kBackwardKeys, kPhiloxGroup);
  const int64_t blocks = ceil_div(sizes.key_length, block_keys);
  const int64_t parts = args.grad_mask.column_stride == 0 ? 1 : max_of(blocks, 1);
  Scratch<T> sums(args.grad_mask_size);
  fill(sums.data(), T(0), args.grad_mask_size);
  parallel_for(heads.owned * parts, grain_of(sizes, heads.owned * parts), [&](int64_t task) {
    const int64_t part = task % parts;
    mask_task<Scalar>(args, heads, task / parts, block_keys, part * blocks / parts, (part + 1) * blocks / parts,
                      sums.data());
  });
  if (args.grad_mask.type == AttentionMaskType::float32) {
    float* out = static_cast<float*>(args.grad_mask.data);
    for (int64_t i = 0; i < args.grad_mask_size; ++i) out[i] = static_cast<float>(sums[i]);
  } else {
    narrow_row(sums.data(), args.grad_mask_size, static_cast<Scalar*>(args.grad_mask.data));
  }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

void backward(const AttentionBackwardArgs& args) {
  dispatch(args.dtype, [&](auto* type) {
    using Scalar = std::remove_pointer_t<decltype(type)>;
    const bool wants_inputs = args.grad_query.data || args.grad_key.data || args.grad_value.data;
    if (wants_inputs && args.sizes.batches * args.sizes.kv_heads > 0) backward_inputs<Scalar>(args);
    if (args.grad_mask.type != AttentionMaskType::none) backward_mask<Scalar>(args);
  });
}

}  // namespace

AttentionKernels attention_kernels() {
  return {forward, backward};
}

}  // namespace dlkernels::DLKERNELS_ISA
