// Vectors of sixteen floats, with the same bits on every processor.
//
// All operations are correctly rounded by IEEE 754 and run in source order: with -ffp-contract=off the compiler fuses
// none of them, and the exponential is implemented here, because libraries differ.

#pragma once

#include <cstdint>
#include <cstring>

// GCC keeps an array in registers only if all of its indices are constants early, that is, if loops are unrolled.
#define UNROLLED _Pragma("GCC unroll 16")

namespace {

constexpr int64_t kLanes = 16;

// Two vectors used as one, if sixteen numbers need two or four registers.
template <class Half>
struct Pair {
  Half low, high;
};

template <class Native, int kBytes>
struct Filled {
  using Type = Pair<typename Filled<Native, kBytes / 2>::Type>;
};
template <class Native>
struct Filled<Native, kVectorBytes> {
  using Type = Native;
};
using Floats = Filled<NativeFloats, 4 * kLanes>::Type;
using Ints = Filled<NativeInts, 4 * kLanes>::Type;

template <class Half>
inline Pair<Half> operator+(Pair<Half> a, Pair<Half> b) {
  return {a.low + b.low, a.high + b.high};
}
template <class Half>
inline Pair<Half> operator-(Pair<Half> a, Pair<Half> b) {
  return {a.low - b.low, a.high - b.high};
}
template <class Half>
inline Pair<Half> operator*(Pair<Half> a, Pair<Half> b) {
  return {a.low * b.low, a.high * b.high};
}
template <class Half>
inline Pair<Half> operator/(Pair<Half> a, Pair<Half> b) {
  return {a.low / b.low, a.high / b.high};
}

template <class Half>
inline Pair<Half> min(Pair<Half> a, Pair<Half> b) {
  return {min(a.low, b.low), min(a.high, b.high)};
}

template <class Half>
inline Pair<Half> max(Pair<Half> a, Pair<Half> b) {
  return {max(a.low, b.low), max(a.high, b.high)};
}

template <class Half>
inline Pair<Half> operator>>(Pair<Half> a, int32_t places) {
  return {a.low >> places, a.high >> places};
}
template <class Half>
inline Pair<Half> operator&(Pair<Half> a, Pair<Half> b) {
  return {a.low & b.low, a.high & b.high};
}

inline NativeFloats to_floats(NativeInts x) { return __builtin_convertvector(x, NativeFloats); }
template <class Half>
inline auto to_floats(Pair<Half> x) -> Pair<decltype(to_floats(x.low))> {
  return {to_floats(x.low), to_floats(x.high)};
}

// Reinterpret the bits of x as an integer.
inline NativeInts bits(NativeFloats x) { return (NativeInts)x; }
template <class Half>
inline auto bits(Pair<Half> x) -> Pair<decltype(bits(x.low))> {
  return {bits(x.low), bits(x.high)};
}

// x · 2^n for the integer n = `power` − 1.5 · 2^23. The lowest bits of `power` are those of n, and are added to the
// exponent bits of x.
inline NativeFloats scale(NativeFloats x, NativeFloats power) {
  return (NativeFloats)((NativeInts)x + ((NativeInts)power << 23));
}
template <class Half>
inline Pair<Half> scale(Pair<Half> x, Pair<Half> power) {
  return {scale(x.low, power.low), scale(x.high, power.high)};
}

inline void fill(NativeFloats& x, float value) { x = value - NativeFloats{}; }
inline void fill(NativeInts& x, int32_t value) { x = value - NativeInts{}; }
template <class Half, class Number>
inline void fill(Pair<Half>& x, Number value) {
  fill(x.low, value);
  fill(x.high, value);
}
template <class Vector = Floats, class Number>
inline Vector all(Number value) {
  Vector x;
  fill(x, value);
  return x;
}

template <class Native, class Number>
inline void load(Native& x, const Number* from) {
  std::memcpy(&x, from, sizeof x);
}
template <class Half, class Number>
inline void load(Pair<Half>& x, const Number* from) {
  load(x.low, from);
  load(x.high, from + sizeof x / 2 / sizeof(Number));
}
inline Floats load(const float* from) {
  Floats x;
  load(x, from);
  return x;
}
inline Ints load(const int32_t* from) {
  Ints x;
  load(x, from);
  return x;
}

template <class Native>
inline void store(Native x, float* to) {
  std::memcpy(to, &x, sizeof x);
}
template <class Half>
inline void store(Pair<Half> x, float* to) {
  store(x.low, to);
  store(x.high, to + sizeof x / 2 / sizeof(float));
}

inline float highest_lane(NativeFloats x) {
  float highest = x[0];
  for (size_t i = 1; i < sizeof x / sizeof(float); ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}
template <class Half>
inline float highest_lane(Pair<Half> x) {
  return highest_lane(max(x.low, x.high));
}

// Add lanes i and i + n/2, then sum the n/2 results in the same way.
inline float sum_of_lanes(NativeFloats x) {
  float lanes[sizeof x / sizeof(float)];
  store(x, lanes);
  for (size_t half = sizeof x / sizeof(float) / 2; half > 0; half /= 2)
    for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
template <class Half>
inline float sum_of_lanes(Pair<Half> x) {
  return sum_of_lanes(x.low + x.high);
}

// Adding this to |x| < 2^22 rounds x to an integer, half to even. The lowest bits of the sum are those of the integer.
constexpr float kRound = 12582912.0f;  // 1.5 · 2^23

// e^−x, with x clamped to [−87, 87]: 2^n · e^r with |r| ≤ ln2 / 2, and the polynomial of Cephes for e^r.
inline Floats exp_of_negative(Floats x) {
  x = min(max(x, all(-87.0f)), all(87.0f));
  const Floats power = x * all(-1.44269504f) + all(kRound);
  const Floats n = power - all(kRound);
  const Floats minus_r = (x + n * all(0.693359375f)) + n * all(-2.12194440e-4f);
  const Floats rr = minus_r * minus_r;
  // Estrin's scheme: pairs are combined first, which shortens the chain of dependent operations.
  const Floats highest = all(1.3981999507e-3f) - minus_r * all(1.9875691500e-4f);
  const Floats middle = all(4.1665795894e-2f) - minus_r * all(8.3334519073e-3f);
  const Floats lowest = all(5.0000001201e-1f) - minus_r * all(1.6666665459e-1f);
  const Floats p = (highest * rr + middle) * rr + lowest;
  return scale(p * rr - minus_r + all(1.0f), power);
}

inline Floats silu(Floats x) { return x / (all(1.0f) + exp_of_negative(x)); }

inline Floats relu(Floats x) { return max(x, all(0.0f)); }

// x · Φ(x), with the normal distribution Φ, within 2e-7: relu(x) − a · Φ(−a) for a = |x|, with
// Φ(−a) = e^(−a²/2) · p(1 / (1 + 0.4 · a)) and a polynomial p that was fitted for this project.
inline Floats gelu(Floats x) {
  const Floats a = max(x, all(0.0f) - x);
  const Floats t = all(1.0f) / (all(1.0f) + a * all(0.4f));
  Floats p = all(-0.0359437913f);
  p = p * t + all(0.182523847f);
  p = p * t - all(0.335936397f);
  p = p * t + all(0.207749635f);
  p = p * t + all(0.0170435086f);
  p = p * t + all(0.14638406f);
  p = p * t + all(0.158600733f);
  p = p * t + all(0.159578383f);
  return relu(x) - a * ((p * t) * exp_of_negative(a * a * all(0.5f)));
}

// x · tanh(ln(1 + e^x)) = x · n / (n + 2) for n = e^x · (e^x + 2); for x > 30 that is x.
inline Floats mish(Floats x) {
  const Floats e = exp_of_negative(max(all(0.0f) - x, all(-30.0f)));
  const Floats n = e * (e + all(2.0f));
  return x * (n / (n + all(2.0f)));
}

}  // namespace
