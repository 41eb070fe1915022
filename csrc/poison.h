// What the address sanitizer is told of scratch memory, which holds many arrays; nothing elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace rnnkern {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr std::int64_t kBetweenArrays = 64;  // bytes that nobody may touch
inline void poison(void* data) noexcept { ASAN_POISON_MEMORY_REGION(data, kBetweenArrays); }
inline void unpoison(void* data, std::int64_t bytes) noexcept {
  ASAN_UNPOISON_MEMORY_REGION(data, static_cast<std::size_t>(bytes));
}
#else
constexpr std::int64_t kBetweenArrays = 0;
inline void poison(void*) noexcept {}
inline void unpoison(void*, std::int64_t) noexcept {}
#endif

}  // namespace
}  // namespace rnnkern
