// The team of threads that shares the work of one call.
#pragma once

#include <cstdint>

#include "worker.h"

namespace rnnkern {

struct Demand;

// Runs task(context, worker) once on each of worker.count <= demand.threads threads, the calling one among them, and
// returns when all are done. Helpers that are asleep are woken; the call goes on without those that do not come in
// time: a fraction of what it is expected to take where they can join only at the start. A call that finds the team at
// work for another caller runs on its own thread alone. Results must therefore not depend on worker.count.
void run_team(Task task, void* context, const Demand& demand) noexcept;

// Is the work of helpers missing in the call that this thread is in, since the process was forked meanwhile? Says so
// once. Such a call ends as if all had taken part; whoever made it has to give it up.
bool lost_helpers() noexcept;

// How many forks led from the process that loaded this module to this one.
unsigned forks() noexcept;

// The upper bound on the threads of a call, at least 1. At first 1; see python/rnnkern/cores.py.
int num_threads() noexcept;

// Values below 1 count as 1.
void set_num_threads(int count) noexcept;

// Bounds the calls of this thread alone, until the next such call. Returns the bound before.
int limit_caller(int count) noexcept;

}  // namespace rnnkern
