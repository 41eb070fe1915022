// The vector type of one ISA and the few operations on it that the kernels need.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define RNNKERN_INLINE __attribute__((always_inline)) inline
#define RNNKERN_INLINE_LAMBDA __attribute__((always_inline))

namespace rnnkern {
namespace {

#if defined(__AVX512F__)
constexpr std::size_t kNativeBytes = 64;
constexpr bool kHasFma = true, kHasMinMax = true, kHasMaskedMoves = true;
#elif defined(__AVX2__)
constexpr std::size_t kNativeBytes = 32;
constexpr bool kHasFma = true, kHasMinMax = true, kHasMaskedMoves = true;
#elif defined(__x86_64__)
constexpr std::size_t kNativeBytes = 16;
constexpr bool kHasFma = false, kHasMinMax = true, kHasMaskedMoves = false;
#else
constexpr std::size_t kNativeBytes = 16;
constexpr bool kHasFma = true, kHasMinMax = false, kHasMaskedMoves = false;
#endif

// More bytes than native work too, in parts: the code of a wide ISA can be tested on a machine without it.
#if defined(RNNKERN_VECTOR_BYTES)
constexpr int kVectorBytes = RNNKERN_VECTOR_BYTES;
#else
constexpr int kVectorBytes = static_cast<int>(kNativeBytes);
#endif

// On x86 it follows the width, so that a tile has its real shape in such a test.
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = kVectorBytes == 64 ? 32 : 16;
#endif

template <class T, std::size_t bytes>
struct Vector {
  typedef T Type __attribute__((vector_size(bytes)));
};
template <class T>
using Vec = typename Vector<T, kVectorBytes>::Type;
using F32 = Vec<float>;
using F64 = Vec<double>;
using NativeF32 = Vector<float, kNativeBytes>::Type;
using NativeF64 = Vector<double, kNativeBytes>::Type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class V>
using Scalar = decltype(+V{}[0]);
template <class V>
using Mask = decltype(V{} < V{});  // signed integers of the element's size: all ones or zero
template <class V>
constexpr bool kIsNative = sizeof(V) == kNativeBytes;

// Keeps v in a register: what was loaded is not loaded again.
template <class V>
RNNKERN_INLINE void pin(V& v) noexcept {
#if defined(__x86_64__)
  if constexpr (kIsNative<V>) asm("" : "+v"(v));
#elif defined(__aarch64__)
  if constexpr (kIsNative<V>) asm("" : "+w"(v));
#endif
}

// An IEEE type: 2^n has the bits (n + bias) << mantissa_bits; x + round_shift has no bits below one.
template <class T>
struct Ieee;
template <>
struct Ieee<float> {
  using Bits = std::uint32_t;
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float round_shift = 0x1.8p23f;
};
template <>
struct Ieee<double> {
  using Bits = std::uint64_t;
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double round_shift = 0x1.8p52;
};
template <class V>
using BitsOf = typename Vector<typename Ieee<Scalar<V>>::Bits, sizeof(V)>::Type;

// What vector extensions cannot express, or not as well: min as a comparison often becomes two instructions. x86
// returns the second operand when either is NaN, hence the swaps. Without a mask GCC 12 warns of its own 512-bit min
// and max.
#if defined(__AVX512F__)
RNNKERN_INLINE NativeF32 native_min(NativeF32 a, NativeF32 b) noexcept { return _mm512_maskz_min_ps(0xffff, b, a); }
RNNKERN_INLINE NativeF64 native_min(NativeF64 a, NativeF64 b) noexcept { return _mm512_maskz_min_pd(0xff, b, a); }
RNNKERN_INLINE NativeF32 native_max(NativeF32 a, NativeF32 b) noexcept { return _mm512_maskz_max_ps(0xffff, b, a); }
RNNKERN_INLINE NativeF64 native_max(NativeF64 a, NativeF64 b) noexcept { return _mm512_maskz_max_pd(0xff, b, a); }
RNNKERN_INLINE NativeF32 native_fma(NativeF32 a, NativeF32 b, NativeF32 c) noexcept { return _mm512_fmadd_ps(a, b, c); }
RNNKERN_INLINE NativeF64 native_fma(NativeF64 a, NativeF64 b, NativeF64 c) noexcept { return _mm512_fmadd_pd(a, b, c); }
RNNKERN_INLINE unsigned first_lanes(int n) noexcept { return (1u << n) - 1; }
RNNKERN_INLINE NativeF32 native_load(const float* source, int n) noexcept {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(n)), source);
}
RNNKERN_INLINE NativeF64 native_load(const double* source, int n) noexcept {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(n)), source);
}
RNNKERN_INLINE void native_store(float* target, NativeF32 v, int n) noexcept {
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>(first_lanes(n)), v);
}
RNNKERN_INLINE void native_store(double* target, NativeF64 v, int n) noexcept {
  _mm512_mask_storeu_pd(target, static_cast<__mmask8>(first_lanes(n)), v);
}
#elif defined(__AVX2__)
RNNKERN_INLINE NativeF32 native_min(NativeF32 a, NativeF32 b) noexcept { return _mm256_min_ps(b, a); }
RNNKERN_INLINE NativeF64 native_min(NativeF64 a, NativeF64 b) noexcept { return _mm256_min_pd(b, a); }
RNNKERN_INLINE NativeF32 native_max(NativeF32 a, NativeF32 b) noexcept { return _mm256_max_ps(b, a); }
RNNKERN_INLINE NativeF64 native_max(NativeF64 a, NativeF64 b) noexcept { return _mm256_max_pd(b, a); }
RNNKERN_INLINE NativeF32 native_fma(NativeF32 a, NativeF32 b, NativeF32 c) noexcept { return _mm256_fmadd_ps(a, b, c); }
RNNKERN_INLINE NativeF64 native_fma(NativeF64 a, NativeF64 b, NativeF64 c) noexcept { return _mm256_fmadd_pd(a, b, c); }
RNNKERN_INLINE __m256i first_floats(int n) noexcept {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
RNNKERN_INLINE __m256i first_doubles(int n) noexcept {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
RNNKERN_INLINE NativeF32 native_load(const float* source, int n) noexcept {
  return _mm256_maskload_ps(source, first_floats(n));
}
RNNKERN_INLINE NativeF64 native_load(const double* source, int n) noexcept {
  return _mm256_maskload_pd(source, first_doubles(n));
}
RNNKERN_INLINE void native_store(float* target, NativeF32 v, int n) noexcept {
  _mm256_maskstore_ps(target, first_floats(n), v);
}
RNNKERN_INLINE void native_store(double* target, NativeF64 v, int n) noexcept {
  _mm256_maskstore_pd(target, first_doubles(n), v);
}
#elif defined(__x86_64__)
RNNKERN_INLINE NativeF32 native_min(NativeF32 a, NativeF32 b) noexcept { return _mm_min_ps(b, a); }
RNNKERN_INLINE NativeF64 native_min(NativeF64 a, NativeF64 b) noexcept { return _mm_min_pd(b, a); }
RNNKERN_INLINE NativeF32 native_max(NativeF32 a, NativeF32 b) noexcept { return _mm_max_ps(b, a); }
RNNKERN_INLINE NativeF64 native_max(NativeF64 a, NativeF64 b) noexcept { return _mm_max_pd(b, a); }
#elif defined(__aarch64__)
RNNKERN_INLINE NativeF32 native_fma(NativeF32 a, NativeF32 b, NativeF32 c) noexcept { return vfmaq_f32(c, a, b); }
RNNKERN_INLINE NativeF64 native_fma(NativeF64 a, NativeF64 b, NativeF64 c) noexcept { return vfmaq_f64(c, a, b); }
#endif

template <class V>
RNNKERN_INLINE V zero() noexcept {
  return V{};
}
template <class V>
RNNKERN_INLINE V set(Scalar<V> value) noexcept {
  return value - V{};  // a sum would lose the sign of -0
}
template <class V>
RNNKERN_INLINE V load(const Scalar<V>* source) noexcept {
  V v;
  std::memcpy(&v, source, sizeof v);
  return v;
}
template <class V>
RNNKERN_INLINE void store(Scalar<V>* target, V v) noexcept {
  std::memcpy(target, &v, sizeof v);
}

// The first `count` lanes, 0 <= count <= lanes; load_some gives zero in the others. Memory past them is not touched.
template <class V>
RNNKERN_INLINE V load_some(const Scalar<V>* source, int count) noexcept {
  if (count == kLanes<Scalar<V>>) return load<V>(source);
  if constexpr (kIsNative<V> && kHasMaskedMoves) {
    return native_load(source, count);
  } else {
    V v{};
    std::memcpy(&v, source, static_cast<std::size_t>(count) * sizeof *source);
    return v;
  }
}
template <class V>
RNNKERN_INLINE void store_some(Scalar<V>* target, V v, int count) noexcept {
  if (count == kLanes<Scalar<V>>)
    store(target, v);
  else if constexpr (kIsNative<V> && kHasMaskedMoves)
    native_store(target, v, count);
  else
    std::memcpy(target, &v, static_cast<std::size_t>(count) * sizeof *target);
}

// Exchanges element l of rows[i] and element i of rows[l], by swapping ever smaller blocks off the diagonal.
template <class V, int distance, std::size_t... lane>
RNNKERN_INLINE void swap_blocks(V& a, V& b, std::index_sequence<lane...>) noexcept {
  constexpr int lanes = sizeof...(lane), d = distance;
  const V first =
      __builtin_shufflevector(a, b, (static_cast<int>(lane) & d ? lanes - d : 0) + static_cast<int>(lane)...);
  b = __builtin_shufflevector(a, b, (static_cast<int>(lane) & d ? lanes : d) + static_cast<int>(lane)...);
  a = first;
}
template <class V, int distance = kLanes<Scalar<V>> / 2>
RNNKERN_INLINE void transpose(V* rows) noexcept {
  constexpr int lanes = kLanes<Scalar<V>>;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i)
    if ((i & distance) == 0) swap_blocks<V, distance>(rows[i], rows[i + distance], std::make_index_sequence<lanes>());
  if constexpr (distance > 1) transpose<V, distance / 2>(rows);
}

// a * b + c, with one rounding where the ISA has FMA.
template <class V>
RNNKERN_INLINE V fma(V a, V b, V c) noexcept {
  if constexpr (!kHasFma) {
    return a * b + c;
  } else if constexpr (kIsNative<V>) {
    return native_fma(a, b, c);
  } else {
    using Native = typename Vector<Scalar<V>, kNativeBytes>::Type;
    Native x[sizeof(V) / kNativeBytes], y[sizeof(V) / kNativeBytes], z[sizeof(V) / kNativeBytes];
    std::memcpy(x, &a, sizeof a), std::memcpy(y, &b, sizeof b), std::memcpy(z, &c, sizeof c);
    for (std::size_t part = 0; part < sizeof(V) / kNativeBytes; ++part) z[part] = native_fma(x[part], y[part], z[part]);
    std::memcpy(&c, z, sizeof c);
    return c;
  }
}
// Products of pairs of bfloat16 numbers are there: by an instruction that the CPU must have beside its ISA, or emulated
// for tests.
#if defined(__AVX512F__)
constexpr bool kHasPairs = true, kEmulatesPairs = false;
#elif defined(RNNKERN_VECTOR_BYTES)
constexpr bool kHasPairs = true, kEmulatesPairs = true;
#else
constexpr bool kHasPairs = false, kEmulatesPairs = false;
#endif

// The bfloat16 number in the upper half of each lane, and that in the lower half, as floats.
RNNKERN_INLINE F32 upper_halves(F32 v) noexcept {
  return reinterpret_cast<F32>(reinterpret_cast<BitsOf<F32>>(v) & 0xffff0000u);
}
RNNKERN_INLINE F32 lower_halves(F32 v) noexcept {
  return reinterpret_cast<F32>(reinterpret_cast<BitsOf<F32>>(v) << 16);
}

// Adds to sum the products of the upper halves of the lanes, which are bfloat16 numbers, then those of the lower
// halves, and rounds after each, as fma does. Measured on a Zen 4 server over 20 million sums of all kinds of numbers:
// the instruction has the bits of two fma while denormals count as zero. It is written by hand because the compiler's
// flag for it would let the compiler use it anywhere.
RNNKERN_INLINE F32 add_pairs(F32 a, F32 b, F32 sum) noexcept {
#if defined(__AVX512F__)
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
  return sum;
#else
  return fma(lower_halves(a), lower_halves(b), fma(upper_halves(a), upper_halves(b), sum));
#endif
}

// The nearest float16 numbers, ties to even, in the lower half of each lane, and such numbers as floats: of finite ones
// below 65520, denormals too.
RNNKERN_INLINE BitsOf<F32> to_float16(F32 v) noexcept {
#if defined(__AVX512F__)
  return reinterpret_cast<BitsOf<F32>>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT)));
