// The door to Python: the operators' schemas, and one function each that calls its operator's typed handle.
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "ops/attention.h"
#include "ops/batch_norm.h"
#include "ops/conv2d.h"
#include "ops/cross_entropy.h"
#include "ops/linear.h"
#include "ops/linear_cross_entropy.h"
#include "ops/lstm.h"
#include "ops/python_arguments.h"
#include "ops/runtime.h"
#include "ops/special_calls.h"

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

// A function of vmath.h on a dense float32 tensor, for its tests.
at::Tensor elementary_function(const std::string& name, const at::Tensor& input) {
  static const std::map<std::string, ElementaryFunction> functions = {
      {"exp", ElementaryFunction::exp},
      {"exp_of_negative", ElementaryFunction::exp_of_negative},
      {"coarse_exp2_of_negative", ElementaryFunction::coarse_exp2_of_negative},
      {"log", ElementaryFunction::log},
      {"tanh", ElementaryFunction::tanh},
      {"sigmoid", ElementaryFunction::sigmoid}};
  const auto found = functions.find(name);
  TORCH_CHECK_VALUE(found != functions.end(), "elementary_function: name must be one of exp, exp_of_negative, ",
                    "coarse_exp2_of_negative, log, tanh and sigmoid, got ", name);
  TORCH_CHECK(input.scalar_type() == at::kFloat && input.is_contiguous() && input.is_cpu(),
              "elementary_function: input must be a contiguous float32 tensor on the CPU");
  at::Tensor output = at::empty_like(input);
  kernels().elementary.apply(found->second, input.const_data_ptr<float>(), output.mutable_data_ptr<float>(),
                             input.numel());
  return output;
}

// Does multiply-adds in the type of `like`, on every thread, and returns how many operations they were.
double arithmetic_operations(const at::Tensor& like, int64_t repetitions) {
  return kernels().arithmetic_rate.multiply_add(ops::kernel_dtype(like, "arithmetic_operations", "like"), repetitions);
}

}  // namespace

