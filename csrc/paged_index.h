// Index arithmetic of the paged cache, one copy for the CPU code, the CUDA kernels and the tests.
//
// Everything that counts elements of a cache is 64-bit: 2,048 pages x 16 heads x 64 tokens x 64 elements is 2^27, and a
// cache on a large GPU passes 2^31. Functions have internal linkage on purpose: these headers are compiled with
// different instruction sets, and a shared inline copy could be the one this machine cannot run.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BARK_FAST_HD static __host__ __device__ __forceinline__
#else
#define BARK_FAST_HD static inline
#endif

namespace bark_fast {

// Geometry of the K or V pages of one layer: (num_pages, n_head, page_size, head_dim), contiguous.
struct PageShape {
    int64_t num_pages;
    int32_t n_head;
    int32_t page_size;  // a power of two
    int32_t head_dim;
};

BARK_FAST_HD int64_t page_elements(const PageShape& s) {
    return static_cast<int64_t>(s.n_head) * s.page_size * s.head_dim;
}

// Element offset of token `offset` of head `head` in page `page`.
BARK_FAST_HD int64_t page_offset(const PageShape& s, int64_t page, int32_t head, int32_t offset) {
    return ((page * s.n_head + head) * s.page_size + offset) * s.head_dim;
}

// Element offset of a slot (page * page_size + token in page) of head `head`.
BARK_FAST_HD int64_t slot_offset(const PageShape& s, int64_t slot, int32_t head) {
    return page_offset(s, slot / s.page_size, head, static_cast<int32_t>(slot % s.page_size));
}

BARK_FAST_HD bool slot_in_range(const PageShape& s, int64_t slot) {
    return slot >= 0 && slot < s.num_pages * s.page_size;
}

// Keys that row `row` of a sequence's `rows` query rows sees: causal, aligned bottom-right. May be <= 0.
BARK_FAST_HD int32_t visible_keys(int32_t length, int32_t rows, int32_t row) { return length - rows + row + 1; }

// The sequence that owns a query row: the last s with query_starts[s] <= row. Empty sequences own nothing.
BARK_FAST_HD int32_t sequence_of_row(const int32_t* query_starts, int32_t seqs, int32_t row) {
    int32_t low = 0, high = seqs;
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        if (query_starts[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// First key of part `part` of `parts` nearly equal parts of `keys`, on a multiple of `grain` (or the end).
BARK_FAST_HD int32_t part_start(int32_t keys, int32_t parts, int32_t part, int32_t grain) {
    const int64_t grains = (keys + grain - 1) / grain;
    const int64_t start = grains * part / parts * grain;
    return start < keys ? static_cast<int32_t>(start) : keys;
}

}  // namespace bark_fast
