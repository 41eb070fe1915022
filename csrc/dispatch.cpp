// Asks the CPU once which of the compiled instruction sets it runs.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>

#include "isas.h"
#include "kernel_table.h"

namespace rnnkern {

#define RNNKERN_DECLARE(name, supported) \
  namespace name {                       \
  extern const KernelTable table;        \
  }
RNNKERN_ISAS(RNNKERN_DECLARE)
#undef RNNKERN_DECLARE

namespace {

const Isa* best_allowed() noexcept {
  const char* asked = std::getenv("RNNKERN_MAX_ISA");
  const Isa* limit = asked == nullptr ? nullptr : find_isa(asked);
  const Isa* isa = limit == nullptr ? isas().data() : limit;
  while (!isa->supported && isa != &isas().back()) ++isa;
  return isa;
}

std::atomic<const Isa*>& current() noexcept {
  static std::atomic<const Isa*> isa = best_allowed();
  return isa;
}

std::atomic<bool> pairs_allowed = true;

bool has_instruction_for_pairs() noexcept {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

}  // namespace

bool multiplies_pairs(const KernelTable& table) noexcept {
  return table.has_pairs && (table.emulates_pairs || has_instruction_for_pairs()) &&
         pairs_allowed.load(std::memory_order_relaxed);
}

void allow_pairs(bool allowed) noexcept { pairs_allowed.store(allowed, std::memory_order_relaxed); }

std::span<const Isa> isas() noexcept {
#define RNNKERN_ROW(name, supported) {#name, static_cast<bool>(supported), &name::table},
  static const Isa all[] = {RNNKERN_ISAS(RNNKERN_ROW)};
#undef RNNKERN_ROW
  return all;
}

const Isa* find_isa(std::string_view name) noexcept {
  for (const Isa& isa : isas()) {
    if (isa.name == name) return &isa;
  }
  return nullptr;
}

const Isa& active() noexcept { return *current().load(std::memory_order_relaxed); }

bool use(std::string_view name) noexcept {
  const Isa* isa = find_isa(name);
  if (isa == nullptr || !isa->supported) return false;
  current().store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace rnnkern
