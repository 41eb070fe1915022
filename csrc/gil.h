// Work beside other Python threads.
#pragma once

#include <pybind11/pybind11.h>

#include <cfenv>
#include <chrono>
#include <thread>
#include <type_traits>

#include "team.h"

namespace rnnkern {

// Calls a function of Python's API that may run Python code, or wait for the GIL. Before 3.14 Python unwinds the stack
// of a daemon thread that wants the GIL while the interpreter shuts down. In C++ that would abort the process in the
// first noexcept function, and destructors would give up references without the GIL: the thread sleeps instead until
// the process is gone, as in 3.14.
template <class Result, class... Parameters>
Result in_python(Result (*function)(Parameters...), std::type_identity_t<Parameters>... arguments) noexcept {
  try {
    return function(arguments...);
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

// A call expected to be shorter than this keeps the GIL: giving it up costs 0.1 us, and to get it back from a thread at
// work in Python may take its whole turn, 5 ms.
constexpr std::int64_t kKeepsGil = 10'000;  // ns

// While one lives, other Python threads run; but for a look for Ctrl-C once 0.1 s have passed, and every 0.05 s from
// then on.
class WithoutGil {
 public:
  WithoutGil() noexcept : thread_(PyEval_SaveThread()) { std::fegetenv(&callers_); }
  ~WithoutGil() { in_python(PyEval_RestoreThread, thread_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  static bool poll(void* context) noexcept {
    auto& self = *static_cast<WithoutGil*>(context);
    const auto now = Clock::now();
    if (now < self.next_) return false;
    self.next_ = now + std::chrono::milliseconds(50);
    std::fenv_t kernels;  // in which denormals are zero: no handler of a signal may compute so, and no thread it starts
    std::fegetenv(&kernels);
    std::fesetenv(&self.callers_);
    in_python(PyEval_RestoreThread, self.thread_);
    bool interrupted = in_python(PyErr_CheckSignals) != 0;
    if (lost_helpers() && !interrupted) {
      PyErr_SetString(PyExc_RuntimeError,
                      "fork: a signal handler forked this process during a call on several threads; "
                      "the child cannot go on with that call");
      interrupted = true;
    }
    self.thread_ = PyEval_SaveThread();
    std::fesetenv(&kernels);
    return interrupted;
  }

 private:
  using Clock = std::chrono::steady_clock;

  PyThreadState* thread_;
  std::fenv_t callers_;
  Clock::time_point next_ = Clock::now() + std::chrono::milliseconds(100);
};

}  // namespace rnnkern
