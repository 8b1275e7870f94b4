// The emulator's __half: storage and conversions; see cuda_runtime.h.

#pragma once

#include <cstdint>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const float sign = x.bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return sign * (fraction ? NAN : INFINITY);
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7fff};
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = -14;  // of the last place times 1024
  if (size >= 0x1p-14f) exponent = std::ilogb(size);
  // Round to even in units of the last place; a carry runs into the exponent, as it should.
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (fraction + ((exponent + 14) << 10)))};
}
