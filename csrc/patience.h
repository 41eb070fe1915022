// Waiting for another thread; for code of one ISA and of none.
#pragma once

namespace rnnkern {
namespace {

// Waiting that costs nothing while it is short, and leaves the core to whoever else needs it when it is long.
class Patience {
 public:
  explicit Patience(void (*yield)() noexcept) noexcept : yield_(yield) {}

  void wait() noexcept {
    if (spins_ == kSpins) {
      yield_();
      return;
    }
    ++spins_;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

 private:
  static constexpr int kSpins = 50;  // 1 to 2 us, longer than threads with equal shares wait for each other

  void (*yield_)() noexcept;
  int spins_ = 0;
};

}  // namespace
}  // namespace rnnkern
