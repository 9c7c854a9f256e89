// What the bindings of the paged cache demand of their arguments. Each check throws std::invalid_argument (ValueError
// in Python) with the argument's name, its value and the bound.
#pragma once

#include <initializer_list>
#include <string>

#include "paged_kv.h"
#include "tensor_view.h"

namespace bark_fast {

[[noreturn]] inline void reject(const std::string& what) { throw std::invalid_argument(what); }

inline std::string shape_of(const TensorView& t) {
    std::string text = "(";
    for (int i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
    return text + (t.ndim == 1 ? ",)" : ")");
}

inline void check_dtype(const TensorView& t, DType dtype) {
    if (t.dtype != dtype) reject(std::string(t.name) + " is " + name_of(t.dtype) + "; expected " + name_of(dtype));
}

// A dimension of -1 takes any size.
inline void check_shape(const TensorView& t, std::initializer_list<int64_t> shape) {
    bool same = t.ndim == static_cast<int>(shape.size());
    std::string wanted;
    int i = 0;
    for (const int64_t size : shape) {
        same = same && (size < 0 || t.shape[i] == size);
        wanted += (i++ ? ", " : "") + (size < 0 ? "any" : std::to_string(size));
    }
    if (!same)
        reject(std::string(t.name) + " has shape " + shape_of(t) + "; expected (" + wanted + (i == 1 ? ",)" : ")"));
}

// Dimensions from `first` on lie one after another in memory.
inline void check_packed(const TensorView& t, int first) {
    for (int i = 0; i < t.ndim; ++i)
        if (t.shape[i] == 0) return;
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= first; --i) {
        if (t.shape[i] > 1 && t.strides[i] != stride)
            reject(std::string(t.name) + " has stride " + std::to_string(t.strides[i]) + " in dimension " +
                   std::to_string(i) + "; expected " + std::to_string(stride) + " (contiguous)");
        stride *= t.shape[i];
    }
}

// Rows may lie anywhere, but not on top of each other or backwards when they are written.
inline void check_rows(const TensorView& t, int64_t width) {
    if (t.shape[0] > 1 && t.strides[0] < width)
        reject(std::string(t.name) + " has row stride " + std::to_string(t.strides[0]) + "; expected at least " +
               std::to_string(width));
}

// CUDA kernels move 16 bytes at a time; the CPU code takes any address that its elements may have.
inline void check_aligned(const TensorView& t) {
    const uintptr_t unit = t.cuda ? 16 : static_cast<uintptr_t>(size_of(t.dtype));
    if (reinterpret_cast<uintptr_t>(t.data) % unit)
        reject(std::string(t.name) + " starts at an address that is not a multiple of " + std::to_string(unit));
    if (t.cuda && t.ndim > 1 && t.shape[0] > 1 && t.strides[0] * size_of(t.dtype) % 16)
        reject(std::string(t.name) + " has a row stride of " + std::to_string(t.strides[0] * size_of(t.dtype)) +
               " bytes; expected a multiple of 16");
}

inline void check_same_device(const TensorView& t, const TensorView& as) {
    if (t.cuda != as.cuda || t.device_index != as.device_index) {
        const auto device = [](const TensorView& v) {
            return v.cuda ? "cuda:" + std::to_string(v.device_index) : std::string("cpu");
        };
        reject(std::string(t.name) + " is on " + device(t) + "; expected " + device(as) + " as " + as.name);
    }
}

inline void check_fits(const TensorView& t, int dim, int64_t most) {
    if (t.shape[dim] > most)
        reject(std::string(t.name) + " has " + std::to_string(t.shape[dim]) + " entries in dimension " +
               std::to_string(dim) + "; at most " + std::to_string(most));
}

// Pages of one layer: (num_pages, n_head, page_size, head_dim), contiguous, a floating dtype.
inline PageShape check_pages(const TensorView& t) {
    check_shape(t, {-1, -1, -1, -1});
    if (t.dtype == DType::i32 || t.dtype == DType::i64)
        reject(std::string(t.name) + " is " + name_of(t.dtype) + "; expected float32, float16 or bfloat16");
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
