// Work beside other Python threads.
#pragma once

#include <pybind11/pybind11.h>

#include <unistd.h>

#include <chrono>

namespace rnnkern {
namespace {

// While one lives, other Python threads run; but for a look for Ctrl-C once 0.1 s have passed, and every 0.05 s from
// then on.
class WithoutGil {
 public:
  WithoutGil() noexcept : thread_(PyEval_SaveThread()) {}
  ~WithoutGil() { take(); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  static bool poll(void* context) noexcept {
    auto& self = *static_cast<WithoutGil*>(context);
    const auto now = Clock::now();
    if (now < self.next_) return false;
    self.next_ = now + std::chrono::milliseconds(50);
    self.take();
    const bool interrupted = PyErr_CheckSignals() != 0;
    self.thread_ = PyEval_SaveThread();
    return interrupted;
  }

 private:
  using Clock = std::chrono::steady_clock;

  // Python before 3.14 unwinds a daemon thread that wants the GIL while the interpreter shuts down. Here that would
  // abort the process in the first noexcept function: the thread sleeps instead until the process is gone, as in 3.14.
  void take() noexcept {
    try {
      PyEval_RestoreThread(thread_);
    } catch (...) {
      for (;;) pause();
    }
  }

  PyThreadState* thread_;
  Clock::time_point next_ = Clock::now() + std::chrono::milliseconds(100);
};

}  // namespace
}  // namespace rnnkern
