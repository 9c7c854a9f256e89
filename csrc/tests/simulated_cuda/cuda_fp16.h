// Half precision by bits: to float exactly, from float rounded to nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half low, high;
};

inline float __half2float(__half h) {
    const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = (h.bits >> 10) & 31u, fraction = h.bits & 0x3ffu;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    const float magnitude = exponent ? std::ldexp(static_cast<float>(fraction + 1024), static_cast<int>(exponent) - 25)
                                     : std::ldexp(static_cast<float>(fraction), -24);
    return __uint_as_float(sign | __float_as_uint(magnitude));
}
inline __half __float2half_rn(float x) {
    const uint32_t sign = (__float_as_uint(x) >> 16) & 0x8000u;
    const float magnitude = std::fabs(x);
    if (std::isnan(x)) return {static_cast<uint16_t>(sign | 0x7fffu)};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds past the largest, 65504
    // the spacing of halves there: 2^-24 below 2^-14, else 11 bits from the leading one
    const int leading = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
    const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - leading)));
    // units 1024 to 2048 carry the leading one, which adds to the exponent below it
    return {static_cast<uint16_t>(sign | ((static_cast<uint32_t>(leading + 14) << 10) + units))};
}
inline float __low2float(__half2 pair) { return __half2float(pair.low); }
inline float __high2float(__half2 pair) { return __half2float(pair.high); }
