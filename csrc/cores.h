// How many threads can run at once in this process, and where one that is woken should run.
#pragma once

#ifdef __linux__
#include <sched.h>
#include <sys/types.h>
#endif

namespace rnnkern {

// The physical cores among the CPUs that scheduling affinity allows, no more than the cgroup's CPU quota (rounded up);
// at least 1.
int usable_cores();

// How many more CPUs this machine has than threads that want one at this moment, the caller among them; negative where
// they wait for each other, a large number where that cannot be found out, as where the caller may not run on all of
// them. Takes about a microsecond.
int idle_cpus() noexcept;

// The CPUs of the thread that made it. A kernel may wake a sleeping thread on the CPU of the thread that wakes it;
// where that one goes on computing, the other waits for milliseconds to be moved.
class ThreadCpus {
 public:
  ThreadCpus() noexcept;
  void exclude_callers() const noexcept;  // by another thread: keeps it off the CPU this is called on
  void restore() const noexcept;          // by itself

 private:
#ifdef __linux__
  pid_t thread_;
  cpu_set_t allowed_;
#endif
};

}  // namespace rnnkern
