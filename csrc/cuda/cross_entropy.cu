// Softmax cross-entropy.
//
//   m = max_c x_c,  s = log sum_c exp(x_c - m),  log p_c = (x_c - m) - s
//   loss = - sum_c t_c log p_c,   t_c = w_c ((1 - eps) q_c + eps / C)
//   dx_c = g (T p_c - t_c),       T = sum_c t_c
//
// q is the one-hot target or the given probabilities, w the class weights, eps the label smoothing. m and s are kept
// apart: with logits near 1e4 their sum would round away what the loss is made of.
//
// Classes side by side (inner == 1): a team of 1, 8 or 16 warps takes a row. Its threads read 16 bytes at a time from
// the first address that allows it, the elements before and after one by one, so that rows of odd length cost no more;
// each keeps a running maximum and the sum of exponentials under it, and the row is read from memory once.
// Probabilities as targets and label smoothing read it again, from the cache. Classes `inner` apart: a thread takes a
// row, and neighbouring threads read neighbouring addresses in every pass.
//
// Memory-bound: 4 bytes an element forward and 8 backward in float32.
#include "cpu/cross_entropy.h"
#include "cuda/loss.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int kThreads = 256;  // of a block that is no single team
template <int kWarps>
constexpr int kTeamThreads = kWarps == 1 ? kThreads : kWarps * kWarpSize;

// ---- typed view of the arguments -----------------------------------------------------------------------------------

template <class Scalar>
struct Problem : Targets<accumulate_t<Scalar>> {
  using T = accumulate_t<Scalar>;
  int64_t inner, rows, outer_stride;
  const Scalar* logits;
  const Scalar* probabilities;

  explicit Problem(const CrossEntropyShape& shape)
      : Targets<T>{shape.target,
                   static_cast<const T*>(shape.weight),
                   shape.classes,
                   shape.ignore_index,
                   static_cast<T>(shape.label_smoothing),
                   static_cast<T>(shape.label_smoothing) / static_cast<T>(shape.classes)},
        inner(shape.inner),
        rows(shape.outer * shape.inner),
        outer_stride(shape.logits_outer_stride),
        logits(static_cast<const Scalar*>(shape.logits)),
        probabilities(static_cast<const Scalar*>(shape.target_probabilities)) {}
};

// ---- one row of classes side by side -------------------------------------------------------------------------------

// body(c, values): elements from c of a row, widened; an array of Pack::size or of one. All threads of the team
// together see every element once.
template <class Scalar, int kWarps, class Body>
__device__ __forceinline__ void for_each_pack(const Scalar* row, int64_t classes, Body&& body) {
  using T = accumulate_t<Scalar>;
  constexpr int size = Pack<Scalar>::size;
  const int rank = Team<kWarps>::rank();
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) / sizeof(Scalar) % size);
  const int64_t head = past == 0 ? 0 : (size - past < classes ? size - past : classes);
  const int64_t packs = (classes - head) / size, tail = head + packs * size;
  if (rank < head) {
    const T value[1] = {widen(row[rank])};
    body(rank, value);
  }
  for (int64_t i = rank; i < packs; i += Team<kWarps>::size) {
    T values[size];
    load_pack(row + head + i * size, values);
    body(head + i * size, values);
  }
  if (tail + rank < classes) {
    const T value[1] = {widen(row[tail + rank])};
    body(tail + rank, value);
  }
}

template <class T>
struct Statistics {
  T maximum, log_sum;
};

