// IEEE binary16 in software: conversions and a difference.
#pragma once

#include "execution.h"

struct __half {
  std::uint16_t bits;
};

inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half x) {
  const std::uint32_t magnitude = x.bits & 0x7FFFU;
  const std::uint32_t sign = (x.bits & 0x8000U) << 16;
  std::uint32_t bits = (magnitude << 13) + ((127U - 15U) << 23);
  // A subnormal by way of an integer: exact, also where the CPU is told to flush subnormals.
  const float subnormal = static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24F;
  bits = magnitude < 0x0400U ? on_host::bits_as<std::uint32_t>(subnormal) : bits;
  bits = magnitude >= 0x7C00U ? (magnitude << 13) | 0x7F800000U : bits;
  return on_host::bits_as<float>(bits | sign);
}

namespace on_host {

// `x` / 2^shift to the nearest integer, ties to even.
inline std::uint32_t shifted_to_nearest(std::uint32_t x, int shift) {
  const std::uint32_t odd = (x >> shift) & 1U;
  return (x + (1U << (shift - 1)) - 1U + odd) >> shift;
}

inline std::uint32_t half_magnitude(std::uint32_t magnitude) {
  if (magnitude > 0x7F800000U) return 0x7FFFU;  // the NaN that the GPU makes
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  if (exponent >= 16) return 0x7C00U;
  // Rounding may carry into the exponent, and from the largest number to infinity: as it should.
  if (exponent >= -14) return shifted_to_nearest(magnitude - ((127U - 15U) << 23), 13);
  if (exponent < -25) return 0;
  const std::uint32_t significand = (magnitude & 0x7FFFFFU) | 0x800000U;
  return shifted_to_nearest(significand, -1 - exponent);
}

}  // namespace on_host

inline __half __float2half_rn(float x) {
  const std::uint32_t bits = on_host::bits_as<std::uint32_t>(x);
  const std::uint32_t magnitude = on_host::half_magnitude(bits & 0x7FFFFFFFU);
  return {static_cast<std::uint16_t>(magnitude | ((bits >> 16) & 0x8000U))};
}

inline __half __float2half(float x) { return __float2half_rn(x); }

struct alignas(4) __half2 {
  __half x, y;
};

// By way of fp32, which has so many bits that rounding twice is rounding once.
inline __half2 __hsub2(__half2 a, __half2 b) {
  return {__float2half_rn(__half2float(a.x) - __half2float(b.x)),
          __float2half_rn(__half2float(a.y) - __half2float(b.y))};
}
