// Linear layers of a few rows, compiled once per instruction set: define BARK_FAST_ISA and include.
//
// Memory decides: weights are read once, a few lines of them side by side, in pieces of some hundred columns; while one
// piece is multiplied with all rows another, some KiB further on, is fetched. A product is summed in fp32 in an order that
// depends on k alone, not on the number of rows nor on the place of the output: W partial sums over each piece, the pieces
// in turn, and the W sums by a fixed tree. 16-bit weights are widened: two fp32 fma of 16 products take half the time of
// one dpbf16ps of 32 on Sapphire Rapids, and the rows need no rounding. On AMD's CPUs dpbf16ps takes the time of one fma:
// for them bf16 is compiled by itself, its rows rounded to bf16 and multiplied in pairs.
#include <stdint.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says these of its own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "linear_kernels.h"

namespace bark_fast {
namespace BARK_FAST_ISA {
namespace {

#include "simd.h"
#include "rows.inl"

// What rows are packed as. Beside int8 weights they are int16, the largest of a row 32,767: products of two are summed as
// int32, which takes half of the instructions of widening to fp32, and a piece of 768 columns is far from its bounds.
template <class Weight>
struct PackedAs {
#if defined(__AVX512BF16__)
    using Type = Brain;
#else
    using Type = float;
#endif
};
#if defined(__AVX2__)
template <>
struct PackedAs<Byte> {
    using Type = int16_t;
};
#endif
template <class Weight>
using Packed = typename PackedAs<Weight>::Type;
template <class Weight>
constexpr bool kIntegers = sizeof(Weight) == 1 && sizeof(Packed<Weight>) == 2;

template <int N>
struct Level {  // of the cache: 3 is the L1 to the compiler, 2 the L2
    static constexpr int value = N;
};
constexpr int64_t kLine = kMostOutputs + W;  // floats of one row of results before they are finished

// Columns of a piece at most: the rows' share of it stays in the L1, the next one's lines are far enough ahead.
template <class T>
constexpr int64_t kMostPiece = sizeof(T) == 4 ? 512 : 768;

// Rows and outputs whose sums are kept in registers together.
#if defined(__AVX512F__)
constexpr int kMostTileRows = 6;
constexpr int outputs_beside(int64_t) { return 4; }
#else
constexpr int kMostTileRows = 4;
constexpr int outputs_beside(int64_t rows) { return rows > 2 ? 2 : 4; }
#endif

// Rows so few that memory is all they wait for: AMD's CPUs with AVX-512 follow one line of 16-bit weights from end to end
// faster than several, Zen 5 any line. And lines of int8 are so short that several side by side come to their end before
// the next have arrived. There the outputs are computed one by one, all rows together; each reads the rows anew.
constexpr int kMostByOne = 8;
constexpr int64_t kMostReadAnew = 32 * 1024;  // bytes that stay in a Zen 5's L1 beside the weights

template <class T>
constexpr int64_t most_by_one(bool zen5) {
    if (sizeof(T) == 1) return 3;
    if (W < 16) return 0;
    if (zen5) return sizeof(T) == 2 && sizeof(Packed<T>) == 4 ? 3 : kMostByOne;
    return sizeof(T) == 4 ? 0 : sizeof(Packed<T>) == 2 ? 3 : 1;
}

template <class T>
BARK_FAST_INLINE bool one_by_one(int64_t rows, int64_t k) {
    if (rows > most_by_one<T>(zen5_or_later)) return false;
    if (sizeof(T) == 1) return true;
    return !intels_cpu && (!zen5_or_later || rows * k * static_cast<int64_t>(sizeof(Packed<T>)) <= kMostReadAnew);
}

// Weights asked for before those that are multiplied, the next ticket's as well: memory answers after some hundred
// nanoseconds, and in the L2 there is room for more.
constexpr int64_t kBytesAhead = 8 * 1024;

// Rows are cut into tiles of about the same size.
template <class T>
BARK_FAST_INLINE int64_t tile_rows(int64_t rows, int64_t k) {
    if (one_by_one<T>(rows, k)) return rows;
    const int64_t tiles = (rows + kMostTileRows - 1) / kMostTileRows;
    return tiles ? (rows + tiles - 1) / tiles : 0;
}

BARK_FAST_INLINE int64_t steps_of(int64_t k) { return (k + kStep - 1) / kStep; }

template <class Weight>
BARK_FAST_INLINE int64_t row_bytes(int64_t k) {
    return steps_of(k) * kStep * static_cast<int64_t>(sizeof(Packed<Weight>));
}

// Behind the rows lie, beside int8 weights, the rows' scales and room for a row of floats.
template <class Weight>
int64_t packed_bytes(int64_t rows, int64_t k) {
    const int64_t more = sizeof(Weight) == 1 ? kMostLinearRows + steps_of(k) * kStep : 0;
    return rows * row_bytes<Weight>(k) + more * static_cast<int64_t>(sizeof(float));
}

template <class Weight>
BARK_FAST_INLINE float* row_scales(const void* packed, int64_t rows, int64_t k) {
    return (float*)((char*)packed + rows * row_bytes<Weight>(k));
}

template <class T>
int64_t block(int64_t rows, int64_t k) {
    return one_by_one<T>(rows, k) ? 1 : outputs_beside(tile_rows<T>(rows, k));
}

// Rows [row, row + rows) as (step, row, kStep), where `multiply` reads them one after another.
template <class T>
BARK_FAST_INLINE void pack_tile(const Linear& call, int64_t row, int64_t rows, Packed<T>* packed) {
    const int64_t k = call.k;
    const T* weight = static_cast<const T*>(call.norm_weight);
    const T* bias = static_cast<const T*>(call.norm_bias);
    for (int64_t r = 0; r < rows; ++r) {
        const T* x = static_cast<const T*>(call.x) + (row + r) * call.x_stride;
        const Norm norm = weight ? norm_of(x, k) : Norm{0, 1};
        each_step(x, k, [&](int64_t j, int64_t count, Vec a, Vec b) __attribute__((always_inline)) {
            if (weight) {
                Vec gain_a, gain_b, shift_a{}, shift_b{};
                if (count == kStep)
                    load2(weight + j, gain_a, gain_b);
                else
                    load2_some(weight + j, count, gain_a, gain_b);
                if (bias && count == kStep) load2(bias + j, shift_a, shift_b);
                if (bias && count < kStep) load2_some(bias + j, count, shift_a, shift_b);
                a = fma((a - norm.mean) * norm.scale, gain_a, shift_a);
                b = fma((b - norm.mean) * norm.scale, gain_b, shift_b);
            }
            store2(packed + j * rows + r * kStep, a, b);
        });
    }
}

// The same beside int8 weights, which lie in their own order: as `T` is loaded 16 bits apart, so are these not.
template <class T>
BARK_FAST_INLINE void pack_beside_bytes(const Linear& call, int64_t row, int64_t rows, Packed<Byte>* packed, float* scales,
                                        float* values) {
    const int64_t k = call.k, whole = steps_of(k) * kStep;
    const T* weight = static_cast<const T*>(call.norm_weight);
    const T* bias = static_cast<const T*>(call.norm_bias);
    for (int64_t r = 0; r < rows; ++r) {
        const T* x = static_cast<const T*>(call.x) + (row + r) * call.x_stride;
        const Norm norm = weight ? norm_of(x, k) : Norm{0, 1};
        Vec most{};
        for (int64_t j = 0; j < whole; j += W) {
            Vec v{};
            if (j < k) {
                v = load_some(x + j, k - j);
                if (weight) {
                    const Vec shift = bias ? load_some(bias + j, k - j) : Vec{};
                    v = fma((v - norm.mean) * norm.scale, load_some(weight + j, k - j), shift);
                }
            }
            store(values + j, v);
            most = larger(most, (Vec)((Bits)v & 0x7fffffffu));
        }
        const float largest = max_of(most);
        float scale = 1;
        if (kIntegers<Byte>) scale = largest > 0 ? largest / 32767 : 1;
        scales[r] = scale;
        for (int64_t j = 0; j < whole; j += W)
            narrow_to(packed + j / kStep * kStep * rows + r * kStep + j % kStep, load(values + j) * (1 / scale));
    }
}

template <class T, class Weight>
void pack(const Linear& call, void* packed_) {
    char* const packed = static_cast<char*>(packed_);
    const int64_t tile = tile_rows<Weight>(call.rows, call.k);
    for (int64_t row = 0; row < call.rows; row += tile) {
        const int64_t rows = call.rows - row < tile ? call.rows - row : tile;
        auto* to = reinterpret_cast<Packed<Weight>*>(packed + row * row_bytes<Weight>(call.k));
        if constexpr (sizeof(Weight) == 1) {
            float* const scales = row_scales<Weight>(packed, call.rows, call.k);
            pack_beside_bytes<T>(call, row, rows, to, scales + row, scales + kMostLinearRows);
        } else {
            pack_tile<T>(call, row, rows, to);
        }
    }
}

// Lines of which the same columns are asked for while others are multiplied: each `every`th step of them from `turn`
// on. With AVX-512 on AMD's CPUs tiles of rows take turns, for only so much can be under way at a time. Elsewhere the
// first tile asks for all, and the others' are null.
struct Fetch {
    const char* const* lines;
    int every, turn;
};
constexpr bool kMayTurn = W == 16;

// totals[r * O + o] = or += row r . line o over `columns` columns, W partial sums of it.
template <int R, int O, class T>
void dots(const Packed<T>* x, const char* const* lines, Fetch ahead, int64_t columns, bool first, Vec* totals) {
    constexpr int64_t kBytes = kStep * static_cast<int64_t>(sizeof(T));
    Vec sums[R * O];
    const T* w[O];
    const char* fetch[O];
#pragma GCC unroll 32
    for (int i = 0; i < R * O; ++i) sums[i] = Vec{};
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
        w[o] = reinterpret_cast<const T*>(lines[o]);
        fetch[o] = ahead.lines ? ahead.lines[o] : nullptr;
    }
    const auto multiply = [&](int64_t j, auto line) __attribute__((always_inline)) {
        const auto part = [&](auto weights_at, auto columns_at, auto add) __attribute__((always_inline)) {
            Vec weights[O];
#pragma GCC unroll 4
            for (int o = 0; o < O; ++o) {
                weights[o] = weights_at(line(o));
                if (R > 1) weights[o] = in_register(weights[o]);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec columns = in_register(columns_at(x + j * R + r * kStep));
#pragma GCC unroll 4
                for (int o = 0; o < O; ++o) sums[r * O + o] = add(weights[o], columns, sums[r * O + o]);
            }
        };
        [[maybe_unused]] const auto pairs = [](const auto* p) __attribute__((always_inline)) { return (Vec)load_bits(p); };
        [[maybe_unused]] const auto half = [&](auto which) __attribute__((always_inline)) {
            part([&](const T* p) __attribute__((always_inline)) { return half_step(p, which); },
                 [&](const Packed<T>* p) __attribute__((always_inline)) { return load(p + which.value * W); }, fma);
        };
#if defined(__AVX512BF16__)
        part(pairs, pairs, fma_pairs);
#elif defined(__AVX2__)
        if constexpr (kIntegers<T>) {
            part([](const T* p) __attribute__((always_inline)) { return widen_bytes(p); }, pairs, add_products);
        } else {
            half(Part<0>());
            half(Part<1>());
        }
#else
        half(Part<0>());
        half(Part<1>());
#endif
    };
    const auto step = [&](int64_t j) __attribute__((always_inline)) {
        multiply(j, [&](int o) __attribute__((always_inline)) { return w[o] + j; });
    };
    const int64_t whole = columns / kStep * kStep;
    const auto fetching = [&](auto level, auto in_turns) __attribute__((always_inline)) {
        int until = ahead.turn;
        for (int64_t j = 0; j < whole; j += kStep) {
            const int64_t at = j * static_cast<int64_t>(sizeof(T));
            if ((kBytes >= 64 || at % 64 == 0) && (!in_turns.value || until-- == 0)) {
                until = ahead.every - 1;
#pragma GCC unroll 4
                for (int o = 0; o < O; ++o)
#pragma GCC unroll 4
                    for (int64_t line = 0; line < kBytes; line += 64)
                        __builtin_prefetch(fetch[o] + at + line, 0, level.value);
            }
            step(j);
        }
    };
    const auto at_level = [&](auto level) __attribute__((always_inline)) {
        if (kMayTurn && ahead.every > 1)
            fetching(level, Part<kMayTurn>());
        else
            fetching(level, Part<0>());
    };
    if (ahead.lines && zen5_or_later) {
        at_level(Level<3>());
    } else if (ahead.lines) {
        at_level(Level<2>());
    } else {
        for (int64_t j = 0; j < whole; j += kStep) step(j);
    }
    if (whole < columns) {
        T ends[O][kStep] = {};
        for (int o = 0; o < O; ++o) __builtin_memcpy(ends[o], w[o] + whole, (columns - whole) * sizeof(T));
        multiply(whole, [&](int o) __attribute__((always_inline)) { return ends[o]; });
    }
#pragma GCC unroll 32
    for (int i = 0; i < R * O; ++i) {
        if constexpr (kIntegers<T>) sums[i] = from_integers(sums[i]);
        totals[i] = first ? sums[i] : totals[i] + sums[i];
    }
}

template <class T>
using Dots = void (*)(const Packed<T>*, const char* const*, Fetch, int64_t, bool, Vec*);

template <int O, class T, int R = O == 1 ? kMostByOne : kMostTileRows>
BARK_FAST_INLINE Dots<T> dots_for(int64_t rows) {
    // a tile has about as many rows as the others of its call
    if constexpr (O == 1 ? R <= most_by_one<T>(true) : outputs_beside(R) == O || outputs_beside(R + 3) == O)
        if (rows == R) return dots<R, O, T>;
    if constexpr (R > 1) return dots_for<O, T, R - 1>(rows);
    return nullptr;
}

// y -> out of one row: bias, GELU, residual and the one rounding.
template <class T>
BARK_FAST_INLINE void finish(const Linear& call, int64_t row, int64_t first, int64_t count, const float* y, float scale) {
    const T* bias = call.bias ? static_cast<const T*>(call.bias) + first : nullptr;
    const T* residual =
        call.residual ? static_cast<const T*>(call.residual) + row * call.residual_stride + first : nullptr;
    T* out = static_cast<T*>(call.out) + row * call.out_stride + first;
    for (int64_t i = 0; i < count; i += W) {
        Vec v = load(y + i);
        if (call.scales) v *= load_some(call.scales + first + i, count - i) * scale;
        if (bias) v += load_some(bias + i, count - i);
        if (call.gelu) v = gelu(v);
        if (residual) v += load_some(residual + i, count - i);
        store_some(out + i, count - i, v);
    }
}

// A place in the weights: the lines of a ticket, and which of its blocks of outputs and pieces of columns.
struct Walk {
    const char* lines;
    int64_t stride, block, piece;  // the stride in bytes
};

template <int O, class T, class Weight>
BARK_FAST_INLINE void multiply_by(const Linear& call, const Packed<Weight>* x, int64_t first, int64_t last, Ahead next) {
    const Weight* weight = static_cast<const Weight*>(call.weight);
    const int64_t tile = tile_rows<Weight>(call.rows, call.k), row_elements = steps_of(call.k) * kStep;
    const int64_t blocks = (last - first + O - 1) / O;
    const int64_t pieces = (call.k + kMostPiece<Weight> - 1) / kMostPiece<Weight>;
    const int64_t piece = pieces ? (steps_of(call.k) + pieces - 1) / pieces * kStep : 0;
    Vec totals[kMostLinearRows * kLine];  // (block, row, O)
    if (!pieces)
        for (Vec& total : totals) total = Vec{};
    // several tiles of rows do not fit in the L1 for all columns: one piece of them is taken through all blocks
    const bool by_piece = call.rows > tile, in_turns = kMayTurn && !intels_cpu;
    constexpr int64_t kBytes = sizeof(Weight);
    const auto lines_of = [&](const Walk& at, const char** lines) __attribute__((always_inline)) {
        for (int64_t o = 0; o < O; ++o) {
            const int64_t line = at.block * O + o < last - first ? at.block * O + o : last - first - 1;
            lines[o] = at.lines + line * at.stride + at.piece * piece * kBytes;
        }
    };
    const auto on = [&](Walk& at) __attribute__((always_inline)) {
        int64_t& fast = by_piece ? at.block : at.piece;
        int64_t& slow = by_piece ? at.piece : at.block;
        if (++fast < (by_piece ? blocks : pieces)) return;
        fast = 0;
        if (++slow < (by_piece ? pieces : blocks)) return;
        slow = 0;
        if (next.first) at.lines = next.first, at.stride = next.stride;
    };
    Walk here{reinterpret_cast<const char*>(weight + first * call.weight_stride), call.weight_stride * kBytes, 0, 0};
    Walk ahead = here;
    if (pieces)
        for (int64_t bytes = 0; bytes < kBytesAhead; bytes += O * piece * kBytes) on(ahead);
    for (int64_t left = blocks * pieces; left; --left, on(here), on(ahead)) {
        const char *lines[O], *fetched[O];
        lines_of(here, lines);
        lines_of(ahead, fetched);
        const int64_t from = here.piece * piece;
        const int64_t columns = call.k - from < piece ? call.k - from : piece;
        Fetch fetch{fetched, 1, 0};
        if (in_turns) fetch.every = static_cast<int>((call.rows + tile - 1) / tile);
        for (int64_t row = 0; row < call.rows; row += tile, ++fetch.turn) {
            if (row && !in_turns) fetch.lines = nullptr;
            const int64_t rows = call.rows - row < tile ? call.rows - row : tile;
            dots_for<O, Weight>(rows)(x + row * row_elements + from * rows, lines, fetch, columns, here.piece == 0,
                                      totals + (here.block * call.rows + row) * O);
        }
    }
    const int64_t count = blocks * call.rows * O;
    float sums[kMostLinearRows * kLine], y[kMostLinearRows * kLine];
    for (int64_t i = 0; i < count; i += W) {
        Vec some[W];
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) some[l] = totals[i + l];  // beyond `count` are sums that nobody reads
        store(sums + i, sum_each(some));
    }
    const float* sum = sums;
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t row = 0; row < call.rows; ++row, sum += O)
#pragma GCC unroll 4
            for (int o = 0; o < O; ++o) y[row * kLine + b * O + o] = sum[o];
    const float* const scales = sizeof(Weight) == 1 ? row_scales<Weight>(x, call.rows, call.k) : nullptr;
    for (int64_t row = 0; row < call.rows; ++row)
        finish<T>(call, row, first, last - first, y + row * kLine, scales ? scales[row] : 1);
}

