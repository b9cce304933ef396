// Long short-term memory: what the kernels are given. Arrays are dense but for the input's rows; T is the element type,
// A the type that sums are carried in (float, or double for double). Rows are (step, sequence) pairs in the order of a
// packed sequence: all sequences of step 0, then those of step 1, ...; the four gates are in the order i, f, g, o.
#pragma once

#include "types.h"

namespace dlkernels {

// One layer in one direction.
struct LstmLayer {
  DType dtype;
  int64_t steps, batch, rows;                        // rows: sum of the batch sizes
  int64_t input_size, hidden_size, projection_size;  // projection_size 0: none; output_size = projection or hidden
  bool reverse;                                      // steps are taken from the last to the first
  const int64_t* batch_sizes;                        // [steps], never growing; null: every step has `batch` sequences
  const void* input;                                 // T [rows][input_size]
  int64_t input_row_stride;                          // elements between rows of the input, which may overlap
  const void* h0;                                    // T [batch][output_size]
  const void* c0;                                    // T [batch][hidden_size]
  const void* w_ih;                                  // T [4 hidden_size][input_size]
  const void* w_hh;                                  // T [4 hidden_size][output_size]
  const void* b_ih;                                  // T [4 hidden_size], or null
  const void* b_hh;                                  // T [4 hidden_size], or null
  const void* w_hr;                                  // T [projection_size][hidden_size], null without projection
};

struct LstmForwardArgs {
  LstmLayer layer;
  void* output;  // T [rows][output_size]
  void* h_n;     // T [batch][output_size], or null
  void* c_n;     // T [batch][hidden_size], or null
  void* gates;   // A [rows][4 hidden_size]: after their sigmoid or tanh
  void* cells;   // A [rows][hidden_size]
};

struct LstmBackwardArgs {
  LstmLayer layer;
  const void* grad_output;  // T [rows][output_size], or null for zero
  const void* grad_h_n;     // T [batch][output_size], or null for zero
  const void* grad_c_n;     // T [batch][hidden_size], or null for zero
  const void* output;       // T, as forward left it; read only with a projection, else it follows from gates and cells
  const void* gates;        // A, as forward left it
  const void* cells;        // A, as forward left it; null with a single step: they follow from the gates
  void* grad_input;         // T, each shaped as what it is the gradient of, or null when it is not wanted
  void* grad_h0;
  void* grad_c0;
  void* grad_w_ih;
  void* grad_w_hh;
  void* grad_bias;  // of either bias
  void* grad_w_hr;
};

struct LstmKernels {
  void (*forward)(const LstmForwardArgs&);
  void (*backward)(const LstmBackwardArgs&);
};

#if defined(DLKERNELS_ISA)
namespace DLKERNELS_ISA {
LstmKernels lstm_kernels();
}
#endif

}  // namespace dlkernels
