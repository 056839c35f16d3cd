// Status -> Python exception. Call with the GIL held.
#pragma once

#include <pybind11/pybind11.h>

#include "core/status.h"

namespace rnnlm {

inline PyObject* exception_type(StatusCode code) {
  switch (code) {
    case StatusCode::kInvalidArgument:
      return PyExc_ValueError;
    case StatusCode::kUnsupported:
      return PyExc_NotImplementedError;
    case StatusCode::kOutOfMemory:
      return PyExc_MemoryError;
    case StatusCode::kOk:
    case StatusCode::kDeviceError:
    case StatusCode::kInternal:
      break;
  }
  return PyExc_RuntimeError;
}

inline void raise_unless_ok(const Status& status) {
  if (status.is_ok()) return;
  PyErr_SetString(exception_type(status.code), status.message().c_str());
  throw pybind11::error_already_set();
}

}  // namespace rnnlm
