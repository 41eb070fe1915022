// Arguments from Python, checked: memory (dtype, shape, contiguity) strictly, and an error that names what is wrong.
// Also the memory that calls need; NumPy owns all of it.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "poison.h"
#include "pybind11_inside.h"

namespace rnnkern {

// Returns what a function of Python's API returned, or throws the error that it set.
py::object owned(PyObject* result);

std::string text_of(const py::dtype& dtype);

// What errors call an argument: argument, argument[index] or argument[index][element]. Its text is put together only
// for an error.
class Name {
 public:
  Name(const char* argument, std::size_t index = kNone, std::size_t element = kNone)
      : argument_(argument), index_(index), element_(element) {}

  std::string text() const;

 private:
  static constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();

  const char* argument_;
  std::size_t index_, element_;
};

// Returns an array exactly as the kernels need it, or throws an error that names it.
py::array checked(py::handle object, const Name& name, const py::dtype& dtype, const Shape& shape,
                  bool writable = false);

// Returns the `count` elements of a sequence. A class of the caller's may run any code when it is asked for one, and
// change arrays with it: so whoever takes elements takes all of them before the first array is checked.
std::vector<py::object> elements(const py::object& object, const Name& name, std::size_t count);

// Returns the value of a key, null where there is none.
py::object value_of(const py::dict& dict, py::handle key);

py::dtype float_dtype(const py::object& object);

// Copies between arrays of one dtype and shape, which may be the same.
void copy(py::handle from, py::handle to);
py::array copy_of(py::handle array, const py::dtype& dtype, const Shape& shape);

void fill_with_zeros(py::handle array);

// Memory for `bytes` bytes, aligned to 64, owned by NumPy.
struct Buffer {
  py::array owner;
  void* data;

  explicit Buffer(std::int64_t bytes);
  explicit Buffer(py::array owner);  // of with_room() bytes

  // The size of owner.
  static std::int64_t with_room(std::int64_t bytes);
};

// Memory that a layer keeps for its next call, one buffer for each purpose. Whoever needs one takes it, and gives it
// back when done; who comes second makes a new one. Nothing in it is ever shown to a user.
class Reserve {
 public:
  enum Purpose { packed, saved };

  Reserve() = default;
  ~Reserve() { release(); }
  Reserve(const Reserve&) = delete;
  Reserve& operator=(const Reserve&) = delete;

  // Returns a buffer of at least as many bytes.
  Buffer take(Purpose purpose, std::int64_t bytes);
  void give_back(Purpose purpose, Buffer&& buffer) noexcept;
  void release() noexcept;
  std::int64_t nbytes() const;

 private:
  mutable std::array<std::atomic<PyObject*>, 2> held_{};  // arrays; null: at work or not there
};

// A buffer of a reserve, or without one its own.
class Borrowed {
 public:
  Borrowed(py::object reserve, Reserve::Purpose purpose, std::int64_t bytes);
  Borrowed(Borrowed&&) noexcept = default;
  ~Borrowed();

  const Buffer& buffer() const { return buffer_; }

 private:
  py::object reserve_;
  Reserve::Purpose purpose_;
  Buffer buffer_;
};

// Memory for the time of a call; what is small lies on the stack, since calls of a microsecond feel an allocation.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) : bytes_(bytes) {
    if (beside_stack(bytes) > 0) large_.emplace(bytes);
    data_ = large_ ? large_->data : small_;
  }
  ~Scratch() { unpoison(data_, bytes_); }
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
  std::int64_t bytes_;
};

}  // namespace rnnkern
