// The team: helpers that spin briefly between calls and then sleep, and the barrier of those that take part in a call.
#include "team.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <forward_list>
#include <initializer_list>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

#include "patience.h"
#include "policy.h"
#include "system.h"

namespace rnnkern {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::nanoseconds;

constexpr int kMaxThreads = 1024;
constexpr microseconds kLook{200};                 // free CPUs are asked for again this often while there are none
constexpr microseconds kOthersCheckIn{30};         // between the first of several woken helpers and the last
constexpr nanoseconds kLongestCheckIn{2'000'000};  // a woken one takes 10 to 50 us, on a virtual core up to 300
constexpr std::size_t kCacheLine = 64;

void yield() noexcept { std::this_thread::yield(); }

void run_alone(Task task, void* context) noexcept {
  Worker alone{0, 1, nullptr, [](void*) noexcept {}, -1, nullptr, yield};
  task(context, alone);
}

// The seats of a call: how many helpers it still wants in all, and how many have checked in. Equal means closed. A
// helper that finds them closed touches nothing of the call.
struct Seats {
  std::uint32_t packed;
  static Seats of(std::uint32_t wanted, std::uint32_t taken) noexcept { return {wanted << 16 | taken}; }
  std::uint32_t wanted() const noexcept { return packed >> 16; }
  std::uint32_t taken() const noexcept { return packed & 0xffff; }
  bool closed() const noexcept { return wanted() == taken(); }
};

// A helper; whoever wakes it may keep it off its own CPU until it is awake.
class Helper {
 public:
  void start() noexcept { cpus_ = ThreadCpus(); }  // called by its own thread, as the next two are; before these
  void falls_asleep() noexcept {
    const std::lock_guard lock(mutex_);
    asleep_ = true;
  }
  void wakes_up() noexcept {
    const std::lock_guard lock(mutex_);
    asleep_ = false;
    cpus_.restore();
  }
  void exclude_callers() noexcept {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock && asleep_) cpus_.exclude_callers();
  }

 private:
  std::mutex mutex_;
  bool asleep_ = false;
  ThreadCpus cpus_;
};

class Team;
thread_local Team* working = nullptr;  // on a call of this thread, with helpers

// Never destroyed: helpers may sleep in it when the process exits.
class Team {
 public:
  bool acquire() noexcept { return !busy_.exchange(true, std::memory_order_acquire); }
  void release() noexcept { busy_.store(false, std::memory_order_release); }

