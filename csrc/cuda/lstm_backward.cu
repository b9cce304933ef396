// Long short-term memory, one layer in one direction: backward. Notation as in lstm_forward.cu; dy_t is the gradient of
// the output, da_t that of the gates before their nonlinearity.
//
//   dh_t = dy_t + W_hh^T da_(t+1)                     with a projection: dm_t = W_hr^T dh_t, otherwise dm_t = dh_t
//   dc_t = f_(t+1) dc_(t+1) + dm_t o (1 - tanh^2 c_t)
//   da_t = (dc_t g i (1 - i),  dc_t c_(t-1) f (1 - f),  dc_t i (1 - g^2),  dm_t tanh(c_t) o (1 - o))
//
// One kernel takes all steps, from the last: a block multiplies its columns of da_(t+1) W_hh, finishes their units at
// once, and meets the others. The gradients of weights, biases and input are products over all rows after it. da and dh
// are rounded to the type of the layer before they are multiplied.
#include "cuda/column_sums.cuh"
#include "cuda/lstm_parts.cuh"
#include "cuda/lstm_sequence.cuh"

namespace dlkernels::DLKERNELS_ISA {
namespace {

template <class Scalar>
struct BackwardStep {
  using T = accumulate_t<Scalar>;
  Steps steps;
  StepWeight<Scalar> w_hh, w_hr;  // transposed: columns are those of h, and of the units
  StepPlan plan, projection_plan;
  int64_t H, outputs;
  bool projects;
  const Scalar *grad_output, *grad_h_n, *grad_c_n, *c0;  // the gradients or null
  const T *gates, *cells;                                // cells or null
  Scalar* grad_gates;                                    // da, [rows][gates_stride]
  int64_t gates_stride;
  Scalar* first_grad_gates;  // da of every sequence's first step, [batch][gates_stride]
  Scalar* grad_hidden;       // dh with a projection, [rows][hidden_stride]
  int64_t hidden_stride;
  T* carry;  // f dc of the step after, [batch][H]
  Scalar* grad_c0;
  GridBarrier barrier;

  __device__ T cell(int64_t row, int64_t sequence, int64_t unit) const {
    if (cells != nullptr) return cells[row * H + unit];
    const T* gate = gates + row * kGates * H + unit;
    return gate[H] * widen(c0[sequence * H + unit]) + gate[0] * gate[2 * H];
  }

  // dh but for the product.
  __device__ T given_gradient(int64_t step, int64_t sequence, int64_t place) const {
    const int64_t at = (steps.first_row(step) + sequence) * outputs + place;
    const T given = grad_output == nullptr ? T(0) : widen(grad_output[at]);
    const bool ends = sequence >= steps.running(steps.after(step));
    return ends && grad_h_n != nullptr ? given + widen(grad_h_n[sequence * outputs + place]) : given;
  }

