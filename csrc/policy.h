// All that is decided about threads: how a call is divided among them, and how many helpers are asked for; how many a
// process has is said by python/rnnkern/cores.py. Functions of sizes, counts and times alone; network.h and team.cpp
// ask them and do what they say.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernel_table.h"

namespace rnnkern {

// Of one core, within a factor of two: they only weigh work against the cost of waking and waiting.
constexpr double kFlopsPerNs = 30, kWakeNs = 15'000;

// Where W_hh exceeds the private cache, each thread that has rows of its own streams all of it in every step; threads
// that share the units stream it once in all. With fewer rows than this to a thread that costs more than the barrier:
// on two cores of a Zen 4 server units take 0.81 to 0.93 of the time of rows for LSTM 1024 and 4 to 24 rows to a
// thread, and 0.95 to 1.02 for LSTM and GRU of 512 units. What it is on an engine is not known.
constexpr std::int64_t kRowsToStream = 32;

// Threads add to one counter at a barrier, one after the other: to each of them it costs so much, where its work gets
// shorter by ever less. As many meet as take the shortest time in all.
constexpr double kMeetingNs = 375;

// A helper that only takes part in the sums over rows fetches every gradient of a gate from the core that has made it,
// and multiplies it with so many elements of x and h. On two cores of a Zen 4 server, one vector of rows, backward on
// two threads and on one, cores near and far: LSTM of 8 units and 8 inputs 0.88 and 1.15 to 1.5 of the time, of GRU 2
// and 2 inputs 0.96 and 1.0 to 1.4, GRU of 8 units and 80 inputs 0.74 and 0.84 to 1.08.
constexpr std::int64_t kWorthCrossing = 48;

// Why a block has so many steps.
enum class BlockReason : int {
  cache,      // the gates of a thread's part stay in its private cache
  weights,    // enough rows to pay for reading W_ih, which the private cache does not hold
  gradients,  // enough rows to pay for reading and writing the gradients of the weights
  joining,    // a helper that comes late can join at the next block
  layers,     // the layer above can begin
  call,       // there are no more
};

// The barriers of a call whose threads meet in each step. Times are those that one thread is expected to take.
struct Meetings {
  double step_ns = 0;       // with its share of the sums over all steps; 0: they do not meet so
  double recurrent_ns = 0;  // without
  std::int64_t steps = 0;   // one behind the other
  int a_step = 1;
};

// What a call asks of the team.
struct Demand {
  int threads;  // that it can use, the caller among them
  std::int64_t expected_ns;
  bool at_places = false;  // helpers may join it on its way, see worker.h, and not only at its start
  Meetings meetings{};
  std::int64_t since_last = 0;  // ns, from the end of the call before
};

// How a call is divided: among how many threads, by rows, units or layers, and in blocks of how many steps. Results do
// not depend on it, only the time.
struct Plan : Demand {
  Split split;
  std::int64_t block_steps, part_steps;  // part_steps: of a block, after which backward hands on what it has of dx
  BlockReason reason;
  std::int64_t rows_together;  // those of one thread once all have come; all where threads do not divide them
};

struct PlanInput {
  std::int64_t steps, batch, rows;  // rows: of all steps that sequences have
  std::int64_t inputs, hidden, outputs, layer_count, directions;
  std::int64_t row_grain;  // rows that one thread works on together
  int gates, saved, max_threads;
  std::int64_t element_bytes, weight_bytes;  // of a state and of a packed weight
  std::int64_t private_cache;                // bytes, of a core
  bool backward;
  bool masked;  // dropout between the layers