  // The caller has acquired the team. Runs the task on its thread alone if helpers are worth nothing to it.
  void run(Task task, void* context, const Demand& demand) noexcept {
    demand_ = demand;
    const Worth::Way way = worth_.next(demand.meetings, demand.threads);
    if (way == Worth::Way::alone) {
      run_alone(task, context);
      last_end_ = Clock::now();
      return;
    }
    Team* const before = std::exchange(working, this);
    task_ = task;
    context_ = context;
    arrivals_.store(0, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    off_core_.store(0, std::memory_order_relaxed);
    joins_at_.store(kUndecided, std::memory_order_relaxed);
    first_came_ = {};
    places_ = 0;
    const int helpers = ask();
    const Clock::time_point start = Clock::now();
    const int woken = open_seats(helpers);
    if (helpers > 0) await_helpers(start, helpers, woken);
    Worker worker{0, 1, this, barrier, kStart, nullptr, yield};
    if (way == Worth::Way::measured && helpers > 0)
      worker.admit = time_helpers;
    else if (!demand.at_places || (seats().closed() && !looks_again_))
      worker.count = let_in(kStart);
    else
      worker.admit = admit;
    work(worker);
    if (worker.count == 1) let_in(kNever);  // whoever has come by now came for nothing
    const std::uint32_t taken = seats().taken();
    for (Patience patience(yield); finished_.load(std::memory_order_acquire) != taken;) patience.wait();
    last_end_ = Clock::now();
    const Outcome outcome{nanoseconds(last_end_ - start).count(),
                          static_cast<std::int64_t>(arrivals_.load(std::memory_order_relaxed) / (taken + 1)),
                          off_core_.load(std::memory_order_relaxed)};
    const bool retreat = crowded(outcome) && runnable_threads() == 0;  // else the next call asks
    alone_ = retreat_ = retreat ? next_retreat(retreat_) : 0;
    working = before;
  }

  // In a forked child, by the thread that was at work: nobody waits any more for helpers, which are not there. Returns
  // whether the work of some is missing.
  bool abandon() noexcept {
    const bool missing = seats().taken() > 0 && joins_at_.load() >= kStart;
    seats_.store(Seats::of(0, 0).packed);
    finished_.store(0);
    looks_again_ = false;
    return missing;
  }

  std::int64_t since_last() const noexcept { return nanoseconds(Clock::now() - last_end_).count(); }

  // Takes a call away from those that are to do without helpers.
  bool retreats(std::int64_t since_last) noexcept {
    if (!rnnkern::retreats(alone_, since_last)) return false;
    --alone_;
    return true;
  }

 private:
  // Starts threads until there are as many; where the system refuses, the team stays smaller.
  void hire(int helpers) noexcept {
    if (hired_ >= helpers) return;
    const NoSignals quiet;
    try {
      for (; hired_ < helpers; ++hired_) {
        Helper& helper = helpers_.emplace_front();
        std::thread([this, &helper] { help(helper); }).detach();
      }
    } catch (...) {
    }
  }

  Seats seats() const noexcept { return {seats_.load(std::memory_order_acquire)}; }

  int awake() const noexcept { return hired_ - sleeping_.load(); }

  // Asks the policy how many helpers to call at this moment, and sees to it that there are as many.
  int ask() noexcept {
    const int runnable = worth_asking(demand_) ? runnable_threads() : 0;
    const Decision decision = decide(demand_, {online_cpus(), runnable, awake()});
    looks_again_ = decision.look_again;
    if (looks_again_) next_look_ = Clock::now() + kLook;
    hire(decision.helpers);
    return std::min(decision.helpers, hired_);
  }

  // Returns how many of the helpers it had to wake.
  int open_seats(int helpers) noexcept {
    const int woken = std::max(0, helpers - awake());
    seats_.store(Seats::of(static_cast<std::uint32_t>(helpers), 0).packed);
    if (woken == 0) return 0;
    for (Helper& helper : helpers_) helper.exclude_callers();
    for (int i = 0; i < woken; ++i) seats_.notify_one();
    return woken;
  }

  // Waits a little for helpers to take the seats. Those asleep are woken if the call is long, or if calls come so close
  // together that a helper once awake stays so.
  void await_helpers(Clock::time_point start, int helpers, int woken) noexcept {
    // A quarter of the call is well spent on a helper that comes, a twentieth is not much lost on one that does not.
    const nanoseconds for_sleepers =
        std::min(kLongestCheckIn, nanoseconds(demand_.expected_ns) / (missed_ % 8 == 0 ? 4 : 20));
    const nanoseconds for_place{wait_at_start(helpers, woken, demand_.expected_ns)};
    const Clock::time_point deadline = start + (demand_.at_places ? for_place : for_sleepers);
    for (Patience patience(yield); !seats().closed() && Clock::now() < deadline;) patience.wait();
    if (!demand_.at_places) missed_ = seats().closed() ? 0 : missed_ + 1;
  }

  // Closes the seats and lets those who have taken one begin at `place`. Returns the number of threads at work.
  int let_in(std::int64_t place) noexcept {
    Seats now = seats();
    while (!now.closed() && !seats_.compare_exchange_weak(now.packed, Seats::of(now.taken(), now.taken()).packed)) {
    }
    joins_at_.store(place, std::memory_order_release);
    return static_cast<int>(now.taken()) + 1;
  }

  // Worker::admit: lets in who has come, once all have or the first has waited long enough for the others. While the
  // cores are wanted by others nobody is asked to come.
  static void admit(Worker& worker, std::int64_t place) noexcept {
    Team& self = *static_cast<Team*>(worker.team);
    if (self.looks_again_) {
      if (Clock::now() >= self.next_look_) self.open_seats(self.ask());
      return;
    }
    const Seats now = self.seats();
    if (now.taken() == 0) return;
    if (!now.closed()) {
      const Clock::time_point time = Clock::now();
      if (self.first_came_ == Clock::time_point{}) self.first_came_ = time;
      if (time - self.first_came_ < kOthersCheckIn) return;
    }
    worker.count = self.let_in(place);
    worker.admit = nullptr;
  }

  static double ns_of_step(nanoseconds took) noexcept { return static_cast<double>(took.count()) / Worth::kSteps; }

  // Worker::admit of a call that measures: the first place is that of a block, steps follow.
  static void time_helpers(Worker& worker, std::int64_t place) noexcept {
    Team& self = *static_cast<Team*>(worker.team);
    constexpr int alone = 1, joined = alone + Worth::kSteps, warm = joined + Worth::kCold, end = warm + Worth::kSteps;
    const int now = self.places_++;
    if (now == alone || now == warm) self.timed_from_ = Clock::now();
    if (now == joined) {
      self.took_alone_ = Clock::now() - self.timed_from_;
      if (self.seats().taken() > 0 && self.seats().closed()) {
        worker.count = self.let_in(place);
      } else {
        self.worth_.tried();
        worker.admit = admit;
      }
    }
    if (now == end) {
      const nanoseconds together = Clock::now() - self.timed_from_;
      self.worth_.found(self.demand_.meetings, worker.count, ns_of_step(self.took_alone_), ns_of_step(together));
      worker.admit = nullptr;
    }
  }

  // Runs the task and notes for how long this thread was off its core.
  void work(Worker& worker) noexcept {
    const Clock::time_point start = Clock::now();
    const nanoseconds cpu_start = cpu_time();
    task_(context_, worker);
    const std::int64_t off_core = ((Clock::now() - start) - (cpu_time() - cpu_start)).count();
    std::int64_t most = off_core_.load(std::memory_order_relaxed);
    while (most < off_core && !off_core_.compare_exchange_weak(most, off_core, std::memory_order_relaxed)) {
    }
  }

  [[noreturn]] void help(Helper& self) noexcept {
    std::fesetenv(FE_DFL_ENV);  // a kernel may have started it, in which denormals are zero
    self.start();
    for (;;) {
      Seats seats = await_call(self);
      if (seats.closed() || !seats_.compare_exchange_strong(seats.packed, seats.packed + 1)) continue;
      const int index = static_cast<int>(seats.taken()) + 1;
      std::int64_t place = kUndecided;
      for (Patience patience(yield); (place = joins_at_.load(std::memory_order_acquire)) == kUndecided;)
        patience.wait();
      if (place != kNever) {
        Worker worker{index, static_cast<int>(this->seats().taken()) + 1, this, barrier, place, nullptr, yield};
        work(worker);
      }
      finished_.fetch_add(1, std::memory_order_release);
    }
  }

  // Returns with the seats of a new call, which may be closed again by the time it is acted on.
  Seats await_call(Helper& self) noexcept {
    Seats seats{seats_.load(std::memory_order_acquire)};
    const Clock::time_point deadline = Clock::now() + nanoseconds(kIdle);
    for (Patience patience(yield); seats.closed() && Clock::now() < deadline;) {
      patience.wait();
      seats.packed = seats_.load(std::memory_order_acquire);
    }
    if (!seats.closed()) return seats;
    sleeping_.fetch_add(1);
    self.falls_asleep();
    seats_.wait(seats.packed);
    sleeping_.fetch_sub(1);
    self.wakes_up();
    return Seats{seats_.load(std::memory_order_acquire)};
  }

  // Of joins_at_: helpers wait, work from the start, or go away again.
  static constexpr std::int64_t kUndecided = -3, kNever = -2, kStart = -1;

  static void barrier(void* team) noexcept { static_cast<Team*>(team)->wait_for_all(); }

  // Arrivals only count up during a call; the n-th barrier is open once they reach n times the threads.
  void wait_for_all() noexcept {
    const std::uint64_t count = Seats{seats_.load(std::memory_order_relaxed)}.taken() + 1;
    const std::uint64_t before = arrivals_.fetch_add(1, std::memory_order_acq_rel);
    const std::uint64_t open = (before / count + 1) * count;
    for (Patience patience(yield); arrivals_.load(std::memory_order_acquire) < open;) patience.wait();
  }

  std::atomic<bool> busy_ = false;
  std::forward_list<Helper> helpers_;
  // Read by helpers, once the caller that has acquired the team has offered them seats.
  Task task_ = nullptr;
  void* context_ = nullptr;
  // The caller's alone.
  int hired_ = 0;
  unsigned missed_ = 0;               // calls that are joined at the start, since all helpers came
  unsigned retreat_ = 0, alone_ = 0;  // calls to run without helpers: at the last count, and still to come
  Clock::time_point last_end_{};
  Clock::time_point first_came_{};  // of a call
  Demand demand_{};                 // of a call
  bool looks_again_ = false;        // nobody is asked to come while the CPUs are wanted by others
  Clock::time_point next_look_{};   // whether they still are
  Worth worth_;
  int places_ = 0;  // of a call that measures, which worker 0 has come to; and what it has seen so far
  Clock::time_point timed_from_{};
  nanoseconds took_alone_{};
  alignas(kCacheLine) std::atomic<std::uint32_t> seats_ = 0;
  std::atomic<int> sleeping_ = 0;
  alignas(kCacheLine) std::atomic<std::uint64_t> arrivals_ = 0;
  std::atomic<std::uint32_t> finished_ = 0;
  std::atomic<std::int64_t> joins_at_ = kUndecided;
  std::atomic<std::int64_t> off_core_ = 0;  // ns, of the thread that was off its core for longest
};

std::atomic<Team*> the_team = nullptr;

std::atomic<unsigned> fork_count = 0;
thread_local bool lost = false;

// A forked child has none of the parent's helpers: it leaves the parent's team as it is and makes its own.
[[maybe_unused]] const bool at_fork = call_in_children([] {
  the_team.store(nullptr);
  fork_count.fetch_add(1);
  if (working != nullptr) lost = working->abandon();
});

// Null only when there is no memory.
Team* get_team() noexcept {
  Team* team = the_team.load(std::memory_order_acquire);
  if (team != nullptr) return team;
  Team* fresh = new (std::nothrow) Team;
  if (the_team.compare_exchange_strong(team, fresh)) return fresh;
  delete fresh;
  return team;
}

std::atomic<int> thread_limit = 1;  // until Python says how many cores there are
thread_local int caller_limit = kMaxThreads;

}  // namespace

