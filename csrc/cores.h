// How many threads can run at once in this process.
#pragma once

namespace rnnkern {

// The physical cores among the CPUs that scheduling affinity allows, no more than the cgroup's CPU quota (rounded up);
// at least 1.
int usable_cores();

}  // namespace rnnkern
