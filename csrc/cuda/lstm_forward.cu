// Long short-term memory (Hochreiter and Schmidhuber 1997), one layer in one direction: forward.
//
//   a_t = W_ih x_t + b_ih + W_hh h_(t-1) + b_hh       i, f, o = sigmoid(a),  g = tanh(a)
//   c_t = f c_(t-1) + i g,   h_t = o tanh(c_t)        with a projection: h_t = W_hr (o tanh(c_t))
//
// The inputs of all steps are one product, left where the gates will be. Then one kernel takes all steps: a block adds
// its part of W_hh h_(t-1), with h_(t-1) from memory that all blocks share, finishes its units, and meets the others.
#include "cuda/lstm_parts.cuh"
#include "cuda/lstm_sequence.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

template <class T>
__device__ __forceinline__ T sigmoid(T x) {
  return T(1) / (T(1) + exp(-x));
}

template <class Scalar>
struct ForwardStep {
  using T = accumulate_t<Scalar>;
  Steps steps;
  StepWeight<Scalar> w_hh, w_hr;
  StepPlan plan, projection_plan;
  int64_t H, outputs;
  bool projects;
  Scalar* hidden;  // h of the last two turns, [2][batch][hidden_stride]
  int64_t hidden_stride;
  Scalar* unprojected;  // o tanh(c), [batch][unprojected_stride]
  int64_t unprojected_stride;
  const Scalar* c0;
  Scalar *output, *h_n, *c_n;  // h_n, c_n or null
  T *gates, *cells;
  GridBarrier barrier;

  // Whether a sequence ends with a step.
  __device__ bool is_last(int64_t step, int64_t sequence) const { return sequence >= steps.running(steps.after(step)); }

  __device__ void store_hidden(int64_t turn, int64_t step, int64_t sequence, int64_t place, T value) const {
    const Scalar rounded = narrow<Scalar>(value);
    output[(steps.first_row(step) + sequence) * outputs + place] = rounded;
    hidden[((turn + 1) % 2 * steps.batch + sequence) * hidden_stride + place] = rounded;
    if (h_n != nullptr && is_last(step, sequence)) h_n[sequence * outputs + place] = rounded;
  }

  // One unit of one sequence, from the four sums of its gates.
  template <class Sum>
  __device__ void update(int64_t turn, int64_t step, int64_t sequence, int64_t unit, Sum&& sum) const {
    const int64_t row = steps.first_row(step) + sequence, before = steps.before(step);
    T* gate = gates + row * kGates * H + unit;
    const T i = sigmoid(gate[0] + sum(0)), f = sigmoid(gate[H] + sum(1));
    const T g = tanh(gate[2 * H] + sum(2)), o = sigmoid(gate[3 * H] + sum(3));
    gate[0] = i, gate[H] = f, gate[2 * H] = g, gate[3 * H] = o;
    const T c_before = sequence < steps.running(before) ? cells[(steps.first_row(before) + sequence) * H + unit]
                                                        : widen(c0[sequence * H + unit]);
    const T c = f * c_before + i * g, h = o * tanh(c);
    cells[row * H + unit] = c;
    if (c_n != nullptr && is_last(step, sequence)) c_n[sequence * H + unit] = narrow<Scalar>(c);
    if (projects) {
      unprojected[sequence * unprojected_stride + unit] = narrow<Scalar>(h);
    } else {
      store_hidden(turn, step, sequence, unit, h);
    }
  }
};

template <class Scalar>
__global__ void __launch_bounds__(kStepThreads, 1) take_steps(ForwardStep<Scalar> args) {
  const StepProduct<Scalar> product;
  constexpr int kRows = StepProduct<Scalar>::rows;
  GridBarrier barrier = args.barrier;
  const bool is_resident = args.plan.resident_slabs > 0;
  if (is_resident) product.keep(args.w_hh, args.plan.first_column_block());
  for (int64_t turn = 0; turn < args.steps.steps; ++turn) {
    const int64_t step = args.steps.step_of(turn), running = args.steps.running(step);
    const MatrixLines<Scalar, true> before = {args.hidden + turn % 2 * args.steps.batch * args.hidden_stride, running,
                                              args.outputs, args.hidden_stride};
    args.plan.for_each_tile([&](int64_t column_block, int64_t row_block) {
      if (row_block * kRows >= running) return;
      product.multiply(before, row_block * kRows, args.w_hh, column_block, is_resident);
      for (int i = static_cast<int>(threadIdx.x); i < kRows * kStepUnits; i += kStepThreads) {
        const int row = i / kStepUnits, unit_in = i % kStepUnits;
        const int64_t sequence = row_block * kRows + row, unit = column_block * kStepUnits + unit_in;
        if (sequence >= running || unit >= args.H) continue;
        args.update(turn, step, sequence, unit,
                    [&](int gate) { return product.sum(row, gate * kStepUnits + unit_in); });
      }
    });
    barrier.meet();
    if (!args.projects) continue;
    const MatrixLines<Scalar, true> unprojected = {args.unprojected, running, args.H, args.unprojected_stride};
    args.projection_plan.for_each_tile([&](int64_t column_block, int64_t row_block) {
      if (row_block * kRows >= running) return;
      product.multiply(unprojected, row_block * kRows, args.w_hr, column_block, false);
      for (int i = static_cast<int>(threadIdx.x); i < kRows * kStepColumns; i += kStepThreads) {
        const int row = i / kStepColumns, column = i % kStepColumns;
        const int64_t sequence = row_block * kRows + row, place = column_block * kStepColumns + column;
        if (sequence >= running || place >= args.outputs) continue;
        args.store_hidden(turn, step, sequence, place, product.sum(row, column));
      }
    });
    barrier.meet();
  }
}

