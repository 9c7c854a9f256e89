// Linear layers of a few rows on the CPU, with what stands around them: LayerNorm, GELU, residual.
//
// What Python may pass is checked in linear_bindings.cpp; here everything is taken to be true.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace bark_fast {

constexpr int64_t kMostLinearRows = 16;

// out = act(LN(x) weight^T + bias) + residual. Strides in elements; all of one dtype, columns adjacent. With scales the
// weight is int8, output i's row of it to be multiplied by scales[i].
struct Linear {
    DType dtype;
    const void* x;  // (rows, k)
    int64_t x_stride;
    const void* norm_weight;  // (k,); null: no LayerNorm
    const void* norm_bias;    // (k,) or null
    const void* weight;       // (n, k)
    const float* scales;      // (n,) or null
    int64_t weight_stride;
    const void* bias;      // (n,) or null
    const void* residual;  // (rows, n) or null
    int64_t residual_stride;
    void* out;  // (rows, n); overlaps nothing that is read
    int64_t out_stride;
    int64_t rows, n, k;  // rows: at most kMostLinearRows
    bool gelu;
};

inline int weight_size(const Linear& call) { return call.scales ? 1 : size_of(call.dtype); }

namespace cpu {
// Whether rows of bf16 are multiplied two elements at a time: more of them take no longer than memory does.
bool bf16_in_pairs();
// Each call of a chain may read what those before it wrote. One parallel loop for all of them.
void linear_chain(const Linear* calls, int count, int threads);
}  // namespace cpu

}  // namespace bark_fast
