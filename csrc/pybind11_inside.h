// All that relies on what pybind11 keeps to itself and may change in any release: the fields of an array without a
// call, arrays made past its checks, types that nobody can make instances of, and methods past its dispatch.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <new>

namespace py = pybind11;

namespace rnnkern {

// The shape of an array; the kernels know none of more than three dimensions.
struct Shape {
  Py_intptr_t sizes[3] = {};
  int count = 0;

  Shape(std::initializer_list<std::int64_t> given) {
    for (const std::int64_t size : given) sizes[count++] = size;
  }
};

inline const py::detail::PyArray_Proxy& fields_of(py::handle array) { return *py::detail::array_proxy(array.ptr()); }

// Not const, since the kernels' structs are filled with inputs and outputs alike: what was checked as an input stays
// one.
inline void* bytes_of(py::handle array) { return fields_of(array).data; }

// Says whether an array is exactly as the kernels need it.
inline bool fits(py::handle array, const py::dtype& dtype, const Shape& shape, bool writable = false) {
  using Numpy = py::detail::npy_api;
  const auto& got = fields_of(array);
  const int needed =
      Numpy::NPY_ARRAY_C_CONTIGUOUS_ | Numpy::NPY_ARRAY_ALIGNED_ | (writable ? Numpy::NPY_ARRAY_WRITEABLE_ : 0);
  return (got.descr == dtype.ptr() || Numpy::get().PyArray_EquivTypes_(got.descr, dtype.ptr())) &&
         got.nd == shape.count && std::equal(shape.sizes, shape.sizes + shape.count, got.dimensions) &&
         (got.flags & needed) == needed;
}

// Says whether an object is usable without conversion: a subclass of ndarray may mean its data in another way.
inline bool is_exact(py::handle object, const py::dtype& dtype, const Shape& shape, bool writable = false) {
  return Py_TYPE(object.ptr()) == py::detail::npy_api::get().PyArray_Type_ && fits(object, dtype, shape, writable);
}

// Makes an array of undefined values. No code of Python's runs meanwhile: what was checked before is still so after.
inline py::array new_array(const py::dtype& dtype, const Shape& shape) {
  const auto& numpy = py::detail::npy_api::get();
  PyObject* array = numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, py::dtype(dtype).release().ptr(), shape.count,
                                                shape.sizes, nullptr, nullptr, 0, nullptr);
  if (array == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::array>(array);
}

// Forbids what would make an instance of a type without a constructor having run, or take one for another: `__new__`,
// subclasses, assignment to `__class__`. Members can no longer be added to the type afterwards.
inline void seal(const py::object& type) {
  auto* object = reinterpret_cast<PyTypeObject*>(type.ptr());
  object->tp_new = nullptr;
  object->tp_flags |= Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE;
  PyType_Modified(object);
}

template <class Self, PyObject* (Self::*method)(PyObject* const*, Py_ssize_t)>
PyObject* call_directly(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  try {
    // Not a cast, which would look the type up once more.
    auto* object = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().template value_ptr<Self>();
    return (object->*method)(arguments, count);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Adds a method of positional arguments, which come straight from the interpreter. That checks that self is of the
// class.
template <class Self, PyObject* (Self::*method)(PyObject* const*, Py_ssize_t)>
void add_method(py::class_<Self>& type, const char* name, const char* doc) {
  static PyMethodDef definition{
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_directly<Self, method>)), METH_FASTCALL,
      doc};
  auto* descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &definition);
  if (descriptor == nullptr) throw py::error_already_set();
  type.attr(name) = py::reinterpret_steal<py::object>(descriptor);
}

}  // namespace rnnkern
