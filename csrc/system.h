// What the operating system is asked: what the machine has and who uses it at this moment, where a thread that is woken
// should run, clocks, signals, forks. Windows has neither of the last two, and no clock fine enough for the time of a
// thread.
#pragma once

#include <chrono>
#include <cstdint>

#ifndef _WIN32
#include <signal.h>
#endif
#ifdef __linux__
#include <sched.h>
#include <sys/types.h>
#endif

namespace rnnkern {

// Bytes of the largest cache that a core has to itself, as the system says; a guess where it does not.
std::int64_t private_cache() noexcept;

// The CPUs of this machine.
int online_cpus() noexcept;

// The threads of this machine that have a CPU or wait for one at this moment, the caller among them; 0 where that says
// nothing of the caller's CPUs or cannot be found out, as where the caller may not run on all of them. Takes about a
// microsecond.
int runnable_threads() noexcept;

// The CPUs that the thread which made it may run on. A kernel may wake a sleeping thread on the CPU of the thread that
// wakes it; where that one goes on computing, the other waits for milliseconds to be moved. What somebody else sets
// meanwhile stays.
class ThreadCpus {
 public:
  ThreadCpus() noexcept;
  void exclude_callers() noexcept;  // by another thread: keeps it off the CPU this is called on
  void restore() noexcept;          // by itself

 private:
#ifdef __linux__
  pid_t thread_;
  cpu_set_t allowed_;   // before it was kept off one
  cpu_set_t narrowed_;  // while it is; else empty
#endif
};

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
