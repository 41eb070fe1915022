#include "checks.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "gil.h"

namespace rnnkern {
namespace {

std::string text_of_shape(const Py_intptr_t* sizes, int count) {
  std::string text = "(";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (count == 1 ? ",)" : ")");
}

[[noreturn]] void refuse(py::handle object, const Name& name, const py::dtype& dtype, const Shape& shape) {
  const std::string expected = name.text() + ": expected C-contiguous " + text_of(dtype) + " of shape " +
                               text_of_shape(shape.sizes, shape.count) + ", got ";
  if (!py::isinstance<py::array>(object)) throw py::type_error(expected + Py_TYPE(object.ptr())->tp_name);
  const auto array = py::reinterpret_borrow<py::array>(object);
  const auto& got = fields_of(object);
  const std::string came = "shape " + text_of_shape(got.dimensions, got.nd);
  if (!array.dtype().equal(dtype)) throw py::type_error(expected + text_of(array.dtype()) + " of " + came);
  if (got.nd != shape.count || !std::equal(shape.sizes, shape.sizes + shape.count, got.dimensions))
    throw py::value_error(expected + came);
  if (!fits(object, dtype, shape)) throw py::value_error(expected + "other strides or a misaligned buffer");
  throw py::value_error(expected + "a read-only array");
}

std::size_t size_of(py::handle array) {
  return static_cast<std::size_t>(py::reinterpret_borrow<py::array>(array).nbytes());
}

}  // namespace

py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

std::string text_of(const py::dtype& dtype) { return owned(in_python(PyObject_Str, dtype.ptr())).cast<std::string>(); }

std::string Name::text() const {
  std::string all = argument_;
  for (const std::size_t one : {index_, element_})
    if (one != kNone) all += "[" + std::to_string(one) + "]";
  return all;
}

py::array checked(py::handle object, const Name& name, const py::dtype& dtype, const Shape& shape, bool writable) {
  if (!py::isinstance<py::array>(object) || !fits(object, dtype, shape, writable)) refuse(object, name, dtype, shape);
  return py::reinterpret_borrow<py::array>(object);
}

std::vector<py::object> elements(const py::object& object, const Name& name, std::size_t count) {
  const auto expected = [&] {
    return name.text() + ": expected a sequence of " + std::to_string(count) + " elements, got ";
  };
  if (!py::isinstance<py::sequence>(object)) throw py::type_error(expected() + Py_TYPE(object.ptr())->tp_name);
  const bool is_tuple = PyTuple_Check(object.ptr());
  const Py_ssize_t size = is_tuple ? PyTuple_GET_SIZE(object.ptr()) : in_python(PySequence_Size, object.ptr());
  if (size < 0) throw py::error_already_set();
  if (static_cast<std::size_t>(size) != count) throw py::value_error(expected() + std::to_string(size));
  std::vector<py::object> all;
  all.reserve(count);
  for (Py_ssize_t i = 0; i < size; ++i)
    all.push_back(is_tuple ? py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(object.ptr(), i))
                           : owned(in_python(PySequence_GetItem, object.ptr(), i)));
  return all;
}

py::object value_of(const py::dict& dict, py::handle key) {
  PyObject* value = nullptr;
#if PY_VERSION_HEX >= 0x030d0000  // where another thread, without a GIL, may take it out of the dict at any time
  in_python(PyDict_GetItemRef, dict.ptr(), key.ptr(), &value);
#else
  value = Py_XNewRef(in_python(PyDict_GetItemWithError, dict.ptr(), key.ptr()));
#endif
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::dtype float_dtype(const py::object& object) {
  const py::dtype dtype = py::dtype::from_args(object);
  if (!dtype.equal(py::dtype::of<float>()) && !dtype.equal(py::dtype::of<double>()))
    throw py::value_error("dtype: expected float32 or float64, got " + text_of(dtype));
  return dtype;
}

void copy(py::handle from, py::handle to) { std::memmove(bytes_of(to), bytes_of(from), size_of(from)); }

py::array copy_of(py::handle array, const py::dtype& dtype, const Shape& shape) {
  py::array result = new_array(dtype, shape);
  copy(array, result);
  return result;
}

void fill_with_zeros(py::handle array) { std::memset(bytes_of(array), 0, size_of(array)); }

Buffer::Buffer(std::int64_t bytes) : Buffer(new_array(py::dtype::of<std::uint8_t>(), {with_room(bytes)})) {}

Buffer::Buffer(py::array of)
    : owner(std::move(of)),
      data(reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(bytes_of(owner)) + 63) & ~std::uintptr_t{63})) {}

std::int64_t Buffer::with_room(std::int64_t bytes) {
  if (bytes > std::numeric_limits<std::int64_t>::max() - 64) throw std::bad_alloc();
  return bytes + 64;
}

Buffer Reserve::take(Purpose purpose, std::int64_t bytes) {
  auto held = py::reinterpret_steal<py::array>(held_[purpose].exchange(nullptr));
  if (held && held.nbytes() >= Buffer::with_room(bytes)) return Buffer(std::move(held));
  held = py::array();  // before there is another one
  return Buffer(bytes);
}

void Reserve::give_back(Purpose purpose, Buffer&& buffer) noexcept {
  Py_XDECREF(held_[purpose].exchange(buffer.owner.release().ptr()));
}

void Reserve::release() noexcept {
  for (auto& one : held_) Py_XDECREF(one.exchange(nullptr));
}

std::int64_t Reserve::nbytes() const {
  std::int64_t total = 0;
  for (auto& one : held_)
    if (PyObject* array = one.exchange(nullptr)) {
      total += py::reinterpret_borrow<py::array>(array).nbytes();
      Py_XDECREF(one.exchange(array));
    }
  return total;
}

Borrowed::Borrowed(py::object reserve, Reserve::Purpose purpose, std::int64_t bytes)
    : reserve_(std::move(reserve)),
      purpose_(purpose),
      buffer_(reserve_.is_none() ? Buffer(bytes) : reserve_.cast<Reserve&>().take(purpose, bytes)) {}

Borrowed::~Borrowed() {
  if (reserve_ && !reserve_.is_none()) reserve_.cast<Reserve&>().give_back(purpose_, std::move(buffer_));
}

}  // namespace rnnkern
