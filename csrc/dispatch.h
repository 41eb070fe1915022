// The compiled instruction sets and the choice among them.
#pragma once

#include <span>
#include <string_view>

namespace rnnkern {

struct KernelTable;

struct Isa {
  const char* name;
  bool supported;  // by the CPU this process runs on
  const KernelTable* table;
};

// All that were compiled, best first. The last is what every supported CPU has; where even that one is not supported
// the module must refuse to load.
std::span<const Isa> isas() noexcept;

// The one of that name, null where none was compiled.
const Isa* find_isa(std::string_view name) noexcept;

// The one in use: at first the best supported one that is not above RNNKERN_MAX_ISA, which is without effect where it
// names none.
const Isa& active() noexcept;

// What multiplies bfloat16 numbers, the best last: multiply-adds of floats; the instruction for pairs, of the CPU or
// emulated; code that computes what a matrix engine does; the engine; of both such that multiply float16 numbers too.
// The first two give the same bits, and so does an engine as its emulation.
enum class Engine { none, pairs, emulated, emulated_fp16, amx, amx_fp16 };

// The best one that an ISA's kernels and the CPU have, no better than what use_engine has set.
Engine engine(const KernelTable& table) noexcept;
// Sets it for what is packed from now on, and returns what was set before: at first what RNNKERN_AMX says, "off",
// "emulated" or "emulated-fp16", else the engine with all that it has.
Engine use_engine(Engine best) noexcept;

// Changes the one in use; false, and no change, when the CPU does not support it or no ISA has that name.
bool use(std::string_view name) noexcept;

}  // namespace rnnkern
