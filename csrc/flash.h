// Attention over contiguous keys and values on the CPU: prompts and fine windows.
//
// What Python may pass is checked in flash_bindings.cpp; here everything is taken to be true.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace bark_fast {

// (batch, heads, rows, head_dim), elements of a row adjacent. Strides in elements.
template <class Pointer>
struct HeadRows {
    Pointer data;
    int64_t batch_stride, head_stride, row_stride;
};

// softmax(scale q k^T) v; causal: aligned at the last query and key, keys >= rows.
struct Flash {
    DType dtype;  // f32, f16 or bf16
    HeadRows<const void*> query, key, value;
    HeadRows<void*> out;  // overlaps nothing that is read
    int64_t batch, heads, rows, keys, head_dim;  // keys > 0; head_dim: even
    float scale;                                 // positive
    bool causal;
};

namespace cpu {

void flash(const Flash& call, int threads);
}  // namespace cpu
}  // namespace bark_fast
