// How many threads work on a call: functions of counts and times alone. team.cpp asks them and does what they say.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace rnnkern {

constexpr std::int64_t kIdle = 50'000;          // ns; a helper without work sleeps after this
constexpr std::int64_t kWorthWaking = 100'000;  // ns; waking a sleeping helper costs the caller up to 10 us
constexpr std::int64_t kWorthAsking = 50'000;   // ns; to ask which CPUs are free takes a microsecond

// The threads that a process may use on `cores` cores where its cgroup grants `quota` CPUs' worth of time, infinite for
// no limit.
inline int most_threads(int cores, double quota) noexcept {
  return std::max(1, static_cast<int>(std::min<double>(cores, std::ceil(quota))));
}

struct Demand {
  int threads;  // that the call can use, the caller among them
  std::int64_t expected_ns;
  bool at_places;           // helpers may join it on its way
  std::int64_t since_last;  // ns, from the end of the call before
};

// What a call of this length should know before it decides; to find it out is not free.
inline bool worth_asking(const Demand& call) noexcept {
  return call.threads > 1 && call.at_places && call.expected_ns >= kWorthAsking;
}

struct Supply {
  int cpus;      // of the machine
  int runnable;  // threads on it that have a CPU or wait for one, caller and awake helpers among them; 0 if not known
  int awake;     // helpers that spin, waiting for work
};

struct Decision {
  int helpers;      // to ask for
  bool look_again;  // the CPUs are wanted by others now; the call asks again on its way
};

// Each helper gets a CPU that nobody else wants: to wait at every step for one that shares its CPU costs more than its
// help is worth. Where that is not known, as where the caller may not run on all CPUs, all are asked.
inline Decision decide(const Demand& call, const Supply& supply) noexcept {
  const bool wake = call.expected_ns >= kWorthWaking || call.since_last < kIdle;
  const int wanted = wake ? call.threads - 1 : std::min(call.threads - 1, supply.awake);
  if (supply.runnable == 0) return {wanted, false};
  const int room = std::max(0, supply.cpus - supply.runnable + supply.awake);
  return {std::min(wanted, room), wanted > 0 && room == 0};
}

constexpr unsigned kLongestRetreat = 63;        // calls, and
constexpr std::int64_t kRetreat = 250'000'000;  // ns
constexpr std::int64_t kSlice = 1'000'000;      // ns; barriers closer than a turn of the scheduler wait for whole turns
constexpr std::int64_t kOffCore = 20'000;       // ns; the two clocks may differ by less
constexpr int kCrowded = 5;                     // off its core for a fifth of a call: crowded out

// What came of a call where it is not known who else wants the CPUs.
struct Outcome {
  std::int64_t took;  // ns
  std::int64_t barriers;
  std::int64_t off_core;  // ns, of the thread that was off its core for longest
};

inline bool crowded(const Outcome& call) noexcept {
  return call.took < call.barriers * kSlice && call.off_core > std::max(call.took / kCrowded, kOffCore);
}

// The calls to come that do without helpers, once one was crowded after `before` such calls: 1, 3, 7, ... 63.
inline unsigned next_retreat(unsigned before) noexcept { return std::min(2 * before + 1, kLongestRetreat); }

// Do without helpers for this call, where `left` such calls are to come?
inline bool retreats(unsigned left, std::int64_t since_last) noexcept { return left > 0 && since_last <= kRetreat; }

}  // namespace rnnkern
