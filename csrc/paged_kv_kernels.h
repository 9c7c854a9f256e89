// What paged_kv.cpp asks of each instruction set.
#pragma once

#include "paged_kv.h"

namespace bark_fast {

constexpr int kQueryTile = 8;  // query rows of one sequence that share a pass over its keys
constexpr int kTile = 16;      // keys scored together; every page holds a whole number of tiles

// Query rows [row, row + rows) of sequence `seq` and one head against keys [first_key, last_key).
struct Unit {
    int32_t seq, row, rows, head;
    int32_t first_key, last_key;
    float* partial;  // null: write the result; else `rows` x partial_size(head_dim) floats: sums, maximum, total
    int64_t partial_stride;
    const Unit* next;  // what this thread does afterwards, if known: its first keys are fetched ahead
};

static inline int64_t partial_size(int32_t head_dim) { return head_dim + 2; }

struct Kernels {
    void (*attend)(const Attention& call, const Unit& unit);
    // Joins `parts` partial results, part_stride floats apart, into row `row` of head `head`.
    void (*combine)(const Attention& call, int32_t row, int32_t head, const float* partial, int parts,
                    int64_t part_stride);
};

using KernelTable = Kernels[3][3];  // [f32, f16, bf16][head_dim 32, 64, 128]

namespace isa_portable { extern const KernelTable kernels; }
#ifdef BARK_FAST_X86
namespace isa_avx2 { extern const KernelTable kernels; }
namespace isa_avx512 { extern const KernelTable kernels; }
namespace isa_avx512bf16 { extern const KernelTable kernels; }
#endif

}  // namespace bark_fast
