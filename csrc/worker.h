// What a task running on the thread team is told about itself; plain data, so that code compiled per ISA may include
// it.
#pragma once

namespace rnnkern {

struct Worker {
  int index;  // 0 <= index < count; 0 is the calling thread
  int count;  // threads taking part in this call
  void* team;
  void (*wait)(void* team) noexcept;  // returns once all `count` threads have called it; does nothing if count is 1
};

using Task = void (*)(void* context, const Worker& worker) noexcept;

}  // namespace rnnkern
