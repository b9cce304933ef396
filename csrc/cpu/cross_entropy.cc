// Softmax cross-entropy.
//
//   m = max_c x_c,  s = log sum_c exp(x_c - m),  log p_c = (x_c - m) - s
//   loss = - sum_c t_c log p_c,   t_c = w_c ((1 - eps) q_c + eps / C)
//   dx_c = g (T p_c - t_c),       T = sum_c t_c
//
// q is the one-hot target or the given probabilities, w the class weights, eps the label smoothing. m and s are kept
// apart: with logits near 1e4 their sum would round away what the loss is made of.
//
// A row's classes either lie side by side (inner == 1: lanes are classes, a row stays in the first- or second-level
// cache between its passes) or `inner` elements apart (lanes are neighbouring rows, every pass is vertical). Nothing of
// size rows x classes is written but the gradient. Forward reads the logits once from memory, backward reads them once
// and writes the gradient once: 4 + 8 bytes an element in float32, about 20 operations, so memory-bound.
#include "cross_entropy.h"

#include "parallel.h"
#include "vmath.h"

namespace dlkernels::DLKERNELS_ISA {
namespace {

// Elements of logits per task: enough to hide the cost of a task, few enough to balance; fixed, so that the order in
// which losses are added does not depend on the number of threads.
constexpr int64_t kTaskElements = 16384;

// Independent running sums of a pass, to hide the latency of an addition.
constexpr int64_t kUnroll = 4;

// ---- passes over one row whose classes are contiguous
// ----------------------------------------------------------------

// Calls body(offset, count, slot): `count` lanes from `offset`, slots in rotation for independent partial results.
template <class T, class Body>
DLKERNELS_INLINE void for_each_vector(int64_t count, Body&& body) {
  constexpr int64_t lanes = Vec<T>::size;
  int64_t i = 0;
  for (; i + kUnroll * lanes <= count; i += kUnroll * lanes) {
    for (int64_t slot = 0; slot < kUnroll; ++slot) body(i + slot * lanes, lanes, slot);
  }
  for (; i + lanes <= count; i += lanes) body(i, lanes, 0);
  if (i < count) body(i, count - i, 1);
}

template <class T>
DLKERNELS_INLINE T combine_sums(Vec<T> (&sums)[kUnroll]) {
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

template <class Scalar, class T = accumulate_t<Scalar>>
T row_max(const Scalar* x, int64_t classes) {
  Vec<T> best[kUnroll];
  for (auto& b : best) b = -kInfinity<T>;
  for_each_vector<T>(classes, [&](int64_t c, int64_t count, int64_t slot) {
    best[slot] = max(best[slot], keep_lanes(load_lanes(x + c, count), -kInfinity<T>, count));
  });
  return reduce_max(max(max(best[0], best[1]), max(best[2], best[3])));
}

// sum_c exp(x_c - maximum)
template <class Scalar, class T = accumulate_t<Scalar>>
T row_sum(const Scalar* x, int64_t classes, T maximum) {
  Vec<T> sums[kUnroll] = {T(0), T(0), T(0), T(0)};
  for_each_vector<T>(classes, [&](int64_t c, int64_t count, int64_t slot) {
    sums[slot] += keep_lanes(exp(load_lanes(x + c, count) - Vec<T>(maximum)), T(0), count);
  });
  return combine_sums(sums);
}

// sum_c w_c q_c log p_c, with q null for all ones.
template <class Scalar, class T = accumulate_t<Scalar>>
T row_weighted_log_probability(const Scalar* x, const Scalar* q, const T* weight, int64_t classes, T smoothing,
                               T maximum, T log_sum) {
  Vec<T> sums[kUnroll] = {T(0), T(0), T(0), T(0)};
  const Vec<T> uniform = smoothing / static_cast<T>(classes);
  for_each_vector<T>(classes, [&](int64_t c, int64_t count, int64_t slot) {
    Vec<T> share = T(1);
    if (q != nullptr) share = fma(load_lanes(q + c, count), Vec<T>(T(1) - smoothing), uniform);
    if (weight != nullptr) share *= load_lanes(weight + c, count);
    const Vec<T> log_p = (load_lanes(x + c, count) - Vec<T>(maximum)) - Vec<T>(log_sum);
    sums[slot] += keep_lanes(share * log_p, T(0), count);
  });
  return combine_sums(sums);
}

// sum_c w_c q_c, with w or q null for all ones.
template <class Scalar, class T = accumulate_t<Scalar>>
T row_target_mass(const Scalar* q, const T* weight, int64_t classes, T smoothing) {
  Vec<T> sums[kUnroll] = {T(0), T(0), T(0), T(0)};
  const Vec<T> uniform = smoothing / static_cast<T>(classes);
  for_each_vector<T>(classes, [&](int64_t c, int64_t count, int64_t slot) {
    Vec<T> share = T(1);
    if (q != nullptr) share = fma(load_lanes(q + c, count), Vec<T>(T(1) - smoothing), uniform);
    if (weight != nullptr) share *= load_lanes(weight + c, count);
    sums[slot] += keep_lanes(share, T(0), count);
  });
  return combine_sums(sums);
}

// ---- typed view of the arguments ---------------------------------------------------------------------------------

template <class Scalar>
struct Problem {
  using T = accumulate_t<Scalar>;
  const CrossEntropyShape& shape;
  const Scalar* logits = static_cast<const Scalar*>(shape.logits);
  const Scalar* probabilities = static_cast<const Scalar*>(shape.target_probabilities);
  const T* weight = static_cast<const T*>(shape.weight);
  T smoothing = static_cast<T>(shape.label_smoothing);
  int64_t rows = shape.outer * shape.inner;
  int64_t rows_per_task = max_of(kTaskElements / max_of(shape.classes, 1), 1);

  bool ignored(int64_t row) const { return probabilities == nullptr && shape.target[row] == shape.ignore_index; }
  T class_weight(int64_t c) const { return weight == nullptr ? T(1) : weight[c]; }
};

// Weight of a smoothed one-hot target spread over all classes: eps / C * sum_c w_c.
template <class Scalar, class T = accumulate_t<Scalar>>
T uniform_mass(const Problem<Scalar>& p) {
  if (p.smoothing == T(0)) return T(0);
  const Scalar* ones = nullptr;
  return p.smoothing / static_cast<T>(p.shape.classes) * row_target_mass(ones, p.weight, p.shape.classes, T(0));
}

// ---- classes contiguous (inner == 1) -----------------------------------------------------------------------------

// Of rows [begin, end). The logarithms are taken of a vector of rows at a time.
template <class Scalar, class T = accumulate_t<Scalar>>
void row_statistics(const Problem<Scalar>& p, int64_t begin, int64_t end, T* maxima, T* log_sums) {
  for (int64_t row = begin; row < end; ++row) {
    const Scalar* x = p.logits + row * p.shape.logits_outer_stride;
    maxima[row] = row_max(x, p.shape.classes);
    log_sums[row] = row_sum(x, p.shape.classes, maxima[row]);
  }
  for (int64_t row = begin; row < end; row += Vec<T>::size) {
    const int64_t count = min_of(Vec<T>::size, end - row);
    store_lanes(log_sums + row, log(load_lanes(log_sums + row, count)), count);
  }
}

template <class Scalar, class T = accumulate_t<Scalar>>
T row_loss(const Problem<Scalar>& p, int64_t row, T maximum, T log_sum) {
  const int64_t classes = p.shape.classes;
  const Scalar* x = p.logits + row * p.shape.logits_outer_stride;
  if (p.probabilities != nullptr) {
    return -row_weighted_log_probability(x, p.probabilities + row * classes, p.weight, classes, p.smoothing, maximum,
                                         log_sum);
  }
  if (p.ignored(row)) return T(0);
  const int64_t y = p.shape.target[row];
  const T log_p = (load_one(x + y) - maximum) - log_sum;
  T loss = -(T(1) - p.smoothing) * p.class_weight(y) * log_p;
  if (p.smoothing != T(0)) {
    const Scalar* ones = nullptr;
    loss -= p.smoothing / static_cast<T>(classes) *
            row_weighted_log_probability(x, ones, p.weight, classes, T(0), maximum, log_sum);
  }
  return loss;
}

template <class Scalar, class T = accumulate_t<Scalar>>
void row_grad_logits(const Problem<Scalar>& p, int64_t row, T scale, T uniform, T maximum, T log_sum, Scalar* grad) {
  const int64_t classes = p.shape.classes;
  const Scalar* x = p.logits + row * p.shape.logits_outer_stride;
  const Scalar* q = p.probabilities == nullptr ? nullptr : p.probabilities + row * classes;
  const T per_class = p.smoothing / static_cast<T>(classes);
  const int64_t y = q == nullptr ? p.shape.target[row] : 0;
  const T hit = (T(1) - p.smoothing) * p.class_weight(y);
  const T mass = q == nullptr ? hit + uniform : row_target_mass(q, p.weight, classes, p.smoothing);
  const bool has_target_everywhere = q != nullptr || p.smoothing != T(0);
  for_each_vector<T>(classes, [&](int64_t c, int64_t count, int64_t) {
    const Vec<T> probability = exp((load_lanes(x + c, count) - Vec<T>(maximum)) - Vec<T>(log_sum));
    Vec<T> out = Vec<T>(mass) * probability;
    if (has_target_everywhere) {
      Vec<T> target = per_class;
      if (q != nullptr) target = fma(load_lanes(q + c, count), Vec<T>(T(1) - p.smoothing), target);
      if (p.weight != nullptr) target *= load_lanes(p.weight + c, count);
      out -= target;
    }
    store_lanes(grad + c, Vec<T>(scale) * out, count);
  });
  if (q == nullptr) {  // once more at the target, before rounding
    const T probability = exp(Vec<T>((load_one(x + y) - maximum) - log_sum))[0];
    const T target = hit + (has_target_everywhere ? per_class * p.class_weight(y) : T(0));
    store_one(grad + y, scale * (mass * probability - target));
  }
}

// dq_c = - g (1 - eps) w_c log p_c
template <class Scalar, class T = accumulate_t<Scalar>>
void row_grad_target(const Problem<Scalar>& p, int64_t row, T scale, T maximum, T log_sum, Scalar* grad) {
  const int64_t classes = p.shape.classes;
  const Scalar* x = p.logits + row * p.shape.logits_outer_stride;
  for_each_vector<T>(classes, [&](int64_t c, int64_t count, int64_t) {
    Vec<T> out =
        ((load_lanes(x + c, count) - Vec<T>(maximum)) - Vec<T>(log_sum)) * Vec<T>(-scale * (T(1) - p.smoothing));
    if (p.weight != nullptr) out *= load_lanes(p.weight + c, count);
    store_lanes(grad + c, out, count);
  });
}

// ---- classes `inner` apart: lanes are neighbouring rows ------------------------------------------------------------

// One vector of rows: `count` neighbours from inner position `i` of outer index `o`.
template <class Scalar, class T = accumulate_t<Scalar>>
struct RowVector {
  const Problem<Scalar>& p;
  int64_t o, i, count;

  int64_t row(int64_t lane) const { return o * p.shape.inner + i + lane; }
  int64_t element(int64_t c) const { return (o * p.shape.classes + c) * p.shape.inner + i; }
  int64_t logit(int64_t c) const { return o * p.shape.logits_outer_stride + c * p.shape.inner + i; }
  Vec<T> logits(int64_t c) const { return load_lanes(p.logits + logit(c), count); }
  // t_c of every lane that is not ignored; `target` holds the lanes' classes, -1 where ignored.
  Vec<T> target_share(int64_t c, const int64_t* target) const {
    const T per_class = p.smoothing / static_cast<T>(p.shape.classes);
    Vec<T> share = per_class;
    if (p.probabilities != nullptr) {
      share = fma(load_lanes(p.probabilities + element(c), count), Vec<T>(T(1) - p.smoothing), share);
    } else {
      T hits[Vec<T>::size];
      for (int64_t lane = 0; lane < Vec<T>::size; ++lane) hits[lane] = target[lane] == c ? T(1) - p.smoothing : T(0);
      share += load(hits);
    }
    return share * Vec<T>(p.class_weight(c));
  }
  void read_targets(int64_t (&target)[Vec<T>::size]) const {
    for (int64_t lane = 0; lane < Vec<T>::size; ++lane) {
      const bool counts = lane < count && p.probabilities == nullptr && !p.ignored(row(lane));
      target[lane] = counts ? p.shape.target[row(lane)] : -1;
    }
  }
};

// The sum of term(c) over the classes, in runs, so that few additions round at the size of the whole sum.
template <class T, class Term>
DLKERNELS_INLINE Vec<T> sum_of_classes(int64_t classes, Term&& term) {
  constexpr int64_t run_length = 16;
  Vec<T> sum = T(0);
  for (int64_t first = 0; first < classes; first += run_length) {
    Vec<T> run = T(0);
    for (int64_t c = first; c < min_of(classes, first + run_length); ++c) run += term(c);
    sum += run;
  }
  return sum;
}

template <class Scalar, class T = accumulate_t<Scalar>>
Vec<T> column_loss(const RowVector<Scalar>& rows, Vec<T>* maximum, Vec<T>* log_sum) {
  const Problem<Scalar>& p = rows.p;
  Vec<T> best = -kInfinity<T>;
  for (int64_t c = 0; c < p.shape.classes; ++c) best = max(best, rows.logits(c));
  *maximum = best;
  *log_sum = log(sum_of_classes<T>(p.shape.classes, [&](int64_t c) { return exp(rows.logits(c) - best); }));
  int64_t target[Vec<T>::size];
  rows.read_targets(target);
  Vec<T> loss = T(0);
  if (p.probabilities != nullptr || p.smoothing != T(0)) {
    loss = -sum_of_classes<T>(p.shape.classes, [&](int64_t c) {
      return rows.target_share(c, target) * ((rows.logits(c) - best) - *log_sum);
    });
  } else {
    T picked[Vec<T>::size] = {}, hit[Vec<T>::size] = {};
    for (int64_t lane = 0; lane < rows.count; ++lane) {
      if (target[lane] < 0) continue;
      picked[lane] = load_one(p.logits + rows.logit(target[lane]) + lane);
      hit[lane] = p.class_weight(target[lane]);
    }
    loss = -load(hit) * ((load(picked) - best) - *log_sum);
  }
  if (p.probabilities == nullptr) {
    T kept[Vec<T>::size];
    for (int64_t lane = 0; lane < Vec<T>::size; ++lane) kept[lane] = target[lane] < 0 ? T(0) : loss[lane];
    loss = load(kept);
  }
  return loss;
}

template <class Scalar, class T = accumulate_t<Scalar>>
void column_backward(const RowVector<Scalar>& rows, Vec<T> scale, T uniform, Vec<T> maximum, Vec<T> log_sum,
                     Scalar* grad_logits, Scalar* grad_target) {
  const Problem<Scalar>& p = rows.p;
  int64_t target[Vec<T>::size];
  rows.read_targets(target);
  Vec<T> mass = T(0);
  if (p.probabilities != nullptr) {
    mass = sum_of_classes<T>(p.shape.classes, [&](int64_t c) { return rows.target_share(c, target); });
  } else {
    T masses[Vec<T>::size];
    for (int64_t lane = 0; lane < Vec<T>::size; ++lane) {
      masses[lane] = target[lane] < 0 ? T(0) : (T(1) - p.smoothing) * p.class_weight(target[lane]) + uniform;
    }
    mass = load(masses);
  }
  const Mask<T> all = first_lanes<T>(Vec<T>::size);
  Mask<T> counts = all;
  if (p.probabilities == nullptr) {
    uint32_t bits = 0;
    for (int64_t lane = 0; lane < Vec<T>::size; ++lane) bits |= static_cast<uint32_t>(target[lane] >= 0) << lane;
    counts = mask_from_bits<T>(bits);
  }
  for (int64_t c = 0; c < p.shape.classes; ++c) {
    const Vec<T> log_p = (rows.logits(c) - maximum) - log_sum;
    if (grad_logits != nullptr) {
      const Vec<T> out = scale * (mass * exp(log_p) - rows.target_share(c, target));
      store_lanes(grad_logits + rows.element(c), select(counts, out, Vec<T>(T(0))), rows.count);
    }
    if (grad_target != nullptr) {
      const Vec<T> out = log_p * scale * Vec<T>(-(T(1) - p.smoothing) * p.class_weight(c));
      store_lanes(grad_target + rows.element(c), out, rows.count);
    }
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Calls body(rows) for vectors of neighbouring rows that cover rows [begin, end).
template <class Scalar, class Body>
void for_each_row_vector(const Problem<Scalar>& p, int64_t begin, int64_t end, Body&& body) {
  for (int64_t row = begin; row < end;) {
    const int64_t o = row / p.shape.inner, i = row % p.shape.inner;
    const int64_t count = min_of(min_of(Vec<accumulate_t<Scalar>>::size, p.shape.inner - i), end - row);
    body(RowVector<Scalar>{p, o, i, count});
    row += count;
  }
}

template <class Scalar>
void forward_typed(const CrossEntropyForwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const Problem<Scalar> p{args.shape};
  T* maxima = static_cast<T*>(args.statistics);
  T* log_sums = maxima + p.rows;
  const bool per_row = args.reduction == LossReduction::none;
  Scalar* loss_out = static_cast<Scalar*>(args.loss);
  const int64_t tasks = ceil_div(p.rows, p.rows_per_task);
  Scratch<double> totals(2, tasks);
  parallel_for(tasks, 1, [&](int64_t task) {
    const int64_t begin = task * p.rows_per_task, end = min_of(begin + p.rows_per_task, p.rows);
    double loss_total = 0, weight_total = 0;
    auto finish_row = [&](int64_t row, T loss) {
      if (per_row) store_one(loss_out + row, loss);
      loss_total += loss;
      if (p.probabilities != nullptr) {
        weight_total += 1;
      } else if (!p.ignored(row)) {
        weight_total += p.class_weight(p.shape.target[row]);
      }
    };
    if (p.shape.inner == 1) {
      row_statistics(p, begin, end, maxima, log_sums);
      for (int64_t row = begin; row < end; ++row) finish_row(row, row_loss(p, row, maxima[row], log_sums[row]));
    } else {
      for_each_row_vector(p, begin, end, [&](const RowVector<Scalar>& rows) {
        Vec<T> maximum, log_sum;
        const Vec<T> loss = column_loss(rows, &maximum, &log_sum);
        store_lanes(maxima + rows.row(0), maximum, rows.count);
        store_lanes(log_sums + rows.row(0), log_sum, rows.count);
        for (int64_t lane = 0; lane < rows.count; ++lane) finish_row(rows.row(lane), loss[lane]);
      });
    }
    totals[2 * task] = loss_total;
    totals[2 * task + 1] = weight_total;
  });
  double loss_total = 0, weight_total = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    loss_total += totals[2 * task];
    weight_total += totals[2 * task + 1];
  }
  *args.divisor = args.reduction == LossReduction::mean ? weight_total : 1.0;
  if (!per_row) store_one(loss_out, static_cast<T>(loss_total / *args.divisor));
}

template <class Scalar>
void backward_typed(const CrossEntropyBackwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const Problem<Scalar> p{args.shape};
  const T* maxima = static_cast<const T*>(args.statistics);
  const T* log_sums = maxima + p.rows;
  const Scalar* grad_loss = static_cast<const Scalar*>(args.grad_loss);
  Scalar* grad_logits = static_cast<Scalar*>(args.grad_logits);
  Scalar* grad_target = static_cast<Scalar*>(args.grad_target);
  const T uniform = uniform_mass(p);
  const T divisor = static_cast<T>(*args.divisor);
  auto scale_of = [&](int64_t row) { return load_one(grad_loss + row * args.grad_loss_stride) / divisor; };
  parallel_for(ceil_div(p.rows, p.rows_per_task), 1, [&](int64_t task) {
    const int64_t begin = task * p.rows_per_task, end = min_of(begin + p.rows_per_task, p.rows);
    if (p.shape.inner == 1) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * p.shape.classes;
        if (p.ignored(row)) {
          __builtin_memset(static_cast<void*>(grad_logits + first), 0, p.shape.classes * sizeof(Scalar));
          continue;
        }
        const T scale = scale_of(row);
        if (grad_logits != nullptr) {
          row_grad_logits(p, row, scale, uniform, maxima[row], log_sums[row], grad_logits + first);
        }
        if (grad_target != nullptr) {
          row_grad_target(p, row, scale, maxima[row], log_sums[row], grad_target + first);
        }
      }
    } else {
      for_each_row_vector(p, begin, end, [&](const RowVector<Scalar>& rows) {
        T scales[Vec<T>::size] = {};
        for (int64_t lane = 0; lane < rows.count; ++lane) scales[lane] = scale_of(rows.row(lane));
        column_backward(rows, load(scales), uniform, load_lanes(maxima + rows.row(0), rows.count),
                        load_lanes(log_sums + rows.row(0), rows.count), grad_logits, grad_target);
      });
    }
  });
}

void forward(const CrossEntropyForwardArgs& args) {
  dispatch(args.shape.dtype, [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

void backward(const CrossEntropyBackwardArgs& args) {
  dispatch(args.shape.dtype, [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace

CrossEntropyKernels cross_entropy_kernels() {
  return {forward, backward};
}

}  // namespace dlkernels::DLKERNELS_ISA
