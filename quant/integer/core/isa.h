// All code that depends on the instruction set: the vector width, storing sixteen codes, multiplying codes.
//
// A kernel multiplies four codes of a pixel by 16 × 4 weights and adds the products to the sums of 16 channels, which
// `total` converts to 32 bits. Narrower sums are converted after `capacity` additions, before they can overflow.
//
// To add an instruction set, add a branch here, its flags to setup.py, and its name to quant/integer/binding.py.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(ISA_AVX2) || defined(ISA_AVXVNNI) || defined(ISA_AVX512VNNI)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(ISA_NEON)
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace {

#if defined(ISA_AVX512VNNI)
constexpr int kVectorBytes = 64;
#elif defined(ISA_AVX2) || defined(ISA_AVXVNNI)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float NativeFloats __attribute__((vector_size(kVectorBytes)));
typedef int32_t NativeInts __attribute__((vector_size(kVectorBytes)));

// GCC generates these instructions from the generic code, except if b is a constant.
#if defined(ISA_AVX512VNNI)
inline NativeFloats min(NativeFloats a, NativeFloats b) { return _mm512_min_ps(a, b); }
inline NativeFloats max(NativeFloats a, NativeFloats b) { return _mm512_max_ps(a, b); }
#elif defined(ISA_AVX2) || defined(ISA_AVXVNNI)
inline NativeFloats min(NativeFloats a, NativeFloats b) { return _mm256_min_ps(a, b); }
inline NativeFloats max(NativeFloats a, NativeFloats b) { return _mm256_max_ps(a, b); }
#else
inline NativeFloats min(NativeFloats a, NativeFloats b) { return a < b ? a : b; }
inline NativeFloats max(NativeFloats a, NativeFloats b) { return a > b ? a : b; }
#endif

}  // namespace

#include "floats.h"

namespace {

// Base of kernels with 32-bit sums, which no layer can overflow.
struct Unbounded {
  using Sums = Ints;
  static int64_t capacity(int64_t) { return INT64_MAX; }
  static Ints total(Ints sums) { return sums; }
};

inline int32_t four(const uint8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, sizeof word);
  return word;
}

#if defined(ISA_AVX512VNNI)

constexpr int32_t kCodeOffset = 0;

inline bool processor_has_it() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

inline void store_bytes(Ints x, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)x));
}

struct Dot : Unbounded {
  static constexpr int kPixels = 14, kBlocks = 2;  // sums take 28 of 32 registers
  using Codes = __m512i;
  using Weights = __m512i;
  static Codes codes(const uint8_t* from) { return _mm512_set1_epi32(four(from)); }
  static Weights weights(const int8_t* from) { return _mm512_loadu_si512(from); }
  static void add(Sums& sums, Codes codes, Weights weights) {
    sums = (Ints)_mm512_dpbusd_epi32((__m512i)sums, codes, weights);
  }
};
using WideDot = Dot;

#elif defined(ISA_AVX2) || defined(ISA_AVXVNNI)

constexpr int32_t kCodeOffset = 0;

inline bool processor_has_it() {
#if defined(ISA_AVXVNNI)  // not every compiler knows its name
  unsigned a = 0, b, c, d;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 4);
#else
  return __builtin_cpu_supports("avx2");
#endif
}

inline void store_bytes(Ints x, uint8_t* to) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)x.low, (__m256i)x.high), 0xD8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}