  // One unit of one sequence, from dm.
  __device__ void update(int64_t step, int64_t sequence, int64_t unit, T grad_h) const {
    const int64_t row = steps.first_row(step) + sequence, before = steps.before(step);
    const bool begins = sequence >= steps.running(before), ends = sequence >= steps.running(steps.after(step));
    const T* gate = gates + row * kGates * H + unit;
    const T i = gate[0], f = gate[H], g = gate[2 * H], o = gate[3 * H];
    const T c = cell(row, sequence, unit), tanh_c = tanh(c),
            at_end = grad_c_n == nullptr ? T(0) : widen(grad_c_n[sequence * H + unit]);
    const T c_before = begins ? widen(c0[sequence * H + unit]) : cells[(steps.first_row(before) + sequence) * H + unit];
    const T grad_c = (ends ? at_end : carry[sequence * H + unit]) + grad_h * o * (T(1) - tanh_c * tanh_c);
    const T grads[kGates] = {grad_c * g * i * (T(1) - i), grad_c * c_before * f * (T(1) - f),
                             grad_c * i * (T(1) - g * g), grad_h * tanh_c * o * (T(1) - o)};
    carry[sequence * H + unit] = grad_c * f;
#pragma unroll
    for (int k = 0; k < kGates; ++k) {
      const Scalar rounded = narrow<Scalar>(grads[k]);
      grad_gates[row * gates_stride + k * H + unit] = rounded;
      if (begins && first_grad_gates != nullptr) first_grad_gates[sequence * gates_stride + k * H + unit] = rounded;
    }
    if (begins && grad_c0 != nullptr) grad_c0[sequence * H + unit] = narrow<Scalar>(grad_c * f);
  }
};

template <class Scalar>
__global__ void __launch_bounds__(kStepThreads, 1) take_steps_back(BackwardStep<Scalar> args) {
  using T = accumulate_t<Scalar>;
  const StepProduct<Scalar> product;
  constexpr int kRows = StepProduct<Scalar>::rows;
  GridBarrier barrier = args.barrier;
  const bool is_resident = args.plan.resident_slabs > 0;
  if (is_resident) product.keep(args.w_hh, args.plan.first_column_block());
  for (int64_t turn = args.steps.steps - 1; turn >= 0; --turn) {
    const int64_t step = args.steps.step_of(turn), running = args.steps.running(step), after = args.steps.after(step);
    // Sequences that go on: the others have nothing to multiply.
    const int64_t going_on = args.steps.running(after) < running ? args.steps.running(after) : running;
    const MatrixLines<Scalar, true> later = {
        args.grad_gates + (going_on > 0 ? args.steps.first_row(after) * args.gates_stride : 0), going_on,
        kGates * args.H, args.gates_stride};
    args.plan.for_each_tile([&](int64_t column_block, int64_t row_block) {
      if (row_block * kRows >= running) return;
      if (row_block * kRows < going_on) {
        product.multiply(later, row_block * kRows, args.w_hh, column_block, is_resident);
      }
      for (int i = static_cast<int>(threadIdx.x); i < kRows * kStepColumns; i += kStepThreads) {
        const int row = i / kStepColumns, column = i % kStepColumns;
        const int64_t sequence = row_block * kRows + row, place = column_block * kStepColumns + column;
        if (sequence >= running || place >= args.outputs) continue;
        T grad_h = args.given_gradient(step, sequence, place);
        if (sequence < going_on) grad_h += product.sum(row, column);  // not 0 times what may be infinite
        if (args.projects) {
          args.grad_hidden[(args.steps.first_row(step) + sequence) * args.hidden_stride + place] =
              narrow<Scalar>(grad_h);
        } else {
          args.update(step, sequence, place, grad_h);
        }
      }
    });
    barrier.meet();
    if (!args.projects) continue;
    const MatrixLines<Scalar, true> grad_hidden = {args.grad_hidden + args.steps.first_row(step) * args.hidden_stride,
                                                   running, args.outputs, args.hidden_stride};
    args.projection_plan.for_each_tile([&](int64_t column_block, int64_t row_block) {
      if (row_block * kRows >= running) return;
      product.multiply(grad_hidden, row_block * kRows, args.w_hr, column_block, false);
      for (int i = static_cast<int>(threadIdx.x); i < kRows * kStepColumns; i += kStepThreads) {
        const int row = i / kStepColumns, column = i % kStepColumns;
        const int64_t sequence = row_block * kRows + row, unit = column_block * kStepColumns + column;
        if (sequence < running && unit < args.H) args.update(step, sequence, unit, product.sum(row, column));
      }
    });
    barrier.meet();
  }
}

// o tanh(c) of a row's unit.
template <class Scalar, class T = accumulate_t<Scalar>>
__device__ __forceinline__ Scalar unprojected_of(const T* gates, const T* cells, int64_t H, int64_t row, int64_t unit) {
  return narrow<Scalar>(gates[(row * kGates + 3) * H + unit] * tanh(cells[row * H + unit]));
}

// h before every row: of the step before, or h0. Without a projection (`output` is null then) it is computed again: the
// output is the caller's, who may have changed it.
template <class Scalar>
__global__ void __launch_bounds__(kStepThreads, 1)
    gather_hidden(Steps steps, int64_t rows, int64_t outputs, const Scalar* output, const accumulate_t<Scalar>* gates,
                  const accumulate_t<Scalar>* cells, const Scalar* h0, int64_t stride, Scalar* before) {
  const int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x, row = i / outputs, place = i % outputs;
  if (row >= rows) return;
  const int64_t step = steps.step_of_row(row), sequence = row - steps.first_row(step), earlier = steps.before(step);
  Scalar& hidden = before[row * stride + place];
  if (sequence >= steps.running(earlier)) {
    hidden = h0[sequence * outputs + place];
    return;
  }
  const int64_t row_before = steps.first_row(earlier) + sequence;
  hidden = output != nullptr ? output[row_before * outputs + place]
                             : unprojected_of<Scalar>(gates, cells, outputs, row_before, place);
}

// o tanh(c) of every row.
template <class Scalar>
__global__ void __launch_bounds__(kStepThreads, 1)
    compute_unprojected(int64_t rows, int64_t H, const accumulate_t<Scalar>* gates, const accumulate_t<Scalar>* cells,
                        int64_t stride, Scalar* unprojected) {
  const int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x, row = i / H, unit = i % H;
  if (row < rows) unprojected[row * stride + unit] = unprojected_of<Scalar>(gates, cells, H, row, unit);
}

// left^T right over all rows of the layer.
template <class Scalar>
void multiply_rows(int64_t rows, const Lines<Scalar>& left, int64_t left_columns, const Lines<Scalar>& right,
                   int64_t right_columns, void* product) {
  multiply(left_columns, right_columns, rows, 1, MatrixLines<Scalar, false>{left.data, rows, left_columns, left.stride},
           MatrixLines<Scalar, false>{right.data, rows, right_columns, right.stride},
           StoreRows<Scalar>{static_cast<Scalar*>(product), right_columns});
}

// left weight, for rows of gates.
template <class Scalar>
void multiply_gates(int64_t rows, const Lines<Scalar>& left, int64_t depth, const void* weight, int64_t columns,
                    void* product) {
  const Lines<Scalar> lines(weight, depth, columns, columns);
  multiply(rows, columns, depth, 1, MatrixLines<Scalar, true>{left.data, rows, depth, left.stride},
           MatrixLines<Scalar, false>{lines.data, depth, columns, lines.stride},
           StoreRows<Scalar>{static_cast<Scalar*>(product), columns});
}

template <class Scalar>
BackwardStep<Scalar> prepare_steps(const LstmBackwardArgs& args) {
  using T = accumulate_t<Scalar>;
  const LstmLayer& layer = args.layer;
  BackwardStep<Scalar> step = {};
  step.steps = Steps::of(layer);
  step.H = layer.hidden_size;
  step.projects = layer.projection_size > 0;
  step.outputs = step.projects ? layer.projection_size : step.H;
  step.grad_output = static_cast<const Scalar*>(args.grad_output);
  step.grad_h_n = static_cast<const Scalar*>(args.grad_h_n);
  step.grad_c_n = static_cast<const Scalar*>(args.grad_c_n);
  step.c0 = static_cast<const Scalar*>(layer.c0);
  step.gates = static_cast<const T*>(args.gates);
  step.cells = static_cast<const T*>(args.cells);
  step.gates_stride = whole_chunks<Scalar>(kGates * step.H);
  step.grad_gates = workspace<Scalar>(layer.rows, step.gates_stride);
  if (args.grad_h0 != nullptr) step.first_grad_gates = workspace<Scalar>(layer.batch, step.gates_stride);
  step.carry = workspace<T>(layer.batch, step.H);
  step.grad_c0 = static_cast<Scalar*>(args.grad_c0);
  const Lines<Scalar> w_hh(layer.w_hh, step.outputs, kGates * step.H, 1, step.outputs);
  step.w_hh = {w_hh.data, step.outputs, kGates * step.H, w_hh.stride, false};
  if (step.projects) {
    const Lines<Scalar> w_hr(layer.w_hr, step.H, step.outputs, 1, step.H);
    step.w_hr = {w_hr.data, step.H, step.outputs, w_hr.stride, false};
    step.hidden_stride = whole_chunks<Scalar>(step.outputs);
    step.grad_hidden = workspace<Scalar>(layer.rows, step.hidden_stride);
  }
  return step;
}

template <class Scalar>
void backward_typed(const LstmBackwardArgs& args) {
  const LstmLayer& layer = args.layer;
  BackwardStep<Scalar> step = prepare_steps<Scalar>(args);
  const int64_t resident = StepProduct<Scalar>::resident_slabs(step.w_hh.slabs());
  const int64_t shared_bytes = StepProduct<Scalar>::shared_bytes(resident);
  step.plan = StepPlan::of(step.w_hh, layer.batch, blocks_at_once(take_steps_back<Scalar>, kStepThreads, shared_bytes),
                           resident);
  if (step.projects) step.projection_plan = with_grid(step.w_hr, step.plan);
  step.barrier = GridBarrier::create();
  launch({step.plan.grid, kStepThreads, shared_bytes, true}, take_steps_back<Scalar>, step);

  const int64_t width = kGates * step.H, rows = layer.rows;
  const Lines<Scalar> grad_gates(step.grad_gates, rows, width, step.gates_stride);
  if (args.grad_input != nullptr) {
    multiply_gates(rows, grad_gates, width, layer.w_ih, layer.input_size, args.grad_input);
  }
  if (args.grad_h0 != nullptr) {
    multiply_gates(layer.batch, Lines<Scalar>(step.first_grad_gates, layer.batch, width, step.gates_stride), width,
                   layer.w_hh, step.outputs, args.grad_h0);
  }
  if (args.grad_w_ih != nullptr) {
    const Lines<Scalar> input(layer.input, rows, layer.input_size, layer.input_row_stride);
    multiply_rows(rows, grad_gates, width, input, layer.input_size, args.grad_w_ih);
  }
  if (args.grad_w_hh != nullptr) {
    const int64_t stride = whole_chunks<Scalar>(step.outputs);
    Scalar* before = workspace<Scalar>(rows, stride);
    launch({ceil_div(rows * step.outputs, kStepThreads), kStepThreads}, gather_hidden<Scalar>, step.steps, rows,
           step.outputs, step.projects ? static_cast<const Scalar*>(args.output) : nullptr, step.gates, step.cells,
           static_cast<const Scalar*>(layer.h0), stride, before);
    multiply_rows(rows, grad_gates, width, Lines<Scalar>(before, rows, step.outputs, stride), step.outputs,
                  args.grad_w_hh);
  }
  if (args.grad_bias != nullptr) {
    sum_columns(Columns<Scalar>{step.grad_gates, rows, width, step.gates_stride, 1, Divider(rows > 0 ? rows : 1)},
                StoreSums<Scalar>{static_cast<Scalar*>(args.grad_bias)});
  }
  if (args.grad_w_hr != nullptr) {
    const int64_t stride = whole_chunks<Scalar>(step.H);
    Scalar* unprojected = workspace<Scalar>(rows, stride);
    launch({ceil_div(rows * step.H, kStepThreads), kStepThreads}, compute_unprojected<Scalar>, rows, step.H, step.gates,
           step.cells, stride, unprojected);
    multiply_rows(rows, Lines<Scalar>(step.grad_hidden, rows, step.outputs, step.hidden_stride), step.outputs,
                  Lines<Scalar>(unprojected, rows, step.H, stride), step.H, args.grad_w_hr);
  }
}

}  // namespace

void lstm_backward(const LstmBackwardArgs& args) {
  dispatch(args.layer.dtype, [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace dlkernels::DLKERNELS_ISA