  std::int64_t layers() const { return layer_count * directions; }
};

// Layers and directions side by side: the directions of a layer are independent of each other, and a layer follows the
// one below a block of steps behind it.
struct SideBySide {
  int threads;
  std::int64_t parts;  // of the steps, so that no layer waits long for the next
  double gain;         // against one thread
};

inline SideBySide side_by_side(const PlanInput& in) noexcept {
  const std::int64_t at_once = in.directions > 1 ? in.directions : in.layer_count;
  const std::int64_t threads = std::min<std::int64_t>(in.max_threads, at_once);
  if (threads < 2 || in.masked) return {1, 1, 1};
  if (in.directions > 1) return {static_cast<int>(threads), 1, static_cast<double>(threads)};
  const std::int64_t parts = std::clamp<std::int64_t>(std::min(in.steps, in.steps * in.batch / 12), 1, 8);
  const std::int64_t rounds = (in.layer_count + threads - 1) / threads;
  // In times of a layer. Each begins a part behind the one below it: in a single part, as the step of a stream is, one
  // comes after the other.
  const auto behind = [&](std::int64_t layers) { return static_cast<double>(layers) / static_cast<double>(parts); };
  const double took = std::max(static_cast<double>(rounds) + behind(threads - 1), 1 + behind(in.layer_count - 1));
  return {static_cast<int>(threads), parts, static_cast<double>(in.layer_count) / took};
}

inline Plan make_plan(const PlanInput& in) {
  const auto rows = static_cast<double>(in.rows);
  const double weights = static_cast<double>(in.gates) * static_cast<double>(in.hidden) *
                         static_cast<double>(in.inputs + in.outputs) * static_cast<double>(in.layers());
  const double total_ns =
      rows * (weights * (in.backward ? 4 : 2) / kFlopsPerNs + static_cast<double>(in.layers()) * 20);
  const double step_ns = total_ns / static_cast<double>(std::max<std::int64_t>(in.steps * in.layers(), 1));

  const int meetings_a_step = in.backward ? 2 : 1;

  Plan plan{{in.max_threads, 0, true}, Split::rows, 1, 1, BlockReason::cache, in.batch};
  SideBySide side{};
  const std::int64_t recurrent_bytes = in.gates * in.hidden * in.outputs * in.weight_bytes;
  const std::int64_t fewest_rows = recurrent_bytes > in.private_cache ? kRowsToStream : 1;  // of a step and a thread
  if (in.row_grain > 1) {
    // Backward divides its sums over rows whatever the steps divide.
    if (!in.backward || in.inputs + in.outputs < kWorthCrossing)
      plan.threads =
          static_cast<int>(std::clamp<std::int64_t>((in.batch + in.row_grain - 1) / in.row_grain, 1, plan.threads));
  } else if (in.rows < in.steps * plan.threads * fewest_rows) {
    // Sharing units costs a barrier a step and the other half of h from another core. Measured on two cores of a Zen 4
    // server, B = 1, AVX2 and AVX-512, against one thread, by the step of this estimate: RNN 64 loses a tenth (0.6 us
    // forward, 1.1 backward), GRU 32 a fifth (0.4); GRU 64 gains 1.15x to 1.7x (1.7, 3.3), LSTM 64 1.2x to 1.6x (2.2,
    // 4.4), GRU 128 1.7x (6.5, 13), LSTM 256 2.0x.
    const double meeting_ns = kMeetingNs * meetings_a_step;  // of each thread
    const auto meet = static_cast<int>(std::lround(std::sqrt(step_ns / meeting_ns)));
    plan.split = Split::units, plan.threads = std::clamp(meet, std::min(2, in.max_threads), in.max_threads);
    double gain = step_ns / (step_ns / plan.threads + meeting_ns * plan.threads);
    // Threads with a row or more of their own meet nowhere.
    const double rows_of_step = fewest_rows > 1 ? 1 : rows / static_cast<double>(std::max<std::int64_t>(in.steps, 1));
    const double own = std::clamp<double>(rows_of_step, 1, in.max_threads);
    if (own >= gain) plan.split = Split::rows, plan.threads = static_cast<int>(own), gain = own;
    side = side_by_side(in);
    if (side.gain > gain) plan.split = Split::layers, plan.threads = side.threads;
  }
  if (total_ns < 2 * kWakeNs) plan.threads = 1;
  plan.expected_ns = static_cast<std::int64_t>(std::min(total_ns / plan.threads, 1e15));

  // A thread's part of a block stays in a quarter of the private cache.
  const std::int64_t block_bytes = in.private_cache / 4;
  const std::int64_t values = in.backward ? in.gates : std::max(in.gates, in.saved);
  const std::int64_t row_bytes = values * in.hidden * in.element_bytes;
  const int sharers = plan.split == Split::layers ? 1 : plan.threads;
  std::int64_t block_rows = block_bytes * sharers / std::max<std::int64_t>(row_bytes, 1);
  // A block of backward reads and writes the whole gradient of the weights, and one of forward reads all of W_ih: at
  // least enough rows to pay for that where the private cache does not hold it, though the gates of so many rows leave
  // it too. On one thread of a Zen 4 server LSTM 1536, B = 8 takes 0.74 of the time of blocks of one step.
  const std::int64_t widest = std::max(in.inputs, in.layer_count > 1 ? in.directions * in.outputs : 0);
  const bool streams = in.backward || in.gates * in.hidden * widest * in.weight_bytes > in.private_cache;
  if (streams && block_rows < 256)
    block_rows = 256, plan.reason = in.backward ? BlockReason::gradients : BlockReason::weights;
  block_rows = std::clamp<std::int64_t>(block_rows, 1, 4096);
  // A helper that was asleep comes some 30 to 100 us late. It can join forward at each block, so that the first one
  // must not be half of the call; backward spends more time in steps.
  const std::int64_t until_helped = std::max<std::int64_t>(in.steps * in.batch / 8, 48);
  if (!in.backward && plan.threads > 1 && block_rows > until_helped)
    block_rows = until_helped, plan.reason = BlockReason::joining;
  const auto steps_of = [&](std::int64_t rows) {
    return std::clamp<std::int64_t>(rows / std::max<std::int64_t>(in.batch, 1), 1, std::max<std::int64_t>(in.steps, 1));
  };
  plan.block_steps = plan.part_steps = steps_of(block_rows);
  if (plan.split == Split::layers && plan.threads > 1) {
    plan.part_steps = std::min(plan.block_steps, steps_of(in.steps * in.batch / side.parts + 1));
    if (!in.backward && plan.part_steps < plan.block_steps)  // forward hands on whole blocks
      plan.block_steps = plan.part_steps, plan.reason = BlockReason::layers;
  }
  if (plan.block_steps >= in.steps) plan.reason = BlockReason::call;
  if (plan.split == Split::units && plan.threads > 1)
    plan.meetings = {step_ns, static_cast<double>(2 * in.gates * in.hidden * in.outputs) / kFlopsPerNs + 20,
                     plan.part_steps, meetings_a_step};
  const bool divides = plan.split == Split::rows && plan.threads > 1 && in.row_grain == 1;
  if (divides) plan.rows_together = (in.batch + plan.threads - 1) / plan.threads;
  return plan;
}

inline Demand divide_section(double total_ns, double worth_help_ns, int max_threads) noexcept {
  const int threads = total_ns < worth_help_ns ? 1 : max_threads;
  return {threads, static_cast<std::int64_t>(total_ns / threads)};
}

// Packing moves about four bytes a nanosecond.
inline double packing_ns(std::int64_t bytes) noexcept { return static_cast<double>(bytes) / 4; }
inline Demand divide_packing(std::int64_t bytes, int max_threads) noexcept {
  return divide_section(packing_ns(bytes), 10'000, max_threads);
}

inline Demand divide_linear(double flops, int max_threads) noexcept {
  return divide_section(flops / kFlopsPerNs, 2 * kWakeNs, max_threads);
}

// Squares take about four elements a nanosecond.
inline Demand divide_squares(double elements, int max_threads) noexcept {
  return divide_section(elements / 4, 2 * kWakeNs, max_threads);
}

// Helpers, of which a call asks for some.
constexpr std::int64_t kIdle = 50'000;          // ns; a helper without work sleeps after this
constexpr std::int64_t kWorthWaking = 100'000;  // ns; waking a sleeping helper costs the caller up to 10 us
constexpr std::int64_t kWorthAsking = 50'000;   // ns; to ask which CPUs are free takes a microsecond

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
// help is worth. Where that is not known, as where the caller may not run on all CPUs, all are asked that are wanted.
// Those that sleep are woken one after the other, as many as make the call shortest in all: at least one, which calls
// that come close together keep awake.
inline Decision decide(const Demand& call, const Supply& supply) noexcept {
  const bool wake = call.expected_ns >= kWorthWaking || call.since_last < kIdle;
  const double work_ns = static_cast<double>(call.expected_ns) * call.threads;
  const int worth_waking = wake ? std::max(1, static_cast<int>(std::lround(std::sqrt(work_ns / kWakeNs))) - 1) : 0;
  const int wanted = std::min(call.threads - 1, std::max(supply.awake, worth_waking));
  if (supply.runnable == 0) return {wanted, false};
  const int room = std::max(0, supply.cpus - supply.runnable + supply.awake);
  return {std::min(wanted, room), wanted > 0 && room == 0};
}

// How long, in ns, a call waits at its start for its helpers, of which `woken` slept. Those that are awake come within
// a microsecond or two each. Those that sleep take 10 to 50 us, on a virtual core up to 300; without them one thread
// does the first block, an eighth of all work, so that it pays to wait for several of them, and not for one.
inline std::int64_t wait_at_start(int helpers, int woken, std::int64_t expected_ns) noexcept {
  constexpr std::int64_t kLongest = 300'000;
  const std::int64_t awake =
      std::clamp<std::int64_t>(expected_ns / 20, 2'000, std::clamp<std::int64_t>(2'000 * helpers, 2'000, kLongest));
  return woken < 2 ? awake : std::clamp<std::int64_t>((helpers - 1) * expected_ns / 32, awake, kLongest);
}

// Where steps are short it hangs on how far apart the cores are whether helpers are worth their barriers: LSTM 64, B =
// 1 takes 0.74 of the time of one thread on two near cores of a virtual machine and 1.66 on two far ones, and which it
// runs on changes. So it is measured: now and then some calls of forward make steps alone before they let their helpers
// in. What a barrier costs then decides for steps of any size, and for backward, lest helpers fall asleep between the
// two; there the rows that a thread reads are those that another has written, so that steps measure less than it costs.
class Worth {
 public:
  static constexpr int kSteps = 8, kCold = 4;            // that are timed, and those of new helpers that are not
  static constexpr int kLeast = 2 * kSteps + kCold + 1;  // steps that a call needs to measure

  enum class Way { alone, together, measured };
  // Says how the next call goes, of so many threads.
  Way next(const Meetings& meetings, int threads) noexcept {
    if (meetings.step_ns == 0 || meetings.step_ns > kLong) return Way::together;
    if (rests_ > 0)
      --rests_;
    else if (meetings.a_step == 1 && meetings.steps >= kLeast)
      return Way::measured;
    else if (tried_ > 0)
      return Way::together;
    const double saved_ns = pace_ * meetings.step_ns * (1 - 1.0 / threads);
    return saved_ns < kMargin * meetings.a_step * threads * meeting_ns_ ? Way::alone : Way::together;
  }
  // Notes what a call of so many threads took for a step, alone and with its helpers.
  void found(const Meetings& meetings, int threads, double alone_ns, double together_ns) noexcept {
    paces_[found_] = alone_ns / meetings.recurrent_ns;
    meetings_ns_[found_] = (together_ns - alone_ns / threads) / threads;
    if (++found_ == kOdd) {
      std::ranges::sort(meetings_ns_);
      pace_ = std::ranges::min(paces_), meeting_ns_ = meetings_ns_[kOdd / 2];
    }
    tried();
  }
  // Notes that a call was to measure, also where its helpers came too late for that.
  void tried() noexcept {
    if (found_ < kOdd && ++tried_ < kTries) return;
    found_ = tried_ = 0;
    rests_ = kRests;
  }

 private:
  static constexpr double kLong = 16'000;  // ns; a longer step is worth it on any two cores
  static constexpr double kMargin = 1.5;   // what a barrier costs, rows from another core with it, to its time alone
  static constexpr int kOdd = 3;           // measurements, the middle one of which decides
  static constexpr int kTries = 24;        // calls; a helper that has to wake up misses some
  static constexpr int kRests = 1'000;     // calls from one time to the next

  double paces_[kOdd] = {}, meetings_ns_[kOdd] = {};
  double pace_ = 1, meeting_ns_ = 0;  // pace: of one thread, in expected times; meeting: of a barrier, for each thread
  int found_ = 0, tried_ = 0, rests_ = 0;
};

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

// Says whether to do without helpers for this call, where `left` such calls are to come.
inline bool retreats(unsigned left, std::int64_t since_last) noexcept { return left > 0 && since_last <= kRetreat; }

}  // namespace rnnkern