TORCH_LIBRARY(dlkernels, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  // clang-format off
  m.def("batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean, Tensor? running_var, bool training, float eps, str? activation) -> (Tensor output, Tensor mean, Tensor variance)", tags);
  m.def("batch_norm_backward(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, bool training, float eps, str? activation, ScalarType? weight_type, ScalarType? bias_type, bool[4] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)", tags);
  m.def("update_running_statistics_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor variance, SymInt count, float momentum) -> ()", tags);
  m.def("conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups) -> Tensor", tags);
  m.def("conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)", tags);
  m.def("cross_entropy(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, float label_smoothing) -> (Tensor loss, Tensor statistics, Tensor divisor)", tags);
  m.def("cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, Tensor statistics, Tensor divisor, int ignore_index, float label_smoothing, bool[2] output_mask) -> (Tensor grad_logits, Tensor grad_target)", tags);
  m.def("attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, float? scale, bool enable_gqa) -> (Tensor output, Tensor exact_output, Tensor statistics, Tensor dropout_seed)", {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded});
  m.def("attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor output, Tensor exact_output, Tensor statistics, Tensor dropout_seed, float dropout_p, bool is_causal, float? scale, bool enable_gqa, bool[4] output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attn_mask)", tags);
  m.def("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", tags);
  m.def("linear_backward(Tensor grad_output, Tensor input, Tensor weight, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)", tags);
  m.def("linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, int reduction, int ignore_index, float label_smoothing, bool wide_loss) -> (Tensor loss, Tensor statistics, Tensor divisor)", tags);
  m.def("linear_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor statistics, Tensor divisor, int ignore_index, float label_smoothing, bool[4] output_mask) -> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias, Tensor grad_target)", tags);
  m.def("lstm_cell(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh) -> (Tensor h, Tensor c, Tensor gates)", tags);
  m.def("lstm_cell_backward(Tensor grad_h, Tensor grad_c, Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor gates, bool[6] output_mask) -> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_bias)", tags);
  m.def("lstm_layer(Tensor input, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, bool reverse) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)", tags);
  m.def("lstm_layer_backward(Tensor grad_output, Tensor grad_h_n, Tensor grad_c_n, Tensor input, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, bool reverse, Tensor? output, Tensor gates, Tensor cells, bool[7] output_mask) -> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_bias, Tensor grad_w_hr)", tags);
  // clang-format on
}

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  py::register_local_exception_translator(&translate_exception);
  ops::install_torch_runtime();
  kernels();  // a DLKERNELS_ISA that cannot be had is an error at import, not at the first call

  m.def("isa", [] { return kernels().isa; });
  m.def("available_isas", &available_isas);
  m.def("select_isa", [](const std::string& name) { return select_isa(name.c_str()); }, py::arg("name"));
  static PyMethodDef is_special = {"is_special",
                                   reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&ops::is_special)),
                                   METH_FASTCALL, "is_special(*values: typing.Any) -> bool"};
  m.add_object("is_special", py::reinterpret_steal<py::object>(PyCFunction_New(&is_special, nullptr)));
  m.def("arithmetic_operations", &arithmetic_operations, py::arg("like"), py::arg("repetitions"), Released());
  m.def("elementary_function", &elementary_function, py::arg("name"), py::arg("input"), Released());
  m.def("batch_norm", &ops::batch_norm_with_update, py::arg("input"), py::arg("weight"), py::arg("bias"),
        py::arg("residual"), py::arg("running_mean"), py::arg("running_var"), py::arg("training"), py::arg("momentum"),
        py::arg("eps"), py::arg("activation"), Released());
  m.def("conv2d", &ops::conv2d_functional, py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), Released());
  m.def("cross_entropy", &ops::cross_entropy_functional, py::arg("logits"), py::arg("target"), py::arg("weight"),
        py::arg("reduction"), py::arg("ignore_index"), py::arg("label_smoothing"), Released());
  m.def(
      "attention",
      [](const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
         const std::optional<at::Tensor>& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
         bool enable_gqa) {
        return std::get<0>(ops::attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa));
      },
      py::arg("query"), py::arg("key"), py::arg("value"), py::arg("attn_mask"), py::arg("dropout_p"),
      py::arg("is_causal"), py::arg("scale"), py::arg("enable_gqa"), Released());
  m.def("linear", &ops::linear_functional, py::arg("input"), py::arg("weight"), py::arg("bias"), Released());
  m.def("linear_cross_entropy", &ops::linear_cross_entropy_functional, py::arg("input"), py::arg("linear_weight"),
        py::arg("linear_bias"), py::arg("target"), py::arg("weight"), py::arg("reduction"), py::arg("ignore_index"),
        py::arg("label_smoothing"), Released());
  m.def(
      "lstm_cell",
      [](const at::Tensor& input, const at::Tensor& hx, const at::Tensor& cx, const at::Tensor& w_ih,
         const at::Tensor& w_hh, const std::optional<at::Tensor>& b_ih, const std::optional<at::Tensor>& b_hh) {
        auto [h, c, gates] = ops::lstm_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh);
        return std::tuple(h, c);
      },
      py::arg("input"), py::arg("hx"), py::arg("cx"), py::arg("w_ih"), py::arg("w_hh"), py::arg("b_ih"),
      py::arg("b_hh"), Released());
  m.def(
      "lstm_layer",
      [](const at::Tensor& input, const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_ih,
         const at::Tensor& w_hh, const std::optional<at::Tensor>& b_ih, const std::optional<at::Tensor>& b_hh,
         const std::optional<at::Tensor>& w_hr, const std::optional<at::Tensor>& batch_sizes, bool reverse) {
        auto [output, h_n, c_n, gates, cells] =
            ops::lstm_layer(input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse);
        return std::tuple(output, h_n, c_n);
      },
      py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("w_ih"), py::arg("w_hh"), py::arg("b_ih"),
      py::arg("b_hh"), py::arg("w_hr"), py::arg("batch_sizes"), py::arg("reverse"), Released());
}