int num_threads() noexcept { return std::min(thread_limit.load(std::memory_order_relaxed), caller_limit); }

int limit_caller(int count) noexcept { return std::exchange(caller_limit, std::clamp(count, 1, kMaxThreads)); }

void set_num_threads(int count) noexcept {
  thread_limit.store(std::clamp(count, 1, kMaxThreads), std::memory_order_relaxed);
}

void run_team(Task task, void* context, const Demand& demand) noexcept {
  const int threads = demand.threads > 1 ? std::min(demand.threads, num_threads()) : 1;
  Team* const team = threads > 1 ? get_team() : nullptr;
  if (team == nullptr || !team->acquire()) return run_alone(task, context);
  Demand now = demand;
  now.threads = threads, now.since_last = team->since_last();
  if (team->retreats(now.since_last))
    run_alone(task, context);
  else
    team->run(task, context, now);
  team->release();
}

bool lost_helpers() noexcept { return std::exchange(lost, false); }

unsigned forks() noexcept { return fork_count.load(std::memory_order_relaxed); }

}  // namespace rnnkern

// For threadpoolctl, which finds them by name in the loaded module.
extern "C" {
[[gnu::visibility("default")]] int rnnkern_get_num_threads() { return rnnkern::num_threads(); }
[[gnu::visibility("default")]] void rnnkern_set_num_threads(int count) { rnnkern::set_num_threads(count); }
}
