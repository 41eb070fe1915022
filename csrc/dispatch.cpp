// Asks the CPU once which of the compiled instruction sets it runs.
#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Intel's takes twice the time of the multiply-adds that it stands for.
bool has_instruction_for_pairs() noexcept {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel");
  return has;
#else
  return false;
#endif
}

// Says which matrix engine the CPU has for bfloat16, if the system lets this process use it, for which it is asked
// once, before any thread does.
Engine engine_of_cpu() noexcept {
#if defined(__x86_64__) && defined(__linux__)
  static const Engine found = [] {
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, amx_fp16 = 1u << 21;
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (~d & (amx_bf16 | amx_tile)) != 0 ||
        syscall(SYS_arch_prctl, request_permission, tile_data) != 0)
      return Engine::none;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & amx_fp16) != 0 ? Engine::amx_fp16 : Engine::amx;
  }();
  return found;
#else
  return Engine::none;
#endif
}

std::atomic<Engine>& best_engine() noexcept {
  static std::atomic<Engine> best = [] {
    const char* const asked = std::getenv("RNNKERN_AMX");
    const std::string_view name = asked ? asked : "";
    return name == "off"             ? Engine::pairs
           : name == "emulated"      ? Engine::emulated
           : name == "emulated-fp16" ? Engine::emulated_fp16
                                     : Engine::amx_fp16;
  }();
  return best;
}

}  // namespace

Engine engine(const KernelTable& table) noexcept {
  const Engine best = best_engine().load(std::memory_order_relaxed);
  if (best >= Engine::amx && table.has_tiles && engine_of_cpu() != Engine::none) return std::min(best, engine_of_cpu());
  if (best >= Engine::emulated && best < Engine::amx && table.has_pairs) return best;
  const bool has_pairs = table.has_pairs && (table.emulates_pairs || has_instruction_for_pairs());
  return has_pairs && best != Engine::none ? Engine::pairs : Engine::none;
}

Engine use_engine(Engine best) noexcept { return best_engine().exchange(best, std::memory_order_relaxed); }

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
