#include "system.h"

#ifndef _WIN32
#include <pthread.h>
#include <time.h>

#include <initializer_list>
#endif

namespace rnnkern {

#ifndef _WIN32

std::chrono::nanoseconds cpu_time() noexcept {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return std::chrono::seconds(now.tv_sec) + std::chrono::nanoseconds(now.tv_nsec);
}

NoSignals::NoSignals() noexcept {
  sigset_t blocked;
  sigfillset(&blocked);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&blocked, fault);
  pthread_sigmask(SIG_SETMASK, &blocked, &before_);
}

NoSignals::~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

bool call_in_children(void (*function)()) noexcept { return pthread_atfork(nullptr, nullptr, function) == 0; }

#else

std::chrono::nanoseconds cpu_time() noexcept { return std::chrono::steady_clock::now().time_since_epoch(); }
NoSignals::NoSignals() noexcept {}
NoSignals::~NoSignals() {}
bool call_in_children(void (*)()) noexcept { return true; }

#endif

}  // namespace rnnkern