// Both biases as one, in the type of the sums.
template <class Scalar>
__global__ void __launch_bounds__(kStepThreads, 1)
    add_biases(const Scalar* b_ih, const Scalar* b_hh, int64_t count, accumulate_t<Scalar>* sum) {
  const int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x;
  if (i < count) sum[i] = (b_ih == nullptr ? 0 : widen(b_ih[i])) + (b_hh == nullptr ? 0 : widen(b_hh[i]));
}

template <class Scalar>
void multiply_inputs(const LstmLayer& layer, accumulate_t<Scalar>* gates) {
  using T = accumulate_t<Scalar>;
  const int64_t width = kGates * layer.hidden_size, depth = layer.input_size;
  T* bias = nullptr;
  if (layer.b_ih != nullptr || layer.b_hh != nullptr) {
    bias = workspace<T>(width);
    launch({ceil_div(width, kStepThreads), kStepThreads}, add_biases<Scalar>, static_cast<const Scalar*>(layer.b_ih),
           static_cast<const Scalar*>(layer.b_hh), width, bias);
  }
  const Lines<Scalar> input(layer.input, layer.rows, depth, layer.input_row_stride);
  const Lines<Scalar> weight(layer.w_ih, width, depth, depth);
  multiply(layer.rows, width, depth, 1, MatrixLines<Scalar, true>{input.data, layer.rows, depth, input.stride},
           MatrixLines<Scalar, true>{weight.data, width, depth, weight.stride}, StoreRows<T>{gates, width, bias});
}

// h0 as the step before any turn.
template <class Scalar>
__global__ void __launch_bounds__(kStepThreads, 1)
    begin_hidden(const Scalar* h0, int64_t batch, int64_t outputs, int64_t stride, Scalar* hidden) {
  const int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x, sequence = i / outputs, place = i % outputs;
  if (sequence >= batch) return;
  hidden[sequence * stride + place] = hidden[(batch + sequence) * stride + place] = h0[i];
}

template <class Scalar>
void forward_typed(const LstmForwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const LstmLayer& layer = args.layer;
  multiply_inputs<Scalar>(layer, static_cast<T*>(args.gates));
  ForwardStep<Scalar> step = {};
  step.steps = Steps::of(layer);
  step.H = layer.hidden_size;
  step.projects = layer.projection_size > 0;
  step.outputs = step.projects ? layer.projection_size : step.H;
  const Lines<Scalar> w_hh(layer.w_hh, kGates * step.H, step.outputs, step.outputs);
  step.w_hh = {w_hh.data, step.H, step.outputs, w_hh.stride, true};
  step.hidden_stride = whole_chunks<Scalar>(step.outputs);
  step.hidden = workspace<Scalar>(2, layer.batch, step.hidden_stride);
  launch({ceil_div(layer.batch * step.outputs, kStepThreads), kStepThreads}, begin_hidden<Scalar>,
         static_cast<const Scalar*>(layer.h0), layer.batch, step.outputs, step.hidden_stride, step.hidden);
  const int64_t resident = StepProduct<Scalar>::resident_slabs(step.w_hh.slabs());
  const int64_t shared_bytes = StepProduct<Scalar>::shared_bytes(resident);
  step.plan =
      StepPlan::of(step.w_hh, layer.batch, blocks_at_once(take_steps<Scalar>, kStepThreads, shared_bytes), resident);
  if (step.projects) {
    const Lines<Scalar> w_hr(layer.w_hr, step.outputs, step.H, step.H);
    step.w_hr = {w_hr.data, step.outputs, step.H, w_hr.stride, false};
    step.projection_plan = with_grid(step.w_hr, step.plan);
    step.unprojected_stride = whole_chunks<Scalar>(step.H);
    step.unprojected = workspace<Scalar>(layer.batch, step.unprojected_stride);
  }
  step.c0 = static_cast<const Scalar*>(layer.c0);
  step.output = static_cast<Scalar*>(args.output);
  step.h_n = static_cast<Scalar*>(args.h_n);
  step.c_n = static_cast<Scalar*>(args.c_n);
  step.gates = static_cast<T*>(args.gates);
  step.cells = static_cast<T*>(args.cells);
  step.barrier = GridBarrier::create();
  launch({step.plan.grid, kStepThreads, shared_bytes, true}, take_steps<Scalar>, step);
}

}  // namespace

void lstm_forward(const LstmForwardArgs& args) {
  dispatch(args.layer.dtype, [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace dlkernels::DLKERNELS_ISA
