// What threads and processes are to the operating system. Windows has neither signals nor forks, and no clock fine
// enough for the time of a thread.
#pragma once

#include <chrono>

#ifndef _WIN32
#include <signal.h>
#endif

namespace rnnkern {

// The time that this thread has had a core; where that is not known, the time of the wall.
std::chrono::nanoseconds cpu_time() noexcept;

// Threads that are started while one lives get no signals, which are for the threads of the interpreter, except those
// that a fault sends to itself.
class NoSignals {
 public:
  NoSignals() noexcept;
  ~NoSignals();
  NoSignals(const NoSignals&) = delete;
  NoSignals& operator=(const NoSignals&) = delete;

 private:
#ifndef _WIN32
  sigset_t before_;
#endif
};

// Has a function called in each process that is forked from this one from now on, by the thread that forked it. False
// where there is no memory for that.
bool call_in_children(void (*function)()) noexcept;

}  // namespace rnnkern
