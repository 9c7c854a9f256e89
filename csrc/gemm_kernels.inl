// Linear layers of many rows, compiled once per instruction set: define BARK_FAST_ISA and include.
//
// Arithmetic decides: the sums of six outputs and a panel of rows stay in registers. All of it is fp32: weights of that
// are read where they lie, others are widened, a piece of a block of lines once for a group of panels. Rows are put
// into panels first, normalised on the way, and bias, GELU and residual are applied while the sums are in the cache. A
// sum's order depends on k alone.
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

// Outputs for which a panel's steps stay in the nearest cache. With more of them, weights whose lines are a power of
// two apart would push each other out of the next one.
constexpr int64_t kBlock = 24;

int64_t panels(int64_t rows) { return Panels(rows).count; }

int64_t packed_size(int64_t rows, int64_t k) { return Panels(rows).vectors * W * k; }

template <class T>
void pack(const Linear& call, int64_t panel, float* packed) {
    const Panels all(call.rows);
    const int64_t k = call.k, first = all.first_row(panel), width = all.first_row(panel + 1) - first;
    const T* gain = static_cast<const T*>(call.norm_weight);
    const T* shift = static_cast<const T*>(call.norm_bias);
    packed += first * k;
    for (int64_t lane = 0; lane < width; lane += W) {
        const T* x[W];
        Norm norms[W];
        for (int i = 0; i < W; ++i) {
            const int64_t row = first + lane + i;  // beyond the last one its copies are multiplied, and dropped
            x[i] = static_cast<const T*>(call.x) + (row < call.rows ? row : call.rows - 1) * call.x_stride;
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

// sums (O, V) = or += those of `steps` steps.
template <int O, int V>
void tile(const float* panel, const float* lines, int64_t stride, int64_t steps, bool first, float* sums) {
    const auto factor = [&](int o, int64_t step)
                            __attribute__((always_inline)) { return splat(lines[o * stride + step]); };
    Vec chunk[O * V];
    multiply_tile<O, V>(panel, steps, factor, fma, chunk);
#pragma GCC unroll 32
    for (int i = 0; i < O * V; ++i) store(sums + i * W, first ? chunk[i] : load(sums + i * W) + chunk[i]);
}

using Tile = void (*)(const float*, const float*, int64_t, int64_t, bool, float*);

template <int V = kPanelVectors, int O = kTileOutputs>
BARK_FAST_INLINE Tile tile_for(int64_t vectors, int64_t outputs) {
    if (vectors == V && outputs == O) return tile<O, V>;
    if constexpr (O > 1)
        if (vectors == V) return tile_for<V, O - 1>(vectors, outputs);
    if constexpr (V > 1) return tile_for<V - 1, kTileOutputs>(vectors, outputs);
    return nullptr;
}

// sums (outputs, width) -> out of `rows` rows: bias, GELU, residual and the one rounding.
template <class T>
BARK_FAST_INLINE void finish(const Linear& call, const float* sums, int64_t width, int64_t row, int64_t rows,
                             int64_t first, int64_t outputs) {
    const T* bias = static_cast<const T*>(call.bias);
    const T* residual = static_cast<const T*>(call.residual);
    T* out = static_cast<T*>(call.out);
    for (int64_t lane = 0; lane < rows; lane += W)
        for (int64_t o = 0; o < outputs; o += W) {
            const int64_t count = outputs - o < W ? outputs - o : W, lanes = rows - lane < W ? rows - lane : W;
            const Vec shift = bias ? load_some(bias + first + o, count) : Vec{};
            Vec v[W];
            for (int64_t i = 0; i < W; ++i) {
                v[i] = i < count ? load(sums + (o + i) * width + lane) + shift[i] : Vec{};
                if (call.gelu) v[i] = gelu(v[i]);
            }
            transpose(v);
            for (int64_t i = 0; i < lanes; ++i) {
                const int64_t at = row + lane + i;
                if (residual) v[i] += load_some(residual + at * call.residual_stride + first + o, count);
                store_some(out + at * call.out_stride + first + o, count, v[i]);
            }
        }
}

template <class T>
void multiply(const Linear& call, const float* packed, int64_t first_panel, int64_t last_panel, int64_t first,
              int64_t last) {
    alignas(64) float sums[kGemmRows * kGemmOutputs];  // (panel, output, row of the panel)
    alignas(64) float room[kBlock * kChunk];
    const Panels all(call.rows);
    const int64_t start = all.first_row(first_panel), outputs = last - first;
    const auto sums_of = [&](int64_t row) __attribute__((always_inline)) { return sums + (row - start) * outputs; };
    // With few rows the weights are waited for, and they come faster a few lines at a time, each from end to end.
    const int64_t block = last_panel - first_panel >= kTogether / 2 ? kBlock : kTileOutputs;
    for (int64_t begin = 0; begin < outputs; begin += block) {
        const int64_t end = begin + block < outputs ? begin + block : outputs;
        const T* weight = static_cast<const T*>(call.weight) + (first + begin) * call.weight_stride;
        for (int64_t from = 0; from == 0 || from < call.k; from += kChunk) {
            const int64_t steps = call.k - from < kChunk ? call.k - from : kChunk;
            const Lines<float> lines = widened(weight + from, call.weight_stride, end - begin, steps, room, kChunk);
            for (int64_t panel = first_panel; panel < last_panel; ++panel) {
                const int64_t row = all.first_row(panel), width = all.first_row(panel + 1) - row;
                for (int64_t o = begin; o < end; o += kTileOutputs) {
                    const int64_t count = end - o < kTileOutputs ? end - o : kTileOutputs;
                    tile_for(width / W, count)(packed + row * call.k + from * width,
                                               lines.first + (o - begin) * lines.stride, lines.stride, steps,
                                               from == 0, sums_of(row) + o * width);
                }
            }
        }
    }
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t row = all.first_row(panel), width = all.first_row(panel + 1) - row;
        const int64_t rows = call.rows - row < width ? call.rows - row : width;
        finish<T>(call, sums_of(row), width, row, rows, first, outputs);
    }
}

}  // namespace

#define BARK_FAST_GEMM(T) {panels, kTogether, packed_size, pack<T>, multiply<T>}
extern const GemmKernelTable gemm_kernels;
const GemmKernelTable gemm_kernels = {BARK_FAST_GEMM(float), BARK_FAST_GEMM(Half), BARK_FAST_GEMM(Brain)};

}  // namespace BARK_FAST_ISA
}  // namespace bark_fast
