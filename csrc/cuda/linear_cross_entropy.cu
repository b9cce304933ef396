// Softmax cross-entropy of the logits x = W h + b, without ever holding the logits (the formulas of
// cpu/linear_cross_entropy.cc).
//
// The logits of a chunk of classes and all rows are one product; what a row has to know of its softmax is joined from
// chunk to chunk (Milakov and Gimelshein 2018). Backward computes a chunk again, turns it into the gradient g of the
// logits, and multiplies twice: g^T h is the chunk's part of dW, g W is added to dh, which is kept in the type of the
// sums. A block of threads, or a warp of few classes, takes a row of a chunk. g is rounded to the type of the layer
// before it is multiplied.
#include "cpu/linear_cross_entropy.h"
#include "cuda/column_sums.cuh"
#include "cuda/lay_out.cuh"
#include "cuda/loss.cuh"
#include "cuda/multiply.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int64_t kFewestClasses = 256;  // of a chunk

// ---- typed view of the arguments -----------------------------------------------------------------------------------

// Numbers of any type that is widened to T.
template <class T>
__device__ __forceinline__ T load_as(const void* data, DType dtype, int64_t index) {
  if constexpr (std::is_same_v<T, double>) {
    return static_cast<const double*>(data)[index];
  } else {
    if (dtype == DType::bfloat16) return widen(static_cast<const bfloat16*>(data)[index]);
    if (dtype == DType::float16) return widen(static_cast<const float16*>(data)[index]);
    return static_cast<const float*>(data)[index];
  }
}
template <class T>
__device__ __forceinline__ void store_as(void* data, DType dtype, int64_t index, T value) {
  if constexpr (std::is_same_v<T, double>) {
    static_cast<double*>(data)[index] = value;
  } else {
    if (dtype == DType::bfloat16) {
      static_cast<bfloat16*>(data)[index] = narrow<bfloat16>(value);
    } else if (dtype == DType::float16) {
      static_cast<float16*>(data)[index] = narrow<float16>(value);
    } else {
      static_cast<float*>(data)[index] = value;
    }
  }
}

template <class T>
struct Problem : Targets<T> {
  const void* probabilities;  // [rows][classes], or null
  DType probabilities_type;
  int64_t rows;

  explicit Problem(const LinearCrossEntropyShape& shape)
      : Targets<T>{shape.target,
                   static_cast<const T*>(shape.weight),
                   shape.classes,
                   shape.ignore_index,
                   static_cast<T>(shape.label_smoothing),
                   static_cast<T>(shape.label_smoothing) / static_cast<T>(shape.classes > 0 ? shape.classes : 1)},
        probabilities(shape.target_probabilities),
        probabilities_type(shape.target_dtype),
        rows(shape.rows) {}

  __device__ bool has_shares() const { return probabilities != nullptr || this->smoothing != T(0); }
  // t_c but for the one-hot part.
  __device__ __forceinline__ T share_of(int64_t row, int64_t c) const {
    return this->share(
        probabilities == nullptr ? T(0) : load_as<T>(probabilities, probabilities_type, row * this->classes + c), c);
  }
  // The one-hot part of the target's own class.
  __device__ T hit(int64_t row) const { return (T(1) - this->smoothing) * this->class_weight(this->target[row]); }
};

// Logits [rows][count] of the classes from `first`, in rows of `pitch` numbers.
template <class T>
struct ClassChunk {
  T* logits;
  int64_t first, count, pitch;
};

// ---- the softmax of a row, from chunk to chunk ---------------------------------------------------------------------

// What is known of a row: with r the maximum, or 0 while that is -inf, the sums of exp(x - r), of t (x - r) and of t.
template <class T>
struct RowState {
  T maximum, sum, share_sum, mass, target_logit;
};

template <class T>
__device__ __forceinline__ T reference_of(T maximum) {
  return maximum == -static_cast<T>(INFINITY) ? T(0) : maximum;
}