struct Half : Unbounded {  // common to the kernels of 256 bits
  using Codes = __m256i;
  struct Weights {
    __m256i low, high;
  };
  static Codes codes(const uint8_t* from) { return _mm256_set1_epi32(four(from)); }
  static Weights weights(const int8_t* from) {
    const auto* halves = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
};

#if defined(ISA_AVXVNNI)

struct Dot : Half {
  static constexpr int kPixels = 6, kBlocks = 1;  // sums take 12 of 16 registers
  static void add(Sums& sums, Codes codes, Weights weights) {
    sums.low = (NativeInts)_mm256_dpbusd_epi32((__m256i)sums.low, codes, weights.low);
    sums.high = (NativeInts)_mm256_dpbusd_epi32((__m256i)sums.high, codes, weights.high);
  }
};
using WideDot = Dot;

#else

// `maddubs` adds two products in 16 bits, which products of 8 by 8 bits can overflow. Of fewer bits, several are summed
// in 16 bits.
struct Dot : Half {
  typedef int16_t Shorts __attribute__((vector_size(32)));
  using Sums = Pair<Shorts>;
  static constexpr int kPixels = 6, kBlocks = 1;  // sums take 12 of 16 registers; the products need some as well
  static int64_t capacity(int64_t product) { return INT16_MAX / (2 * product); }
  static void add(Sums& sums, Codes codes, Weights weights) {
    sums.low += (Shorts)_mm256_maddubs_epi16(codes, weights.low);
    sums.high += (Shorts)_mm256_maddubs_epi16(codes, weights.high);
  }
  static Ints total(Sums sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {(NativeInts)_mm256_madd_epi16((__m256i)sums.low, ones),
            (NativeInts)_mm256_madd_epi16((__m256i)sums.high, ones)};
  }
};

// Codes and weights of 8 bits are widened to 16 bits, separately for the even and the odd ones of each four.
struct WideDot : Unbounded {
  static constexpr int kPixels = 4, kBlocks = 1;
  struct Codes {
    __m256i even, odd;
  };
  struct Weights {
    __m256i low_even, low_odd, high_even, high_odd;
  };
  static Codes codes(const uint8_t* from) {
    const __m256i codes = Half::codes(from);
    return {_mm256_and_si256(codes, _mm256_set1_epi16(0xFF)), _mm256_srli_epi16(codes, 8)};
  }
  static __m256i even(__m256i weights) { return _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8); }
  static __m256i odd(__m256i weights) { return _mm256_srai_epi16(weights, 8); }
  static Weights weights(const int8_t* from) {
    const Half::Weights both = Half::weights(from);
    return {even(both.low), odd(both.low), even(both.high), odd(both.high)};
  }
  static NativeInts products(__m256i codes, __m256i weights) { return (NativeInts)_mm256_madd_epi16(codes, weights); }
  static void add(Sums& sums, const Codes& codes, const Weights& weights) {
    sums.low += products(codes.even, weights.low_even) + products(codes.odd, weights.low_odd);
    sums.high += products(codes.even, weights.high_even) + products(codes.odd, weights.high_odd);
  }
};

#endif

#elif defined(ISA_NEON)

// `sdot` takes signed codes: 128 is subtracted from them, and also from the zero point.
constexpr int32_t kCodeOffset = 128;

inline bool processor_has_it() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // all ARM processors of Apple have it
#endif
}

inline void store_bytes(Ints x, uint8_t* to) {
  const int16x8_t low = vcombine_s16(vmovn_s32(x.low.low), vmovn_s32(x.low.high));
  const int16x8_t high = vcombine_s16(vmovn_s32(x.high.low), vmovn_s32(x.high.high));
  vst1q_s8(reinterpret_cast<int8_t*>(to), vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

struct Dot : Unbounded {
  static constexpr int kPixels = 6, kBlocks = 1;  // sums take 24 of 32 registers
  using Codes = int8x16_t;
  struct Weights {
    int8x16_t channels[4];
  };
  static Codes codes(const uint8_t* from) {
    return veorq_s8(vreinterpretq_s8_s32(vdupq_n_s32(four(from))), vdupq_n_s8(INT8_MIN));
  }
  static Weights weights(const int8_t* from) {
    return {{vld1q_s8(from), vld1q_s8(from + 16), vld1q_s8(from + 32), vld1q_s8(from + 48)}};
  }
  static void add(Sums& sums, Codes codes, Weights weights) {
    sums.low.low = vdotq_s32(sums.low.low, codes, weights.channels[0]);
    sums.low.high = vdotq_s32(sums.low.high, codes, weights.channels[1]);
    sums.high.low = vdotq_s32(sums.high.low, codes, weights.channels[2]);
    sums.high.high = vdotq_s32(sums.high.high, codes, weights.channels[3]);
  }
};
using WideDot = Dot;

#else  // portable

constexpr int32_t kCodeOffset = 0;

inline bool processor_has_it() { return true; }

inline void store_bytes(Ints x, uint8_t* to) {
  int32_t lanes[16];
  std::memcpy(lanes, &x, sizeof lanes);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(lanes[i]);
}

struct Dot : Unbounded {
  static constexpr int kPixels = 2, kBlocks = 1;
  struct Sums {
    int32_t channels[16];
  };
  using Codes = const uint8_t*;
  using Weights = const int8_t*;
  static Codes codes(const uint8_t* from) { return from; }
  static Weights weights(const int8_t* from) { return from; }
  static void add(Sums& sums, Codes codes, Weights weights) {
    for (int channel = 0; channel < 16; ++channel)
      for (int i = 0; i < 4; ++i) sums.channels[channel] += codes[i] * weights[channel * 4 + i];
  }
  static Ints total(Sums sums) {
    Ints x;
    std::memcpy(&x, sums.channels, sizeof x);
    return x;
  }
};
using WideDot = Dot;

#endif

}  // namespace