template <class T, class Weight>
void multiply(const Linear& call, const void* packed_, int64_t first, int64_t last, Ahead next) {
    const auto* packed = static_cast<const Packed<Weight>*>(packed_);
    constexpr int kFew = outputs_beside(kMostTileRows), kMany = outputs_beside(1);
    const int64_t beside = block<Weight>(call.rows, call.k);
    if (beside == 1)
        multiply_by<1, T, Weight>(call, packed, first, last, next);
    else if (beside == kFew)
        multiply_by<kFew, T, Weight>(call, packed, first, last, next);
    else
        multiply_by<kMany, T, Weight>(call, packed, first, last, next);
}

}  // namespace

#define BARK_FAST_LINEAR(T, Weight) \
    {packed_bytes<Weight>, pack<T, Weight>, multiply<T, Weight>, block<Weight>}
#if defined(__AVX512BF16__)
extern const LinearKernels linear_kernels_bf16;
const LinearKernels linear_kernels_bf16 = BARK_FAST_LINEAR(Brain, Brain);
#else
extern const LinearKernelTable linear_kernels;
const LinearKernelTable linear_kernels = {
    {BARK_FAST_LINEAR(float, float), BARK_FAST_LINEAR(Half, Half), BARK_FAST_LINEAR(Brain, Brain)},
    {BARK_FAST_LINEAR(float, Byte), BARK_FAST_LINEAR(Half, Byte), BARK_FAST_LINEAR(Brain, Byte)},
};
#endif

}  // namespace BARK_FAST_ISA
}  // namespace bark_fast
