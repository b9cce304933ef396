// The door to Python: the operators' schemas, and one function each that calls its operator's typed handle.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "ops/cross_entropy.h"
#include "ops/linear_cross_entropy.h"
#include "ops/runtime.h"

namespace py = pybind11;

namespace {

using namespace dlkernels;
using Released = py::call_guard<py::gil_scoped_release>;

// c10's exceptions as Python's, message only; without this pybind would call every one of them a RuntimeError.
void translate_exception(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const c10::IndexError& error) {
    PyErr_SetString(PyExc_IndexError, error.what_without_backtrace());
  } catch (const c10::ValueError& error) {
    PyErr_SetString(PyExc_ValueError, error.what_without_backtrace());
  } catch (const c10::TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what_without_backtrace());
  } catch (const c10::NotImplementedError& error) {
    PyErr_SetString(PyExc_NotImplementedError, error.what_without_backtrace());
  } catch (const c10::Error& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
  }
}

std::vector<std::string> available_isa_names() {
  const char* names[4];
  const int count = available_isas(names);
  return {names, names + count};
}

}  // namespace

TORCH_LIBRARY(dlkernels, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  // clang-format off
  m.def("cross_entropy(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, float label_smoothing) -> (Tensor loss, Tensor statistics, Tensor divisor)", tags);
  m.def("cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, Tensor statistics, Tensor divisor, int ignore_index, float label_smoothing, bool[2] output_mask) -> (Tensor grad_logits, Tensor grad_target)", tags);
  m.def("linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, int reduction, int ignore_index, float label_smoothing, bool wide_loss) -> (Tensor loss, Tensor statistics, Tensor divisor)", tags);
  m.def("linear_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor statistics, Tensor divisor, int ignore_index, float label_smoothing, bool[4] output_mask) -> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias, Tensor grad_target)", tags);
  // clang-format on
}

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  py::register_local_exception_translator(&translate_exception);
  ops::install_torch_runtime();
  kernels();  // a DLKERNELS_ISA that cannot be had is an error at import, not at the first call

  m.def("isa", [] { return kernels().isa; });
  m.def("available_isas", &available_isa_names);
  m.def("select_isa", [](const std::string& name) { return select_isa(name.c_str()); }, py::arg("name"));
  m.def(
      "cross_entropy",
      [](const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& weight, int64_t reduction,
         int64_t ignore_index, double label_smoothing) {
        return std::get<0>(ops::cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing));
      },
      py::arg("logits"), py::arg("target"), py::arg("weight"), py::arg("reduction"), py::arg("ignore_index"),
      py::arg("label_smoothing"), Released());
  m.def(
      "linear_cross_entropy",
      [](const at::Tensor& input, const at::Tensor& linear_weight, const std::optional<at::Tensor>& linear_bias,
         const at::Tensor& target, const std::optional<at::Tensor>& weight, int64_t reduction, int64_t ignore_index,
         double label_smoothing) {
        return std::get<0>(ops::linear_cross_entropy(input, linear_weight, linear_bias, target, weight, reduction,
                                                     ignore_index, label_smoothing, false));
      },
      py::arg("input"), py::arg("linear_weight"), py::arg("linear_bias"), py::arg("target"), py::arg("weight"),
      py::arg("reduction"), py::arg("ignore_index"), py::arg("label_smoothing"), Released());
}
