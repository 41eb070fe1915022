// What a task running on the thread team is told about itself; plain data, so that code compiled per ISA may include
// it.
#pragma once

#include <cstdint>

namespace rnnkern {

struct Worker {
  int index;  // 0 <= index < count; 0 is the calling thread
  int count;  // threads taking part in this call
  void* team;
  void (*wait)(void* team) noexcept;  // returns once all `count` threads have called it; does nothing if count is 1

  // For tasks that helpers may join on the way. Such a task counts the places where they can, from 0 and alike on all
  // threads. A helper works from place `joins_at` on and skips what comes before; -1: it is there from the start.
  // While helpers may still come, worker 0 calls `admit` at each place; it sets the new count, and itself to null in
  // the end.
  std::int64_t joins_at;
  void (*admit)(Worker& self, std::int64_t place) noexcept;

  void (*yield)() noexcept = nullptr;  // gives the core to whoever else wants it, for a task that waits on its own
};

using Task = void (*)(void* context, Worker& worker) noexcept;

}  // namespace rnnkern
