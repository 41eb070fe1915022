// Arguments from Python, checked: memory (dtype, shape, contiguity) strictly, and an error that names what is wrong.
// Also the arrays and the memory that calls make; NumPy owns all of it.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "gil.h"

namespace py = pybind11;

namespace rnnkern {
namespace {

// The shape of an array; the kernels know none of more than three dimensions.
struct Shape {
  Py_intptr_t sizes[3] = {};
  int count = 0;

  Shape(std::initializer_list<std::int64_t> given) {
    for (const std::int64_t size : given) sizes[count++] = size;
  }
};

std::string text_of(const Py_intptr_t* sizes, int count) {
  std::string text = "(";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (count == 1 ? ",)" : ")");
}

// What a function of Python's API returned, or the error that it set.
py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

std::string text_of(const py::dtype& dtype) { return owned(in_python(PyObject_Str, dtype.ptr())).cast<std::string>(); }

// What errors call an argument: argument, argument[index] or argument[index][element]. Its text is put together only
// for an error.
class Name {
 public:
  Name(const char* argument, std::size_t index = kNone, std::size_t element = kNone)
      : argument_(argument), index_(index), element_(element) {}

  std::string text() const {
    std::string all = argument_;
    for (const std::size_t one : {index_, element_})
      if (one != kNone) all += "[" + std::to_string(one) + "]";
    return all;
  }

 private:
  static constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();

  const char* argument_;
  std::size_t index_, element_;
};

const py::detail::PyArray_Proxy& fields_of(py::handle array) { return *py::detail::array_proxy(array.ptr()); }

// Is an array exactly as the kernels need it?
bool fits(py::handle array, const py::dtype& dtype, const Shape& shape, bool writable = false) {
  using Numpy = py::detail::npy_api;
  const auto& got = fields_of(array);
  const int needed =
      Numpy::NPY_ARRAY_C_CONTIGUOUS_ | Numpy::NPY_ARRAY_ALIGNED_ | (writable ? Numpy::NPY_ARRAY_WRITEABLE_ : 0);
  return (got.descr == dtype.ptr() || Numpy::get().PyArray_EquivTypes_(got.descr, dtype.ptr())) &&
         got.nd == shape.count && std::equal(shape.sizes, shape.sizes + shape.count, got.dimensions) &&
         (got.flags & needed) == needed;
}

[[noreturn]] void refuse(py::handle object, const Name& name, const py::dtype& dtype, const Shape& shape) {
  const std::string expected = name.text() + ": expected C-contiguous " + text_of(dtype) + " of shape " +
                               text_of(shape.sizes, shape.count) + ", got ";
  if (!py::isinstance<py::array>(object)) throw py::type_error(expected + Py_TYPE(object.ptr())->tp_name);
  const auto array = py::reinterpret_borrow<py::array>(object);
  const auto& got = fields_of(object);
  const std::string came = "shape " + text_of(got.dimensions, got.nd);
  if (!array.dtype().equal(dtype)) throw py::type_error(expected + text_of(array.dtype()) + " of " + came);
  if (got.nd != shape.count || !std::equal(shape.sizes, shape.sizes + shape.count, got.dimensions))
    throw py::value_error(expected + came);
  if (!fits(object, dtype, shape)) throw py::value_error(expected + "other strides or a misaligned buffer");
  throw py::value_error(expected + "a read-only array");
}

// An array exactly as the kernels need it, or an error that names it.
py::array checked(py::handle object, const Name& name, const py::dtype& dtype, const Shape& shape,
                  bool writable = false) {
  if (!py::isinstance<py::array>(object) || !fits(object, dtype, shape, writable)) refuse(object, name, dtype, shape);
  return py::reinterpret_borrow<py::array>(object);
}

// The `count` elements of a sequence. A class of the caller's may run any code when it is asked for one, and change
// arrays with it: so whoever takes elements takes all of them before the first array is checked.
std::vector<py::object> elements(const py::object& object, const Name& name, std::size_t count) {
  const auto expected = [&] {
    return name.text() + ": expected a sequence of " + std::to_string(count) + " elements, got ";
  };
  if (!py::isinstance<py::sequence>(object)) throw py::type_error(expected() + Py_TYPE(object.ptr())->tp_name);
  const Py_ssize_t size = in_python(PySequence_Size, object.ptr());
  if (size < 0) throw py::error_already_set();
  if (static_cast<std::size_t>(size) != count) throw py::value_error(expected() + std::to_string(size));
  std::vector<py::object> all;
  all.reserve(count);
  for (std::size_t i = 0; i < count; ++i)
    all.push_back(owned(in_python(PySequence_GetItem, object.ptr(), static_cast<Py_ssize_t>(i))));
  return all;
}

py::dtype float_dtype(const py::object& object) {
  const py::dtype dtype = py::dtype::from_args(object);
  if (!dtype.equal(py::dtype::of<float>()) && !dtype.equal(py::dtype::of<double>()))
    throw py::value_error("dtype: expected float32 or float64, got " + text_of(dtype));
  return dtype;
}

// An array of undefined values. No code of Python's runs meanwhile: what was checked before is still so after.
py::array new_array(const py::dtype& dtype, const Shape& shape) {
  const auto& numpy = py::detail::npy_api::get();
  PyObject* array = numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, py::dtype(dtype).release().ptr(), shape.count,
                                                shape.sizes, nullptr, nullptr, 0, nullptr);
  if (array == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::array>(array);
}

// Not const, since the kernels' structs are filled with inputs and outputs alike: what was checked as an input stays
// one.
void* bytes_of(py::handle array) { return fields_of(array).data; }

// Copies between arrays of one dtype and shape, which may be the same.
void copy(const py::array& from, const py::array& to) {
  std::memmove(bytes_of(to), bytes_of(from), static_cast<std::size_t>(from.nbytes()));
}

py::array copy_of(const py::array& array, const py::dtype& dtype, const Shape& shape) {
  py::array result = new_array(dtype, shape);
  copy(array, result);
  return result;
}

// Memory for `bytes` bytes, aligned to 64, owned by NumPy.
struct Buffer {
  py::array owner;
  void* data;

  explicit Buffer(std::int64_t bytes)
      : owner(new_array(py::dtype::of<std::uint8_t>(), {with_room(bytes)})),
        data(reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(bytes_of(owner)) + 63) & ~std::uintptr_t{63})) {}

  // The size of owner.
  static std::int64_t with_room(std::int64_t bytes) {
    if (bytes > std::numeric_limits<std::int64_t>::max() - 64) throw std::bad_alloc();
    return bytes + 64;
  }
};

// The same for the time of a call; what is small lies on the stack, since calls of a microsecond feel an allocation.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) {
    if (beside_stack(bytes) > 0) large_.emplace(bytes);
    data_ = large_ ? large_->data : small_;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }

  // What NumPy allocates for it.
  static std::int64_t beside_stack(std::int64_t bytes) { return bytes > kSmall ? Buffer::with_room(bytes) : 0; }

 private:
  static constexpr std::int64_t kSmall = 16 * 1024;  // threads may have stacks as small as 128 KiB

  alignas(64) std::byte small_[kSmall];
  std::optional<Buffer> large_;
  void* data_;
};

}  // namespace
}  // namespace rnnkern
