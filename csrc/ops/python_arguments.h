// Arguments that Python spells in more than one way.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "ops/conv2d.h"

namespace pybind11::detail {

// An int, or a tuple or list of ints.
template <>
struct type_caster<dlkernels::ops::IntOrInts> {
  PYBIND11_TYPE_CASTER(dlkernels::ops::IntOrInts, const_name("int | Sequence[int]"));

  bool load(handle source, bool) {
    value.clear();
    if (append(source)) return true;
    if (!PyTuple_Check(source.ptr()) && !PyList_Check(source.ptr())) return false;
    for (const handle& item : reinterpret_borrow<sequence>(source)) {
      if (!append(item)) return false;
    }
    return true;
  }

 private:
  bool append(handle number) {
    if (!PyLong_Check(number.ptr()) && !PyIndex_Check(number.ptr())) return false;
    const Py_ssize_t whole = PyNumber_AsSsize_t(number.ptr(), PyExc_OverflowError);
    if (whole == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    value.push_back(whole);
    return true;
  }
};

}  // namespace pybind11::detail
