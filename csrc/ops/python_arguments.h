// Arguments that Python spells in more than one way.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "ops/conv2d.h"

namespace pybind11::detail {

// Whether `source` is an int of 64 bits: no bool, and nothing that would be cut to a whole number.
inline bool load_int(handle source, int64_t* number) {
  if (PyBool_Check(source.ptr()) || !PyIndex_Check(source.ptr())) return false;
  *number = PyNumber_AsSsize_t(source.ptr(), PyExc_OverflowError);
  if (*number != -1 || !PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

template <>
struct type_caster<dlkernels::ops::Int> {
  PYBIND11_TYPE_CASTER(dlkernels::ops::Int, const_name("int"));

  bool load(handle source, bool) { return load_int(source, &value.number); }
};

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
  bool append(handle source) {
    int64_t number;
    if (!load_int(source, &number)) return false;
    value.push_back(number);
    return true;
  }
};

}  // namespace pybind11::detail
