// What the C++ tests share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

static std::mt19937_64 rng(0);

static inline void expect(bool truth, const char* what) {
    if (truth) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

// bf16 by cutting a float short, and back.
static inline uint16_t to_brain(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}

static inline float of_brain(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
