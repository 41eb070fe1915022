// Reads the CPU topology, the scheduling affinity and the cgroup quota of this process, as Linux shows them; of macOS
// the cores.
#include "cores.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <initializer_list>
#include <string>
#include <thread>
#include <vector>

#include "policy.h"

#ifdef __linux__
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace rnnkern {
namespace {

#ifdef __linux__

// Of each CPU that this process may run on, those that share its core, such as "0,64"; empty if that cannot be found
// out.
std::vector<std::string> siblings_of_cpus() {
  std::vector<std::string> siblings;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return siblings;
  for (std::size_t cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string name = "cpu" + std::to_string(cpu);
    std::string core;
    std::getline(std::ifstream("/sys/devices/system/cpu/" + name + "/topology/thread_siblings_list"), core);
    siblings.push_back(core.empty() ? name : core);
  }
  return siblings;
}

// CPUs' worth of time per period that the cgroup in this folder grants; infinite where it sets no limit.
double quota(const std::string& folder) {
  double time = 0, period = 0;
  if (std::ifstream(folder + "/cpu.max") >> time >> period) return time / period;  // v2; "max" is not a number
  std::ifstream(folder + "/cpu.cfs_quota_us") >> time;                             // v1; -1 is no limit
  std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  return time > 0 && period > 0 ? time / period : INFINITY;
}

// The tightest quota from this process's cgroup up to the root. In a container the path may be the host's, and then
// only the root is there to read.
double cgroup_quota() {
  double tightest = INFINITY;
  std::ifstream memberships("/proc/self/cgroup");
  for (std::string line; std::getline(memberships, line);) {  // "0::/path" in v2, "4:cpu,cpuacct:/path" in v1
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = std::string(",").append(line, first + 1, second - first - 1).append(",");
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",cpu,") == std::string::npos) continue;
    const std::string root = unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    for (std::string path = line.substr(second + 1); !path.empty(); path.resize(path.rfind('/'))) {
      tightest = std::min(tightest, quota(root + path));
      if (path.find('/') == std::string::npos) break;
    }
    tightest = std::min(tightest, quota(root));
  }
  return tightest;
}

#elif defined(__APPLE__)

// As many CPUs as there are cores, on Apple's own processors of the fast kind alone: a call is divided evenly.
std::vector<std::string> siblings_of_cpus() {
  int cores = 0;
  for (const char* name : {"hw.perflevel0.physicalcpu", "hw.physicalcpu"}) {
    std::size_t size = sizeof cores;
    if (sysctlbyname(name, &cores, &size, nullptr, 0) == 0 && cores > 0) break;
  }
  std::vector<std::string> siblings;
  for (int core = 0; core < cores; ++core) siblings.push_back(std::to_string(core));
  return siblings;
}
double cgroup_quota() { return INFINITY; }

#else

std::vector<std::string> siblings_of_cpus() { return {}; }
double cgroup_quota() { return INFINITY; }

#endif

}  // namespace

int usable_cores() {
  std::vector<std::string> siblings = siblings_of_cpus();
  if (siblings.empty())
    for (unsigned cpu = 0; cpu < std::thread::hardware_concurrency(); ++cpu) siblings.push_back(std::to_string(cpu));
  return most_threads(siblings, cgroup_quota());
}

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

}  // namespace rnnkern
