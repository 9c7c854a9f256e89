// Flash attention (Dao, 2023), compiled once per instruction set: define BARK_FAST_ISA and include.
//
// The queries of a panel lie side by side in vectors, so both products are those of panels.inl, with keys and values
// as the other operand, and the softmax between them goes down its keys without crossing lanes. Keys and values that
// are not read where they lie are put side by side in fp32 first, once for some panels. bf16 where the CPU multiplies it
// is compiled by itself: two products a lane and step; weights are rounded to it, sums are not.
#include <stdint.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says these of its own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "flash_kernels.h"

namespace bark_fast {
namespace BARK_FAST_ISA {
namespace {

#include "simd.h"
#include "rows.inl"
#include "panels.inl"

constexpr int64_t kKeys = 48;  // of a block: it, the queries and their results stay in the L1

#if defined(__AVX512BF16__)
using Element = Brain;  // of what is multiplied
constexpr int64_t kPair = 2;  // elements of a lane

BARK_FAST_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma_pairs(a, b, sum); }

// Lanes of (a, b) rounded.
BARK_FAST_INLINE Vec paired(Vec a, Vec b) {
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Vec)_mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
#else
using Element = float;
constexpr int64_t kPair = 1;
BARK_FAST_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
#endif

// The lane of an operand that starts at p.
BARK_FAST_INLINE Vec lane_of(const Element* p) {
    uint32_t lane;
    __builtin_memcpy(&lane, p, sizeof lane);
    return (Vec)(Bits{} + lane);
}

int64_t panels(int64_t rows) { return Panels(rows).count; }

constexpr int64_t kWidth = kPanelVectors * W;

// Floats of one panel's queries, results, scores and values in pairs.
BARK_FAST_INLINE int64_t panel_room(int64_t head_dim) { return (2 * head_dim + kKeys) * kWidth + kKeys * head_dim; }

// Whether keys and values are read where they lie. Their lines are a whole projection apart and share few sets of the
// L1: the panels of AVX-512 are wide enough to wait less for that than copies take, narrower ones are not.
template <class T>
constexpr bool kInPlace = sizeof(T) == sizeof(Element) && kPanelVectors * W >= 64;

// Panels of one head for which they are put side by side together, in fp32: a few hundredths of what multiplying takes.
template <class T>
constexpr int64_t kTogether = kInPlace<T> ? 1 : 8;

template <class T>
int64_t room(int64_t keys, int64_t head_dim) {
    return panel_room(head_dim) + (kInPlace<T> ? 0 : 2 * (keys * head_dim + W));
}

template <class T, class Data>
BARK_FAST_INLINE T* rows_at(const HeadRows<Data>& all, int64_t batch, int64_t head) {
    return static_cast<T*>(all.data) + batch * all.batch_stride + head * all.head_stride;
}

// The first `count` keys or values of one head.
template <class T>
BARK_FAST_INLINE Lines<Element> lines_of(const HeadRows<const void*>& all, int64_t batch, int64_t head, int64_t count,
                                         int64_t head_dim, float* room) {
    const T* const rows = rows_at<const T>(all, batch, head);
    if constexpr (kInPlace<T>)
        return {rows, all.row_stride};
    else if (all.row_stride == head_dim)
        return widened(rows, head_dim, count, head_dim, room, head_dim);
    else
        return copied(rows, all.row_stride, count, head_dim, room, head_dim);
}

// scores (key, query) of `count` keys.
template <int V, int O = kTileOutputs>
BARK_FAST_INLINE void score(const float* query, const Element* key, int64_t stride, int64_t count, int64_t steps,
                            float* scores) {
    int64_t at = 0;
    for (; at + O <= count; at += O) {
        const Element* lines = key + at * stride;
        const auto factor = [&](int o, int64_t step)
                                __attribute__((always_inline)) { return lane_of(lines + o * stride + step * kPair); };
        Vec sums[O * V];
        multiply_tile<O, V>(query, steps, factor, multiply_add, sums);
#pragma GCC unroll 32
        for (int i = 0; i < O * V; ++i) store(scores + (at * V + i) * W, sums[i]);
    }
    if constexpr (O > 1)
        if (at < count) score<V, O - 1>(query, key + at * stride, stride, count - at, steps, scores + at * V * W);
}

// out (dimension, query) = out * shrink + weights (steps of keys, query) times values, from dimension `from` on.
template <int V, int O = kTileOutputs>
BARK_FAST_INLINE void add_values(const float* weights, const Element* value, int64_t stride, int64_t steps,
                                 int64_t from, int64_t head_dim, const Vec* shrink, float* out) {
    for (; from + O <= head_dim; from += O) {
        const Element* lines = value + from * kPair;
        const auto factor = [&](int o, int64_t step)
                                __attribute__((always_inline)) { return lane_of(lines + step * stride + o * kPair); };
        Vec sums[O * V];
        multiply_tile<O, V>(weights, steps, factor, multiply_add, sums);
        float* to = out + from * V * W;
#pragma GCC unroll 32
        for (int i = 0; i < O * V; ++i) store(to + i * W, fma(load(to + i * W), shrink[i % V], sums[i]));
    }
    if constexpr (O > 1)
        if (from < head_dim) add_values<V, O - 1>(weights, value, stride, steps, from, head_dim, shrink, out);
}

// `count` lanes of a query from `lane` on, zeros after them.
template <class T>
BARK_FAST_INLINE Vec lanes_of(const T* query, int64_t lane, int64_t count) {
    if constexpr (kPair == 1) return load_some(query + lane, count);
    Vec v{};
    __builtin_memcpy(&v, query + lane * kPair, (count < W ? count : W) * sizeof(float));
    return v;
}

// Queries as (lane, query); those beyond the last one are its copies.
template <class T>
BARK_FAST_INLINE void pack_queries(const T* query, int64_t stride, int64_t rows, int64_t head_dim, int64_t width,
                                   float* panel) {
    const int64_t lanes = head_dim / kPair;
    for (int64_t row = 0; row < width; row += W)
        for (int64_t j = 0; j < lanes; j += W) {
            Vec v[W];
            for (int64_t i = 0; i < W; ++i)
                v[i] = lanes_of(query + (row + i < rows ? row + i : rows - 1) * stride, j, lanes - j);
            transpose(v);
            for (int64_t i = 0; i < W && j + i < lanes; ++i) store(panel + (j + i) * width + row, v[i]);
        }
}

#if defined(__AVX512BF16__)
// Values of two neighbouring keys to a lane: (pair of keys, dimension); zeros beside the last of an odd number.
BARK_FAST_INLINE void pair_values(const Brain* value, int64_t stride, int64_t count, int64_t head_dim, uint32_t* pairs) {
    for (int64_t key = 0; key < count; key += 2) {
        const Brain *a = value + key * stride, *b = a + stride;
        for (int64_t d = 0; d < head_dim; ++d)
            *pairs++ = a[d].bits | (key + 1 < count ? static_cast<uint32_t>(b[d].bits) << 16 : 0u);
    }
}
#endif

template <class T, int V>
void attend_panel(const Flash& call, Lines<Element> key, Lines<Element> value, int64_t batch, int64_t head,
                  int64_t first, int64_t rows, float* room) {
    constexpr int64_t width = V * W;
    const int64_t head_dim = call.head_dim, keys = call.keys;
    float* const query = room;
    float* const out = query + head_dim * width;
    float* const scores = out + head_dim * width;
    pack_queries(rows_at<const T>(call.query, batch, head) + first * call.query.row_stride, call.query.row_stride, rows,
                 head_dim, width, query);
    const float natural = call.scale * 1.44269504088896341f;  // log2(e)
    const float none = -__builtin_inff();
    // of each query: its largest score, also as its weights have it, the sum of them, how many keys it sees
    Vec most[V], offset[V], sum[V], seen[V];
    for (int v = 0; v < V; ++v) {
        most[v] = splat(none);
        offset[v] = splat(-none);
        sum[v] = Vec{};
        for (int i = 0; i < W; ++i)
            seen[v][i] = static_cast<float>(call.causal ? keys - call.rows + first + v * W + i + 1 : keys);
    }
    for (int64_t i = 0; i < head_dim * width; i += W) store(out + i, Vec{});
    const int64_t all_see = call.causal ? keys - call.rows + first + 1 : keys;
    const int64_t end = call.causal ? keys - call.rows + first + rows : keys;
    for (int64_t from = 0; from < end; from += kKeys) {
        const int64_t count = end - from < kKeys ? end - from : kKeys;
        score<V>(query, key.first + from * key.stride, key.stride, count, head_dim / kPair, scores);
        Vec shrink[V], block_sum[V];
        for (int64_t j = 0; j < count; ++j)
            for (int v = 0; v < V; ++v) {
                float* const at = scores + (j * V + v) * W;
                if (from + j >= all_see) store(at, seen[v] > static_cast<float>(from + j) ? load(at) : splat(none));
                most[v] = larger(load(at), most[v]);
            }
        for (int v = 0; v < V; ++v) {
            const Vec before = offset[v];
            offset[v] = most[v] * -natural;
            shrink[v] = exp2_nonpositive(offset[v] - before);
            block_sum[v] = Vec{};
        }
        const auto weigh = [&](int64_t j, int v) __attribute__((always_inline)) {
            const Vec weight = exp2_nonpositive(fma(load(scores + (j * V + v) * W), splat(natural), offset[v]));
            block_sum[v] += weight;
            return weight;
        };
#if defined(__AVX512BF16__)
        for (int64_t j = 0; j < count; j += 2)
            for (int v = 0; v < V; ++v) {
                const Vec a = weigh(j, v), b = j + 1 < count ? weigh(j + 1, v) : Vec{};
                store(scores + (j / 2 * V + v) * W, paired(a, b));
            }
        uint32_t* const pairs = reinterpret_cast<uint32_t*>(scores + kKeys * width);
        pair_values(value.first + from * value.stride, value.stride, count, head_dim, pairs);
        add_values<V>(scores, reinterpret_cast<const Brain*>(pairs), 2 * head_dim, (count + 1) / 2, 0, head_dim, shrink,
                      out);
#else
        for (int64_t j = 0; j < count; ++j)
            for (int v = 0; v < V; ++v) store(scores + (j * V + v) * W, weigh(j, v));
        add_values<V>(scores, value.first + from * value.stride, value.stride, count, 0, head_dim, shrink, out);
#endif
        for (int v = 0; v < V; ++v) sum[v] = fma(sum[v], shrink[v], block_sum[v]);
    }
    T* const result = rows_at<T>(call.out, batch, head) + first * call.out.row_stride;
    for (int v = 0; v < V; ++v)
        for (int64_t d = 0; d < head_dim; d += W) {
            const int64_t count = head_dim - d < W ? head_dim - d : W;
            Vec o[W];
            for (int64_t i = 0; i < W; ++i) o[i] = i < count ? load(out + ((d + i) * V + v) * W) / sum[v] : Vec{};
            transpose(o);
            for (int64_t i = 0; i < W && v * W + i < rows; ++i)
                store_some(result + (v * W + i) * call.out.row_stride + d, count, o[i]);
        }
}

template <class T, int V = kPanelVectors>
BARK_FAST_INLINE void attend_rows(const Flash& call, Lines<Element> key, Lines<Element> value, int64_t batch,
                                  int64_t head, int64_t first, int64_t width, float* room) {
    if (width == V * W) {
        const int64_t rows = call.rows - first < width ? call.rows - first : width;
        attend_panel<T, V>(call, key, value, batch, head, first, rows, room);
    } else if constexpr (V > 1) {
        attend_rows<T, V - 1>(call, key, value, batch, head, first, width, room);
    }
}

template <class T>
void attend(const Flash& call, int64_t batch, int64_t head, int64_t first_panel, int64_t last_panel, float* room) {
    const Panels all(call.rows);
    const int64_t last = all.first_row(last_panel), rows = last < call.rows ? last : call.rows;
    const int64_t seen = call.causal ? call.keys - call.rows + rows : call.keys;
    float* const wide = room + panel_room(call.head_dim);
    const auto key = lines_of<T>(call.key, batch, head, seen, call.head_dim, wide);
    const auto value =
        lines_of<T>(call.value, batch, head, seen, call.head_dim, wide + call.keys * call.head_dim + W);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t row = all.first_row(panel);
        attend_rows<T>(call, key, value, batch, head, row, all.first_row(panel + 1) - row, room);
    }
}

}  // namespace

#define BARK_FAST_FLASH(T) {panels, kTogether<T>, room<T>, attend<T>}
#if defined(__AVX512BF16__)
extern const FlashKernels flash_kernels_bf16;
const FlashKernels flash_kernels_bf16 = BARK_FAST_FLASH(Brain);
#else
extern const FlashKernelTable flash_kernels;
const FlashKernelTable flash_kernels = {BARK_FAST_FLASH(float), BARK_FAST_FLASH(Half), BARK_FAST_FLASH(Brain)};
#endif

}  // namespace BARK_FAST_ISA
}  // namespace bark_fast
