// Paged attention of one (sequence, head), compiled once per instruction set: define BARK_FAST_ISA and include.
//
// softmax(scale q K^T) V over tiles of 16 keys, which never cross a page. Scores of up to 128 keys are kept, then the
// running maximum m, the sum l and the output o move on (online softmax, Milakov & Gimelshein 2018), in base 2: the
// scores are scaled by scale * log2(e). All sums are fp32, in which products of bf16 and fp16 are exact.
#include <stdint.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says these of its own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "paged_kv_kernels.h"

namespace bark_fast {
namespace BARK_FAST_ISA {
namespace {

#include "simd.h"

constexpr float kNone = -__builtin_inff();

// Keys between two updates of the running maximum: so many that those cost little, and so few that K and V of one block
// and K of the next fit in a 48 KB L1 together.
template <int D>
constexpr int kBlock = 4096 / D;

template <int D, class T>
struct Block {  // where the keys and values of some tokens of one head lie, a tile at a time
    int tiles = 0;
    const T* k[kBlock<D> / kTile];
    const T* v[kBlock<D> / kTile];
};

// Asks for the lines that begin in p[at, at + N), unless p is null. Pages are too short for the hardware to see a
// stream: while keys are scored their values arrive, and while values are summed the next block's keys do. A whole tile
// asked for at once would hold up the loads behind it.
template <int N, class T>
BARK_FAST_INLINE void fetch(const T* p, int64_t at) {
    constexpr int kLine = 64 / static_cast<int>(sizeof(T));
    if (!p || (N < kLine && at % kLine)) return;
#pragma GCC unroll 16
    for (int i = 0; i < N; i += kLine) {
        // 32-bit numbers into Intel's L1, too, by measurement
        if (zen5_or_later || (sizeof(T) == 4 && intels_cpu))
            __builtin_prefetch(p + at + i, 0, 3);
        else
            __builtin_prefetch(p + at + i, 0, 2);
    }
}

// A query row as the dot product wants it.
template <int D, class T>
struct Query {
    Vec v[D / W];
    void read(const T* q) {
#pragma GCC unroll 16
        for (int j = 0; j < D / (2 * W); ++j) load2(q + 2 * W * j, v[2 * j], v[2 * j + 1]);
    }
    BARK_FAST_INLINE Vec dots(const Query& q, const T* k, const T* ahead) {  // q . k[t] of W consecutive tokens
        Vec sums[W];
#pragma GCC unroll 16
        for (int t = 0; t < W; ++t) sums[t] = Vec{};
#pragma GCC unroll 16
        for (int j = 0; j < D / (2 * W); ++j) {
#pragma GCC unroll 16
            for (int t = 0; t < W; ++t) {
                Vec a, b;
                fetch<2 * W>(ahead, t * D + 2 * W * j);
                load2(k + t * D + 2 * W * j, a, b);
                sums[t] = fma(a, q.v[2 * j], sums[t]);
                sums[t] = fma(b, q.v[2 * j + 1], sums[t]);
            }
        }
        return sum_each(sums);
    }
};

#ifdef __AVX512BF16__
template <int D>
struct Query<D, Brain> {
    Vec v[D / 32];
    void read(const Brain* q) {
        for (int j = 0; j < D / 32; ++j) v[j] = (Vec)load_bits(q + 32 * j);
    }
    BARK_FAST_INLINE Vec dots(const Query& q, const Brain* k, const Brain* ahead) {
        Vec sums[W];
#pragma GCC unroll 16
        for (int t = 0; t < W; ++t) sums[t] = Vec{};
#pragma GCC unroll 4
        for (int j = 0; j < D / 32; ++j) {
#pragma GCC unroll 16
            for (int t = 0; t < W; ++t) {
                fetch<32>(ahead, t * D + 32 * j);
                sums[t] = fma_pairs((Vec)load_bits(k + t * D + 32 * j), q.v[j], sums[t]);
            }
        }
        return sum_each(sums);
    }
};
#endif

// o[] = o[] * keep + sum of p[t] v[t] over the first `n` tokens of the block.
template <int D, class T>
BARK_FAST_INLINE void add_values(const Block<D, T>& block, const Block<D, T>* next, const float* p, int n, float keep,
                                 float* o) {
    constexpr int kVecs = D / W < 8 ? D / W : 8;  // vectors of o held in registers at once
    constexpr int kSets = 8 / kVecs;              // independent sums of them, to hide the latency of fma
    for (int c = 0; c < D; c += kVecs * W) {
        Vec sums[kSets][kVecs];
#pragma GCC unroll 8
        for (int s = 0; s < kSets; ++s)
#pragma GCC unroll 8
            for (int i = 0; i < kVecs; ++i) sums[s][i] = s == 0 ? load(o + c + i * W) * keep : Vec{};
        auto add = [&](int s, const T* v, float weight) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int i = 0; i < kVecs; i += 2) {
                Vec a, b;
                load2(v + c + i * W, a, b);
                sums[s][i] = fma(splat(weight), a, sums[s][i]);
                sums[s][i + 1] = fma(splat(weight), b, sums[s][i + 1]);
            }
        };
        for (int t0 = 0; t0 < n; t0 += kTile) {
            const T* v = block.v[t0 / kTile];
            const T* ahead = next && c == 0 && t0 / kTile < next->tiles ? next->k[t0 / kTile] : nullptr;
            const int count = n - t0 < kTile ? n - t0 : kTile;
            int t = 0;
            for (; t + kSets <= count; t += kSets) {
#pragma GCC unroll 8
                for (int s = 0; s < kSets; ++s) {
                    fetch<D>(ahead, (t + s) * D);
                    add(s, v + (t + s) * D, p[t0 + t + s]);
                }
            }
            for (; t < count; ++t) {
                fetch<D>(ahead, t * D);
                add(0, v + t * D, p[t0 + t]);
            }
            for (; ahead && t < kTile; ++t) fetch<D>(ahead, t * D);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kVecs; ++i) {
            Vec total = sums[0][i];
#pragma GCC unroll 8
            for (int s = 1; s < kSets; ++s) total += sums[s][i];
            store(o + c + i * W, total);
        }
    }
}

template <int D>
struct Row {  // running softmax of one query row
    float o[D];
    float maximum;
    float total;
};

template <int D, class T>
BARK_FAST_INLINE void step(const Query<D, T>& q, const Block<D, T>& block, const Block<D, T>* next, int n, float scale,
                           Row<D>& row) {
    alignas(64) float p[kBlock<D>];
    const int tiles = (n + kTile - 1) / kTile;
    Vec best = splat(kNone);
    for (int tile = 0; tile < tiles; ++tile) {
        for (int t = 0; t < kTile; t += W) {
            const T* ahead = next ? block.v[tile] + t * D : nullptr;
            const Vec s = Query<D, T>::dots(q, block.k[tile] + t * D, ahead) * scale;
            store(p + tile * kTile + t, s);
            // the tail of the last tile belongs to nobody yet
            if ((tile + 1) * kTile <= n) best = larger(best, s);
        }
    }
    float maximum = max_of(best);
    for (int t = n / kTile * kTile; t < tiles * kTile; ++t) {
        if (t >= n) p[t] = kNone;
        maximum = p[t] > maximum ? p[t] : maximum;
    }
    maximum = maximum > row.maximum ? maximum : row.maximum;
    const float shift = maximum == kNone ? 0.0f : maximum;  // every score is -inf: keep -inf + inf out of it
    Vec total{};
    for (int t = 0; t < tiles * kTile; t += W) {
        const Vec e = exp2_nonpositive(load(p + t) - shift);
        store(p + t, e);
        total += e;
    }
    const float keep = row.maximum == kNone ? 0.0f : exp2_nonpositive(splat(row.maximum - shift))[0];
    row.total = row.total * keep + sum_of(total);
    row.maximum = maximum;
    add_values<D, T>(block, next, p, n, keep, row.o);
}

template <int D, class T>
BARK_FAST_INLINE void write_row(const Attention& call, int32_t row, int32_t head, const float* o, float total) {
    T* out = static_cast<T*>(call.out) + row * call.out_stride + int64_t{head} * D;
    const float inverse = total == 0 ? 0.0f : 1.0f / total;  // no keys: zeros
    for (int j = 0; j < D; j += 2 * W) store2(out + j, load(o + j) * inverse, load(o + j + W) * inverse);
}

template <int D, class T>
void attend(const Attention& call, const Unit& unit) {
    Row<D> rows[kQueryTile];
    Query<D, T> queries[kQueryTile];
    const float scale = call.scale * 1.44269504088896341f;  // log2(e)
    const int32_t start = call.query_starts[unit.seq];
    const int32_t seq_rows = call.query_starts[unit.seq + 1] - start;
    int shift = 0;
    while ((kTile << shift) < call.pages.page_size) ++shift;
    const T* k_pages = static_cast<const T*>(call.k_pages);
    const T* v_pages = static_cast<const T*>(call.v_pages);
    const int64_t page_step = page_elements(call.pages);

    for (int r = 0; r < unit.rows; ++r) {
        const T* query = static_cast<const T*>(call.query) + (unit.row + r) * call.query_stride;
        queries[r].read(query + int64_t{unit.head} * D);
        for (int j = 0; j < D; ++j) rows[r].o[j] = 0;
        rows[r].maximum = kNone;
        rows[r].total = 0;
    }
    const auto find = [&](const Unit& of, int32_t first, Block<D, T>& block) {
        const int32_t* table = call.block_table + of.seq * call.table_stride;
        const int64_t head_offset = page_offset(call.pages, 0, of.head, 0);
        const int32_t last = first + kBlock<D> < of.last_key ? first + kBlock<D> : of.last_key;
        block.tiles = 0;
        for (int32_t t = first; t < last; t += kTile, ++block.tiles) {
            const int32_t tile = t / kTile;
            const int64_t offset = table[tile >> shift] * page_step + head_offset +
                                   int64_t{tile & ((1 << shift) - 1)} * kTile * D;
            block.k[block.tiles] = k_pages + offset;
            block.v[block.tiles] = v_pages + offset;
        }
    };
    Block<D, T> blocks[2];
    find(unit, unit.first_key, blocks[0]);
    for (int32_t first = unit.first_key, at = 0; first < unit.last_key; first += kBlock<D>, at ^= 1) {
        const int32_t last = first + kBlock<D> < unit.last_key ? first + kBlock<D> : unit.last_key;
        const Block<D, T>& block = blocks[at];
        if (last == unit.last_key && unit.next)
            find(*unit.next, unit.next->first_key, blocks[at ^ 1]);
        else
            find(unit, last, blocks[at ^ 1]);
        for (int r = 0; r < unit.rows; ++r) {
            const int32_t visible = visible_keys(call.lengths[unit.seq], seq_rows, unit.row + r - start);
            const int32_t end = visible < last ? visible : last;
            const Block<D, T>* ahead = r == 0 ? &blocks[at ^ 1] : nullptr;
            if (end > first) step<D, T>(queries[r], block, ahead, end - first, scale, rows[r]);
        }
    }
    for (int r = 0; r < unit.rows; ++r) {
        if (!unit.partial) {
            write_row<D, T>(call, unit.row + r, unit.head, rows[r].o, rows[r].total);
        } else {
            float* partial = unit.partial + r * unit.partial_stride;
            for (int j = 0; j < D; ++j) partial[j] = rows[r].o[j];
            partial[D] = rows[r].maximum;
            partial[D + 1] = rows[r].total;
        }
    }
}

template <int D, class T>
void combine(const Attention& call, int32_t row, int32_t head, const float* partial, int parts, int64_t stride) {
    float o[D] = {};
    float maximum = kNone, total = 0;
    for (int i = 0; i < parts; ++i) {
        const float m = partial[i * stride + D];
        maximum = m > maximum ? m : maximum;
    }
    for (int i = 0; i < parts; ++i) {
        const float* part = partial + i * stride;
        if (part[D + 1] == 0) continue;  // no keys
        const float weight = exp2_nonpositive(splat(part[D] - maximum))[0];
        total += weight * part[D + 1];
        for (int j = 0; j < D; j += W) store(o + j, fma(splat(weight), load(part + j), load(o + j)));
    }
    write_row<D, T>(call, row, head, o, total);
}

}  // namespace

#define BARK_FAST_BOTH(D, T) {attend<D, T>, combine<D, T>}
#define BARK_FAST_ROW(T) {BARK_FAST_BOTH(32, T), BARK_FAST_BOTH(64, T), BARK_FAST_BOTH(128, T)}
extern const KernelTable kernels;
const KernelTable kernels = {BARK_FAST_ROW(float), BARK_FAST_ROW(Half), BARK_FAST_ROW(Brain)};

}  // namespace BARK_FAST_ISA
}  // namespace bark_fast
