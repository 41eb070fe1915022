#include "system.h"

#include <algorithm>
#include <cstddef>
#include <cstdio>

#ifndef _WIN32
#include <pthread.h>
#include <time.h>

#include <initializer_list>
#endif
#ifdef __linux__
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rnnkern {

#ifdef __linux__

std::int64_t private_cache() noexcept {
  static const std::int64_t bytes = std::clamp(sysconf(_SC_LEVEL2_CACHE_SIZE), 1L << 18, 1L << 22);
  return bytes;
}

int online_cpus() noexcept {
  static const int cpus = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  return cpus;
}

int runnable_threads() noexcept {
  static const int file = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
  cpu_set_t allowed;  // a thread with CPUs of its own is not told how many want those
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < online_cpus()) return 0;
  char text[64] = {};  // "0.20 0.18 0.12 1/80 11206": the fourth are the threads that run or wait for a CPU, and all
  int runnable = 0;
  if (file < 0 || pread(file, text, sizeof text - 1, 0) <= 0 || std::sscanf(text, "%*s %*s %*s %d/", &runnable) != 1)
    return 0;
  return std::max(runnable, 0);
}

ThreadCpus::ThreadCpus() noexcept : thread_(static_cast<pid_t>(syscall(SYS_gettid))), allowed_{}, narrowed_{} {}

void ThreadCpus::exclude_callers() noexcept {
  cpu_set_t now;
  const int cpu = sched_getcpu();
  if (cpu < 0 || sched_getaffinity(thread_, sizeof now, &now) != 0) return;
  if (!CPU_EQUAL(&now, &narrowed_)) allowed_ = now;
  cpu_set_t others = allowed_;
  CPU_CLR(static_cast<std::size_t>(cpu), &others);
  if (CPU_COUNT(&others) > 0 && sched_setaffinity(thread_, sizeof others, &others) == 0) narrowed_ = others;
}

void ThreadCpus::restore() noexcept {
  cpu_set_t now;
  if (CPU_COUNT(&narrowed_) > 0 && sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&now, &narrowed_))
    sched_setaffinity(0, sizeof allowed_, &allowed_);
  CPU_ZERO(&narrowed_);
}

#else

std::int64_t private_cache() noexcept { return 1 << 20; }
int online_cpus() noexcept { return 0; }
int runnable_threads() noexcept { return 0; }
ThreadCpus::ThreadCpus() noexcept {}
void ThreadCpus::exclude_callers() noexcept {}
void ThreadCpus::restore() noexcept {}

#endif

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