// Of a row, in one reading. A thread that has seen nothing above -infinity keeps a sum of zeros, or of NaN.
template <class Scalar, int kWarps, class T = accumulate_t<Scalar>>
__device__ Statistics<T> row_statistics(const Scalar* row, int64_t classes, T* exchange) {
  T maximum = -static_cast<T>(INFINITY), sum = T(0);
  for_each_pack<Scalar, kWarps>(row, classes, [&](int64_t, const auto& values) {
    T greatest = maximum;
    for (const T value : values) greatest = Greater()(value, greatest);
    const T shift = greatest == -static_cast<T>(INFINITY) ? T(0) : greatest;
    sum *= exp(maximum - shift);
    for (const T value : values) sum += exp(value - shift);
    maximum = greatest;
  });
  const T greatest = Team<kWarps>::reduce(maximum, Greater(), exchange);
  sum *= exp(maximum - greatest);
  return {greatest, log(Team<kWarps>::reduce(sum, Add(), exchange))};
}

template <class Scalar, int kWarps, class T = accumulate_t<Scalar>>
__device__ T row_loss(const Problem<Scalar>& p, int64_t row, Statistics<T> statistics, T* exchange) {
  const Scalar* x = p.logits + row * p.outer_stride;
  if (p.ignored(row)) return T(0);
  T loss = T(0);
  if (p.probabilities != nullptr || p.smoothing != T(0)) {
    T sum = T(0);
    const Scalar* q = p.probabilities == nullptr ? nullptr : p.probabilities + row * p.classes;
    for_each_pack<Scalar, kWarps>(x, p.classes, [&](int64_t c, const auto& values) {
      for (const T value : values) {
        sum += p.share(q == nullptr ? T(0) : widen(q[c]), c) * ((value - statistics.maximum) - statistics.log_sum);
        ++c;
      }
    });
    loss = -Team<kWarps>::reduce(sum, Add(), exchange);
  }
  if (p.probabilities != nullptr) return loss;
  const int64_t y = p.target[row];
  if (!p.valid(row)) return not_a_number<T>();
  const T log_p = (widen(x[y]) - statistics.maximum) - statistics.log_sum;
  return loss - (T(1) - p.smoothing) * p.class_weight(y) * log_p;
}

template <class Scalar, int kWarps>
__global__ void __launch_bounds__(kTeamThreads<kWarps>, 1)
    row_forward(Problem<Scalar> p, accumulate_t<Scalar>* maxima, accumulate_t<Scalar>* log_sums,
                accumulate_t<Scalar>* losses) {
  using T = accumulate_t<Scalar>;
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / Team<kWarps>::size;
  if (row >= p.rows) return;  // a whole team
  T* exchange = shared_memory<T>();
  const Statistics<T> statistics = row_statistics<Scalar, kWarps>(p.logits + row * p.outer_stride, p.classes, exchange);
  const T loss = row_loss<Scalar, kWarps>(p, row, statistics, exchange);
  if (Team<kWarps>::rank() != 0) return;
  maxima[row] = statistics.maximum;
  log_sums[row] = statistics.log_sum;
  losses[row] = loss;
}

// sum_c t_c of a row.
template <class Scalar, int kWarps, class T = accumulate_t<Scalar>>
__device__ T target_mass(const Problem<Scalar>& p, int64_t row, T* exchange) {
  T sum = T(0);
  if (p.probabilities != nullptr || (p.smoothing != T(0) && p.weight != nullptr)) {
    const Scalar* q = p.probabilities == nullptr ? nullptr : p.probabilities + row * p.classes;
    for (int64_t c = Team<kWarps>::rank(); c < p.classes; c += Team<kWarps>::size) {
      sum += p.share(q == nullptr ? T(0) : widen(q[c]), c);
    }
    sum = Team<kWarps>::reduce(sum, Add(), exchange);
  } else {
    sum = p.smoothing;
  }
  return p.probabilities != nullptr ? sum : sum + (T(1) - p.smoothing) * p.class_weight(p.target[row]);
}

