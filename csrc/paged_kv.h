// Operations on a paged key-value cache. K and V pages of one layer: (num_pages, n_head, page_size, head_dim).
//
// What Python may pass is checked in paged_kv_checks.h; here everything is taken to be true.
#pragma once

#include <cstdint>
#include <string>

#include "dtype.h"
#include "paged_index.h"

namespace bark_fast {

// One call of paged_attention, or on CUDA of append_attention. Strides in elements.
struct Attention {
    PageShape pages;
    DType dtype;
    const void* query;  // (rows, n_head, head_dim), rows query_stride apart; with slots, rows of q | k | v
    int64_t query_stride;
    void* k_pages;  // written with slots only
    void* v_pages;
    const int32_t* block_table;  // (seqs, table_stride)
    int64_t table_stride;
    const int32_t* lengths;       // (seqs,)
    const int32_t* query_starts;  // (seqs + 1,)
    void* out;                    // (rows, n_head * head_dim), rows out_stride apart
    int64_t out_stride;
    int32_t seqs;
    int32_t rows;
    float scale;
    const int64_t* slots;  // null, or (rows,): where k and v of the rows go, -1 for nowhere
};

// One call of append_kv: row r of qkv holds q, k and v of n_head * head_dim each; k and v go to slots[r].
struct Append {
    PageShape pages;
    DType dtype;
    const void* qkv;
    int64_t qkv_stride;
    void* k_pages;
    void* v_pages;
    const int64_t* slots;  // -1 skips the row
    int32_t rows;
};

// Pages to copy: pairs (source, destination), carried out in order.
struct Copy {
    const void* source;
    void* destination;
    int64_t page_bytes;
    int64_t source_pages;
    int64_t destination_pages;
    const int32_t* pairs;
    int32_t count;
};

// One sequence's pages to a contiguous (n_head, length, head_dim).
struct Gather {
    PageShape pages;
    int32_t element_size;
    const void* source;
    const int32_t* table;
    int32_t length;
    void* out;
};

namespace cpu {
void append_kv(const Append& call, int threads);
void paged_attention(const Attention& call, int threads);
void copy_pages(const Copy* copies, int count, int threads);
void gather_kv(const Gather& call, int threads);
}  // namespace cpu

#ifdef BARK_FAST_CUDA
// Everything is enqueued on `stream`, nothing is allocated, nothing waits; errors are thrown as std::runtime_error.
namespace cuda {
// Room to split the context over blocks: parts x rows x n_head x (head_dim + 2) floats and rows x n_head counters, zero
// before the first launch and left at zero by each. For one stream at a time. Null: the context is not split.
struct Scratch {
    float* partials;
    int32_t* counters;
    int64_t partial_count;
    int64_t counter_count;
};
// Why kernels cannot run on a device (no code for it, too old a driver); empty where they can.
std::string fault(int device);
void append_kv(const Append& call, int device, void* stream);
void paged_attention(const Attention& call, int32_t max_keys, const Scratch& scratch, int device, void* stream);
void copy_pages(const Copy* copies, int count, int device, void* stream);
void gather_kv(const Gather& call, int device, void* stream);
// Between pinned host memory and the device, by the copy engine; `pairs` lie on the host.
void swap_pages(const Copy& call, int device, void* stream);
}  // namespace cuda
#endif

}  // namespace bark_fast
