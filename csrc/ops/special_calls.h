// Which calls from Python are not simply tensors on their way to a kernel.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

namespace dlkernels::ops {

inline bool is_transforming() {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has_any(c10::DispatchKeySet(
             {c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchDynamicLayerBackMode})) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// is_special(*values) -> bool: torch.func transforms the call, a derivative goes forward with it, or a value is neither
// None nor exactly a Tensor or Parameter. Every call of a public function asks, so nothing is boxed.
inline PyObject* is_special(PyObject*, PyObject* const* values, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (values[i] != Py_None && !THPVariable_CheckExact(values[i])) Py_RETURN_TRUE;
  }
  return PyBool_FromLong(is_transforming());
}

}  // namespace dlkernels::ops
