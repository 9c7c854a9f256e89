// What the bindings of the paged cache demand of their arguments.
#pragma once

#include "checks.h"
#include "paged_kv.h"

namespace bark_fast {

// Pages of one layer: (num_pages, n_head, page_size, head_dim), contiguous, a floating dtype.
inline PageShape check_pages(const TensorView& t) {
    check_shape(t, {-1, -1, -1, -1});
    check_floating(t);
    check_packed(t, 0);
    check_aligned(t);
    check_fits(t, 0, INT32_MAX);
    check_fits(t, 1, 65535);
    const int64_t page_size = t.shape[2], head_dim = t.shape[3];
    if (page_size != 16 && page_size != 32 && page_size != 64)
        reject(std::string(t.name) + " has page_size " + std::to_string(page_size) + "; expected 16, 32 or 64");
    if (head_dim != 32 && head_dim != 64 && head_dim != 128)
        reject(std::string(t.name) + " has head_dim " + std::to_string(head_dim) + "; expected 32, 64 or 128");
    return {t.shape[0], static_cast<int32_t>(t.shape[1]), static_cast<int32_t>(page_size),
            static_cast<int32_t>(head_dim)};
}

inline PageShape check_page_pair(const TensorView& k, const TensorView& v) {
    const PageShape pages = check_pages(k);
    check_dtype(v, k.dtype);
    check_same_device(v, k);
    check_shape(v, {k.shape[0], k.shape[1], k.shape[2], k.shape[3]});
    check_packed(v, 0);
    check_aligned(v);
    return pages;
}

// The values that lie in host memory, before anything is written.

inline void check_value(const char* name, int64_t index, int64_t value, int64_t low, int64_t high) {
    if (value < low || value >= high)
        reject(std::string(name) + "[" + std::to_string(index) + "] is " + std::to_string(value) +
               "; expected a value in [" + std::to_string(low) + ", " + std::to_string(high) + ")");
}

inline void check_slots(const Append& call) {
    const int64_t end = call.pages.num_pages * call.pages.page_size;
    for (int32_t row = 0; row < call.rows; ++row) check_value("slots", row, call.slots[row], -1, end);
}

inline void check_table(const char* name, const int32_t* table, int64_t first, int32_t length, const PageShape& s) {
    const int32_t used = (length + s.page_size - 1) / s.page_size;
    for (int32_t i = 0; i < used; ++i) check_value(name, first + i, table[i], 0, s.num_pages);
}

// Every length, row range and table entry that will be read. Entries past a sequence's last page are not.
inline void check_attention(const Attention& call, int64_t table_columns) {
    const int64_t most = table_columns * call.pages.page_size;
    check_value("query_starts", 0, call.query_starts[0], 0, 1);
    for (int32_t seq = 0; seq < call.seqs; ++seq) {
        check_value("query_starts", seq + 1, call.query_starts[seq + 1], call.query_starts[seq],
                    int64_t{call.rows} + 1);
        check_value("lengths", seq, call.lengths[seq], 0, most + 1);
        check_table("block_table", call.block_table + seq * call.table_stride, seq * table_columns, call.lengths[seq],
                    call.pages);
    }
    check_value("query_starts", call.seqs, call.query_starts[call.seqs], call.rows, int64_t{call.rows} + 1);
}

inline void check_pairs(const Copy& call) {
    for (int32_t i = 0; i < call.count; ++i) {
        check_value("pairs", 2 * i, call.pairs[2 * i], 0, call.source_pages);
        check_value("pairs", 2 * i + 1, call.pairs[2 * i + 1], 0, call.destination_pages);
    }
}

}  // namespace bark_fast
