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

// Says whether products of bfloat16 numbers are made in pairs: where the ISA has kernels for it and the CPU the
// instruction, or where it is emulated. Results have the same bits either way.
bool multiplies_pairs(const KernelTable& table) noexcept;
// Lets them be made so, or not, from now on; for tests.
void allow_pairs(bool allowed) noexcept;

// What multiplies tiles of bfloat16 numbers: nothing, code that computes what a matrix engine does, or the engine.
enum class Engine { none, emulated, amx };

// What an ISA's kernels use: what use_engine has set where that is there, else nothing.
Engine engine(const KernelTable& table) noexcept;
// Sets it for what is packed from now on, and returns what was set before: at first what RNNKERN_AMX says, "off" or
// "emulated", else the engine.
Engine use_engine(Engine best) noexcept;

// Changes the one in use; false, and no change, when the CPU does not support it or no ISA has that name.
bool use(std::string_view name) noexcept;

}  // namespace rnnkern