#else
  using Bits = BitsOf<F32>;
  const Bits bits = reinterpret_cast<Bits>(v), magnitude = bits & 0x7fffffffu, half = Bits{} + 0x3f000000u;
  const Bits normal = (magnitude - 0x37fff001u + (magnitude >> 13 & 1u)) >> 13;
  const Bits denormal =
      reinterpret_cast<Bits>(reinterpret_cast<F32>(magnitude) + reinterpret_cast<F32>(half)) - half;  // in 2^-24
  return (magnitude < 0x38800000u ? denormal : normal) | (bits >> 16 & 0x8000u);
#endif
}
RNNKERN_INLINE F32 from_float16(BitsOf<F32> halves) noexcept {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(halves)));
#else
  using Bits = BitsOf<F32>;
  const Bits magnitude = (halves & 0x7fffu) << 13, least = Bits{} + 0x38800000u;  // 2^-14
  const F32 denormal = reinterpret_cast<F32>(magnitude + least) - reinterpret_cast<F32>(least);
  const Bits widened = magnitude < 0x00800000u ? reinterpret_cast<Bits>(denormal) : magnitude + 0x38000000u;
  return reinterpret_cast<F32>(widened | (halves & 0x8000u) << 16);
#endif
}

template <class V>
RNNKERN_INLINE V fnma(V a, V b, V c) noexcept {  // c - a * b
  return fma(-a, b, c);
}