template <class T>
__device__ RowState<T> join(const RowState<T>& a, const RowState<T>& b, T target_logit) {
  const T joint = Greater()(a.maximum, b.maximum), reference = reference_of(joint);
  // From a reference of 0 that stands for -inf nothing has to be shifted: all sums are 0 or infinite.
  const T shift_a = a.maximum == -static_cast<T>(INFINITY) ? T(0) : a.maximum - reference;
  const T shift_b = b.maximum == -static_cast<T>(INFINITY) ? T(0) : b.maximum - reference;
  return {joint, a.sum * exp(shift_a) + b.sum * exp(shift_b),
          (a.mass * shift_a + a.share_sum) + (b.mass * shift_b + b.share_sum), a.mass + b.mass, target_logit};
}

template <class T, int kTeamWarps>
__global__ void __launch_bounds__(kThreads, 1) join_chunk(Problem<T> p, ClassChunk<T> chunk, RowState<T>* states) {
  using Row = Team<kTeamWarps>;
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / Row::size;
  if (row >= p.rows) return;
  const T* x = chunk.logits + row * chunk.pitch;
  T* exchange = shared_memory<T>();
  RowState<T> mine = {-static_cast<T>(INFINITY), T(0), T(0), T(0), T(0)};
  for (int64_t c = Row::rank(); c < chunk.count; c += Row::size) mine.maximum = Greater()(x[c], mine.maximum);
  mine.maximum = Row::reduce(mine.maximum, Greater(), exchange);
  const T reference = reference_of(mine.maximum);
  for (int64_t c = Row::rank(); c < chunk.count; c += Row::size) {
    const T shifted = x[c] - reference;
    mine.sum += exp(shifted);
    if (!p.has_shares()) continue;
    const T share = p.share_of(row, chunk.first + c);
    mine.share_sum += share * shifted;
    mine.mass += share;
  }
  mine.sum = Row::reduce(mine.sum, Add(), exchange);
  mine.share_sum = Row::reduce(mine.share_sum, Add(), exchange);
  mine.mass = Row::reduce(mine.mass, Add(), exchange);
  if (Row::rank() != 0) return;
  const int64_t hit = p.has_probabilities() ? -1 : p.target[row] - chunk.first;
  mine.target_logit = hit >= 0 && hit < chunk.count ? x[hit] : T(0);
  if (chunk.first == 0) {
    states[row] = mine;
  } else {
    states[row] = join(states[row], mine, states[row].target_logit + mine.target_logit);
  }
}

// Losses and statistics of all rows; no classes, no states.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    finish_rows(Problem<T> p, const RowState<T>* states, T* losses, T* statistics) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= p.rows) return;
  RowState<T> state = {-static_cast<T>(INFINITY), T(0), T(0), T(0), T(0)};
  if (p.classes > 0) state = states[row];
  const T log_sum = log(state.sum);
  T loss = T(0);
  if (p.has_probabilities()) {
    // An infinite share of any log p < 0; the sums have lost the sign of the class that is the maximum.
    const bool infinite = isinf(state.mass) && isfinite(state.maximum) && isfinite(log_sum);
    loss = infinite ? state.mass : state.mass * log_sum - state.share_sum;
  } else if (p.ignored(row)) {
    state.mass = T(0);
  } else if (!p.valid(row)) {
    loss = state.mass = not_a_number<T>();
  } else {
    loss = -p.hit(row) * ((state.target_logit - state.maximum) - log_sum);
    if (p.smoothing != T(0)) loss += state.mass * log_sum - state.share_sum;
    state.mass += p.hit(row);
  }
  losses[row] = loss;
  statistics[row] = state.maximum;
  statistics[p.rows + row] = log_sum;
  statistics[2 * p.rows + row] = state.mass;
}

// ---- the gradient of the logits ------------------------------------------------------------------------------------

template <class Scalar>
struct GradientArgs {
  using T = accumulate_t<Scalar>;
  const T* statistics;
  const T* grad_loss;
  int64_t grad_loss_stride;
  const double* divisor;
  Scalar* rounded;    // g, shaped as the chunk
  bool in_place;      // g replaces the logits
  void* grad_target;  // or null
};