template <class Scalar, int kWarps>
__global__ void __launch_bounds__(kTeamThreads<kWarps>, 1)
    row_backward(Problem<Scalar> p, const accumulate_t<Scalar>* maxima, const accumulate_t<Scalar>* log_sums,
                 const Scalar* grad_loss, int64_t grad_loss_stride, const double* divisor, Scalar* grad_logits,
                 Scalar* grad_target) {
  using T = accumulate_t<Scalar>;
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / Team<kWarps>::size;
  if (row >= p.rows) return;
  const Scalar* x = p.logits + row * p.outer_stride;
  const int64_t first = row * p.classes, y = p.target == nullptr ? -1 : p.target[row];
  const bool ignored = p.ignored(row), valid = p.valid(row);
  const T scale = valid ? widen(grad_loss[row * grad_loss_stride]) / static_cast<T>(*divisor) : not_a_number<T>();
  const T mass = ignored || !valid ? T(0) : target_mass<Scalar, kWarps>(p, row, shared_memory<T>());
  const T maximum = maxima[row], log_sum = log_sums[row];
  for_each_pack<Scalar, kWarps>(x, p.classes, [&](int64_t c, const auto& values) {
    using Values = std::remove_cv_t<std::remove_reference_t<decltype(values)>>;
    constexpr int count = sizeof(Values) / sizeof(T);
    Values out;
    if (grad_logits != nullptr) {
#pragma unroll
      for (int e = 0; e < count; ++e) {
        const T q = p.probabilities != nullptr ? widen(p.probabilities[first + c + e]) : static_cast<T>(c + e == y);
        const T probability = exp((values[e] - maximum) - log_sum);
        out[e] = ignored ? T(0) : scale * (mass * probability - p.share(q, c + e));
      }
      store_pack(grad_logits + first + c, out);
    }
    if (grad_target != nullptr) {
#pragma unroll
      for (int e = 0; e < count; ++e) {
        out[e] = ((values[e] - maximum) - log_sum) * (-scale * (T(1) - p.smoothing)) * p.class_weight(c + e);
      }
      store_pack(grad_target + first + c, out);
    }
  });
}

// ---- classes `inner` apart: a thread a row -------------------------------------------------------------------------

template <class Scalar>
struct Column {
  using T = accumulate_t<Scalar>;
  const Problem<Scalar>& p;
  int64_t row, y;
  const Scalar* logits;
  int64_t first;  // of its elements in dense arrays

  __device__ Column(const Problem<Scalar>& problem, int64_t r)
      : p(problem),
        row(r),
        y(problem.target == nullptr ? -1 : problem.target[r]),
        logits(problem.logits + r / problem.inner * problem.outer_stride + r % problem.inner),
        first(r / problem.inner * problem.classes * problem.inner + r % problem.inner) {}
  __device__ T logit(int64_t c) const { return widen(logits[c * p.inner]); }
  __device__ T share(int64_t c) const {
    return p.share(p.probabilities != nullptr ? widen(p.probabilities[first + c * p.inner]) : static_cast<T>(c == y),
                   c);
  }
  __device__ bool valid() const { return p.valid(row); }
};

template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    column_forward(Problem<Scalar> p, accumulate_t<Scalar>* maxima, accumulate_t<Scalar>* log_sums,
                   accumulate_t<Scalar>* losses) {
  using T = accumulate_t<Scalar>;
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= p.rows) return;
  const Column<Scalar> column(p, row);
  T maximum = -static_cast<T>(INFINITY), sum = T(0), loss = T(0);
  for (int64_t c = 0; c < p.classes; ++c) maximum = Greater()(column.logit(c), maximum);
  for (int64_t c = 0; c < p.classes; ++c) sum += exp(column.logit(c) - maximum);
  const T log_sum = log(sum);
  if (p.probabilities != nullptr || p.smoothing != T(0)) {
    for (int64_t c = 0; c < p.classes; ++c) loss -= column.share(c) * ((column.logit(c) - maximum) - log_sum);
  } else if (column.valid() && !p.ignored(row)) {
    loss = -p.class_weight(column.y) * ((column.logit(column.y) - maximum) - log_sum);
  }
  maxima[row] = maximum;
  log_sums[row] = log_sum;
  losses[row] = p.ignored(row) ? T(0) : column.valid() ? loss : not_a_number<T>();
}

