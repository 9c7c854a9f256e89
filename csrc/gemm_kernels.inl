// Linear layers of many rows in fp32, compiled once per instruction set: define BARK_FAST_ISA and include.
//
// Arithmetic decides: the sums of six outputs and a panel of rows stay in registers. Weights are read where they lie,
// each element once for a group of panels; rows are put into panels first, normalised on the way, and bias, GELU and
// residual are applied while the sums are in the cache. A sum's order depends on k alone.
#include <stdint.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says these of its own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "gemm_kernels.h"

namespace bark_fast {
namespace BARK_FAST_ISA {
namespace {

#include "simd.h"
#include "rows.inl"
#include "panels.inl"

// Steps that are summed by themselves: a chain of all of them would round more.
constexpr int64_t kChunk = 128;

constexpr int64_t kTogether = kGemmRows / (kPanelVectors * W);

int64_t panels(int64_t rows) { return Panels(rows).count; }

int64_t packed_size(int64_t rows, int64_t k) { return Panels(rows).vectors * W * k; }

// The first `count` of W columns, zeros after them.
BARK_FAST_INLINE Vec load_some(const float* p, int64_t count) {
    if (count >= W) return load(p);
    float some[W] = {};
    __builtin_memcpy(some, p, count * sizeof(float));
    return load(some);
}

void pack(const Linear& call, int64_t panel, float* packed) {
    const Panels all(call.rows);
    const int64_t k = call.k, first = all.first_row(panel), width = all.first_row(panel + 1) - first;
    const float* gain = static_cast<const float*>(call.norm_weight);
    const float* shift = static_cast<const float*>(call.norm_bias);
    packed += first * k;
    for (int64_t lane = 0; lane < width; lane += W) {
        const float* x[W];
        Norm norms[W];
        for (int i = 0; i < W; ++i) {
            const int64_t row = first + lane + i;  // beyond the last one its copies are multiplied, and dropped
            x[i] = static_cast<const float*>(call.x) + (row < call.rows ? row : call.rows - 1) * call.x_stride;
            if (gain) norms[i] = norm_of(x[i], k);
        }
        for (int64_t j = 0; j < k; j += W) {
            const int64_t count = k - j < W ? k - j : W;
            Vec v[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) v[i] = load_some(x[i] + j, count);
            if (gain) {
                const Vec by = load_some(gain + j, count), plus = shift ? load_some(shift + j, count) : Vec{};
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) v[i] = fma((v[i] - norms[i].mean) * norms[i].scale, by, plus);
            }
            transpose(v);
            for (int64_t i = 0; i < count; ++i) store(packed + (j + i) * width + lane, v[i]);
        }
    }
}

template <int O, int V>
void tile(const float* panel, const float* weight, int64_t stride, int64_t k, float* sums) {
    for (int64_t from = 0; from == 0 || from < k; from += kChunk) {
        const float* lines = weight + from;
        const auto factor = [&](int o, int64_t step)
                                __attribute__((always_inline)) { return splat(lines[o * stride + step]); };
        Vec chunk[O * V];
        multiply_tile<O, V>(panel + from * V * W, k - from < kChunk ? k - from : kChunk, factor, fma, chunk);
#pragma GCC unroll 32
        for (int i = 0; i < O * V; ++i) store(sums + i * W, from ? load(sums + i * W) + chunk[i] : chunk[i]);
    }
}

using Tile = void (*)(const float*, const float*, int64_t, int64_t, float*);

template <int V = kPanelVectors, int O = kTileOutputs>
BARK_FAST_INLINE Tile tile_for(int64_t vectors, int64_t outputs) {
    if (vectors == V && outputs == O) return tile<O, V>;
    if constexpr (O > 1)
        if (vectors == V) return tile_for<V, O - 1>(vectors, outputs);
    if constexpr (V > 1) return tile_for<V - 1, kTileOutputs>(vectors, outputs);
    return nullptr;
}

// sums (outputs, width) -> out of `rows` rows: bias, GELU, residual.
BARK_FAST_INLINE void finish(const Linear& call, const float* sums, int64_t width, int64_t row, int64_t rows,
                             int64_t first, int64_t outputs) {
    const float* bias = static_cast<const float*>(call.bias);
    const float* residual = static_cast<const float*>(call.residual);
    float* out = static_cast<float*>(call.out);
    for (int64_t lane = 0; lane < rows; lane += W)
        for (int64_t o = 0; o < outputs; o += W) {
            const int64_t count = outputs - o < W ? outputs - o : W, lanes = rows - lane < W ? rows - lane : W;
            Vec v[W];
            for (int64_t i = 0; i < W; ++i) {
                v[i] = i < count ? load(sums + (o + i) * width + lane) : Vec{};
                if (bias && i < count) v[i] += bias[first + o + i];
                if (call.gelu) v[i] = gelu(v[i]);
            }
            transpose(v);
            for (int64_t i = 0; i < lanes; ++i) {
                const int64_t at = row + lane + i;
                float* to = out + at * call.out_stride + first + o;
                if (residual) v[i] += load_some(residual + at * call.residual_stride + first + o, count);
                if (count == W)
                    store(to, v[i]);
                else
                    __builtin_memcpy(to, &v[i], count * sizeof(float));
            }
        }
}

void multiply(const Linear& call, const float* packed, int64_t first_panel, int64_t last_panel, int64_t first,
              int64_t last) {
    alignas(64) float sums[kGemmRows * kGemmOutputs];  // (panel, output, row of the panel)
    const Panels all(call.rows);
    const int64_t start = all.first_row(first_panel), outputs = last - first;
    const auto sums_of = [&](int64_t row) __attribute__((always_inline)) { return sums + (row - start) * outputs; };
    for (int64_t o = 0; o < outputs; o += kTileOutputs) {
        const int64_t count = outputs - o < kTileOutputs ? outputs - o : kTileOutputs;
        const float* weight = static_cast<const float*>(call.weight) + (first + o) * call.weight_stride;
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            const int64_t row = all.first_row(panel), width = all.first_row(panel + 1) - row;
            tile_for(width / W, count)(packed + row * call.k, weight, call.weight_stride, call.k,
                                       sums_of(row) + o * width);
        }
    }
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t row = all.first_row(panel), width = all.first_row(panel + 1) - row;
        const int64_t rows = call.rows - row < width ? call.rows - row : width;
        finish(call, sums_of(row), width, row, rows, first, outputs);
    }
}

}  // namespace

extern const GemmKernels gemm_kernels;
const GemmKernels gemm_kernels = {panels, kTogether, packed_size, pack, multiply};

}  // namespace BARK_FAST_ISA
}  // namespace bark_fast