template <class Scalar, int kTeamWarps>
__global__ void __launch_bounds__(kThreads, 1)
    differentiate_chunk(Problem<accumulate_t<Scalar>> p, ClassChunk<accumulate_t<Scalar>> chunk,
                        GradientArgs<Scalar> args) {
  using T = accumulate_t<Scalar>;
  using Row = Team<kTeamWarps>;
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / Row::size;
  if (row >= p.rows) return;
  const T maximum = args.statistics[row], log_sum = args.statistics[p.rows + row];
  const T mass = args.statistics[2 * p.rows + row];
  const bool counts = !p.ignored(row);  // a row that does not: mass 0, and 0 / 0 where all rows are ignored
  const T scale = counts ? args.grad_loss[row * args.grad_loss_stride] / static_cast<T>(*args.divisor) : T(0);
  const int64_t hit = p.has_probabilities() || !counts ? -1 : p.target[row];
  for (int64_t i = Row::rank(); i < chunk.count; i += Row::size) {
    const int64_t c = chunk.first + i, at = row * chunk.pitch + i;
    const T log_p = (chunk.logits[at] - maximum) - log_sum;
    T target = p.has_shares() && counts ? p.share_of(row, c) : T(0);
    if (c == hit) target += p.hit(row);
    const T g = scale * (mass * exp(log_p) - target);
    if (args.in_place) chunk.logits[at] = g;
    if constexpr (!std::is_same_v<Scalar, T>) args.rounded[at] = narrow<Scalar>(g);
    if (args.grad_target != nullptr) {
      store_as(args.grad_target, p.probabilities_type, row * p.classes + c,
               log_p * scale * (-(T(1) - p.smoothing) * p.class_weight(c)));
    }
  }
}

// ---- sinks of the products -----------------------------------------------------------------------------------------

template <class T>
struct AddRows {
  T* out;
  int64_t columns;
  bool first;  // of what is added

  __device__ __forceinline__ void operator()(int64_t, int64_t row, int64_t c, const T (&values)[2], int count) const {
    T* at = out + row * columns + c;
    T results[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) results[i] = first || i >= count ? values[i] : values[i] + at[i];
    store_pair(at, results, count);
  }
};

template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    round_all(const accumulate_t<Scalar>* values, int64_t count, Scalar* out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) out[i] = narrow<Scalar>(values[i]);
}

template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1) fill_zero(int64_t count, Scalar* out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) out[i] = Scalar{};
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// run(std::integral_constant<int, warps>(), launch): a row of a chunk takes a warp, or a block.
template <class T, class Run>
void with_team(int64_t rows, int64_t classes, Run&& run) {
  if (classes <= 1024) {
    run(std::integral_constant<int, 1>(), Launch{ceil_div(rows, kWarps), kThreads});
  } else {
    run(std::integral_constant<int, kWarps>(), Launch{rows, kThreads, kWarps * sizeof(T)});
  }
}

// The operands as products read them, and the chunks of classes.
template <class Scalar>
struct Layer {
  using T = accumulate_t<Scalar>;
  int64_t rows, features, classes;
  Lines<Scalar> input, weight;
  const Scalar* bias;
  int64_t chunk_classes;
  T* logits;

  explicit Layer(const LinearCrossEntropyShape& shape)
      : rows(shape.rows),
        features(shape.features),
        classes(shape.classes),
        input(shape.input, rows, features, shape.input_row_stride),
        weight(shape.linear_weight, classes, features, shape.linear_weight_row_stride),
        bias(static_cast<const Scalar*>(shape.linear_bias)) {
    const int64_t most = kHeldElements / (rows > 0 ? rows : 1) / kFewestClasses * kFewestClasses;
    chunk_classes = most < kFewestClasses ? kFewestClasses : most;
    if (chunk_classes > classes) chunk_classes = classes;
    logits = workspace<T>(rows, pitch());
  }
  int64_t pitch() const { return whole_chunks<Scalar>(chunk_classes); }

  // body(chunk), once its logits are there.
  template <class Body>
  void for_each_chunk(Body&& body) const {
    for (int64_t first = 0; first < classes; first += chunk_classes) {
      const int64_t count = first + chunk_classes < classes ? chunk_classes : classes - first;
      const ClassChunk<T> chunk = {logits, first, count, pitch()};
      multiply(rows, count, features, 1, MatrixLines<Scalar, true>{input.data, rows, features, input.stride},
               MatrixLines<Scalar, true>{weight.data + first * weight.stride, count, features, weight.stride},
               StoreRows<T, Scalar>{logits, pitch(), bias == nullptr ? nullptr : bias + first});
      body(chunk);
    }
  }
};