template <class V>
RNNKERN_INLINE V select(Mask<V> mask, V a, V b) noexcept {
  return mask ? a : b;
}

// NaN in a comes through; NaN in b gives a.
template <class V>
RNNKERN_INLINE V min(V a, V b) noexcept {
  if constexpr (kHasMinMax && kIsNative<V>)
    return native_min(a, b);
  else
    return b < a ? b : a;
}
template <class V>
RNNKERN_INLINE V max(V a, V b) noexcept {
  if constexpr (kHasMinMax && kIsNative<V>)
    return native_max(a, b);
  else
    return b > a ? b : a;
}

// a * b to the nearest integer, ties to even; |a * b| <= 2^22 (float), 2^51 (double).
template <class V>
RNNKERN_INLINE V round_product(V a, V b) noexcept {
  constexpr Scalar<V> shift = Ieee<Scalar<V>>::round_shift;
  return fma(a, b, set<V>(shift)) - shift;
}

// 2^n of integral n, -bias <= n <= bias + 1: zero at the lower end, +inf at the upper.
template <class V>
RNNKERN_INLINE V pow2n(V n) noexcept {
  using F = Ieee<Scalar<V>>;
  return reinterpret_cast<V>(reinterpret_cast<BitsOf<V>>(n + (F::round_shift + F::bias)) << F::mantissa_bits);
}

// While one lives, denormals count as zero on this thread: arithmetic on them is up to a hundred times slower.
class FlushDenormals {
 public:
  RNNKERN_INLINE FlushDenormals() noexcept : caller_mode_(mode()) { set_mode(caller_mode_ | kFlush); }
  RNNKERN_INLINE ~FlushDenormals() { set_mode(caller_mode_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__aarch64__)
  static constexpr std::uint64_t kFlush = 1u << 24;  // FPCR.FZ
  RNNKERN_INLINE static std::uint64_t mode() noexcept {
    std::uint64_t value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value)::"memory");
    return value;
  }
  RNNKERN_INLINE static void set_mode(std::uint64_t value) noexcept {
    __asm__ volatile("msr fpcr, %0" ::"r"(value) : "memory");
  }
  const std::uint64_t caller_mode_;
#else
  static constexpr unsigned kFlush = 0x8040;  // MXCSR: flush to zero, denormals are zero
  RNNKERN_INLINE static unsigned mode() noexcept { return _mm_getcsr(); }
  RNNKERN_INLINE static void set_mode(unsigned value) noexcept { _mm_setcsr(value); }
  const unsigned caller_mode_;
#endif
};

}  // namespace
}  // namespace rnnkern