template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    column_backward(Problem<Scalar> p, const accumulate_t<Scalar>* maxima, const accumulate_t<Scalar>* log_sums,
                    const Scalar* grad_loss, int64_t grad_loss_stride, const double* divisor, Scalar* grad_logits,
                    Scalar* grad_target) {
  using T = accumulate_t<Scalar>;
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= p.rows) return;
  const Column<Scalar> column(p, row);
  const bool ignored = p.ignored(row);
  const T scale =
      column.valid() ? widen(grad_loss[row * grad_loss_stride]) / static_cast<T>(*divisor) : not_a_number<T>();
  T mass = T(0);
  if (!ignored) {
    for (int64_t c = 0; c < p.classes; ++c) mass += column.share(c);
  }
  for (int64_t c = 0; c < p.classes; ++c) {
    const T log_p = (column.logit(c) - maxima[row]) - log_sums[row];
    const int64_t at = column.first + c * p.inner;
    if (grad_logits != nullptr) {
      const T out = ignored ? T(0) : scale * (mass * exp(log_p) - column.share(c));
      grad_logits[at] = narrow<Scalar>(out);
    }
    if (grad_target != nullptr) {
      grad_target[at] = narrow<Scalar>(log_p * (-scale * (T(1) - p.smoothing)) * p.class_weight(c));
    }
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// run(std::integral_constant<int, warps>(), launch): short rows take a warp, long ones a block.
template <class T, class Run>
void with_team(int64_t rows, int64_t classes, Run&& run) {
  if (classes <= 1024) {
    run(std::integral_constant<int, 1>(), Launch{ceil_div(rows, kThreads / kWarpSize), kThreads});
  } else if (classes <= 32768) {
    run(std::integral_constant<int, 8>(), Launch{rows, 256, 8 * sizeof(T)});
  } else {
    run(std::integral_constant<int, 16>(), Launch{rows, 512, 16 * sizeof(T)});
  }
}

template <class Scalar>
void forward_typed(const CrossEntropyForwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const Problem<Scalar> p(args.shape);
  T* maxima = static_cast<T*>(args.statistics);
  T* log_sums = maxima + p.rows;
  T* losses = workspace<T>(p.rows);
  if (p.inner == 1) {
    with_team<T>(p.rows, p.classes, [&](auto warps, Launch shape) {
      launch(shape, row_forward<Scalar, warps()>, p, maxima, log_sums, losses);
    });
  } else {
    launch({ceil_div(p.rows, kThreads), kThreads}, column_forward<Scalar>, p, maxima, log_sums, losses);
  }
  reduce_losses(static_cast<const Targets<T>&>(p), losses, p.rows, args.reduction, static_cast<Scalar*>(args.loss),
                args.divisor);
}

template <class Scalar>
void backward_typed(const CrossEntropyBackwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const Problem<Scalar> p(args.shape);
  const T* maxima = static_cast<const T*>(args.statistics);
  const T* log_sums = maxima + p.rows;
  const Scalar* grad_loss = static_cast<const Scalar*>(args.grad_loss);
  Scalar* grad_logits = static_cast<Scalar*>(args.grad_logits);
  Scalar* grad_target = static_cast<Scalar*>(args.grad_target);
  if (p.inner == 1) {
    with_team<T>(p.rows, p.classes, [&](auto warps, Launch shape) {
      launch(shape, row_backward<Scalar, warps()>, p, maxima, log_sums, grad_loss, args.grad_loss_stride, args.divisor,
             grad_logits, grad_target);
    });
  } else {
    launch({ceil_div(p.rows, kThreads), kThreads}, column_backward<Scalar>, p, maxima, log_sums, grad_loss,
           args.grad_loss_stride, args.divisor, grad_logits, grad_target);
  }
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