template <class Scalar>
void forward_typed(const LinearCrossEntropyForwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const Layer<Scalar> layer(args.shape);
  const Problem<T> p(args.shape);
  RowState<T>* states = workspace<RowState<T>>(p.rows);
  layer.for_each_chunk([&](const ClassChunk<T>& chunk) {
    with_team<T>(p.rows, chunk.count,
                 [&](auto warps, Launch shape) { launch(shape, join_chunk<T, warps()>, p, chunk, states); });
  });
  T* losses = workspace<T>(p.rows);
  launch({ceil_div(p.rows, kThreads), kThreads}, finish_rows<T>, p, states, losses, static_cast<T*>(args.statistics));
  reduce_losses(static_cast<const Targets<T>&>(p), losses, p.rows, args.reduction, static_cast<T*>(args.loss),
                args.divisor);
}

template <class Scalar>
void backward_typed(const LinearCrossEntropyBackwardArgs& args) {
  using T = accumulate_t<Scalar>;
  constexpr bool kRounds = !std::is_same_v<Scalar, T>;
  const Layer<Scalar> layer(args.shape);
  const Problem<T> p(args.shape);
  const int64_t features = layer.features, elements = p.rows * features;
  Scalar* rounded = nullptr;
  if constexpr (kRounds) {
    rounded = workspace<Scalar>(p.rows, layer.pitch());
  } else {
    rounded = layer.logits;
  }
  T* grad_input = static_cast<T*>(kRounds ? nullptr : args.grad_input);
  if (kRounds && args.grad_input != nullptr) grad_input = workspace<T>(elements);
  const GradientArgs<Scalar> gradient = {static_cast<const T*>(args.statistics),
                                         static_cast<const T*>(args.grad_loss),
                                         args.grad_loss_stride,
                                         args.divisor,
                                         rounded,
                                         !kRounds || args.grad_linear_bias != nullptr,
                                         args.grad_target};
  layer.for_each_chunk([&](const ClassChunk<T>& chunk) {
    with_team<T>(p.rows, chunk.count, [&](auto warps, Launch shape) {
      launch(shape, differentiate_chunk<Scalar, warps()>, p, chunk, gradient);
    });
    if (args.grad_linear_bias != nullptr) {
      Scalar* out = static_cast<Scalar*>(args.grad_linear_bias) + chunk.first;
      sum_columns(Columns<T>{chunk.logits, p.rows, chunk.count, chunk.pitch, 1, Divider(p.rows > 0 ? p.rows : 1)},
                  StoreSums<Scalar>{out});
    }
    if (args.grad_linear_weight != nullptr) {
      multiply(chunk.count, features, p.rows, 1, MatrixLines<Scalar, false>{rounded, p.rows, chunk.count, chunk.pitch},
               MatrixLines<Scalar, false>{layer.input.data, p.rows, features, layer.input.stride},
               StoreRows<Scalar>{static_cast<Scalar*>(args.grad_linear_weight) + chunk.first * features, features});
    }
    if (args.grad_input != nullptr) {
      multiply(p.rows, features, chunk.count, 1, MatrixLines<Scalar, true>{rounded, p.rows, chunk.count, chunk.pitch},
               MatrixLines<Scalar, false>{layer.weight.data + chunk.first * layer.weight.stride, chunk.count, features,
                                          layer.weight.stride},
               AddRows<T>{grad_input, features, chunk.first == 0});
    }
  });
  if (args.grad_input == nullptr) return;
  if (layer.classes == 0) {
    launch({ceil_div(elements, kThreads), kThreads}, fill_zero<Scalar>, elements,
           static_cast<Scalar*>(args.grad_input));
  } else if constexpr (kRounds) {
    launch({ceil_div(elements, kThreads), kThreads}, round_all<Scalar>, grad_input, elements,
           static_cast<Scalar*>(args.grad_input));
  }
}

void forward(const LinearCrossEntropyForwardArgs& args) {
  dispatch(args.shape.dtype, [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

void backward(const LinearCrossEntropyBackwardArgs& args) {
  dispatch(args.shape.dtype, [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace

LinearCrossEntropyKernels linear_cross_entropy_kernels() {
  return {forward, backward};
}

}  // namespace dlkernels::DLKERNELS_ISA
