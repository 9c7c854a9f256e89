// What flash.cpp asks of each instruction set.
#pragma once

#include "flash.h"

namespace bark_fast {

struct FlashKernels {
    // Rows are cut into so many panels, of which so many are best taken together.
    int64_t (*panels)(int64_t rows);
    int64_t together;
    // Floats that `attend` needs to itself, from a multiple of 64 bytes on.
    int64_t (*room)(int64_t keys, int64_t head_dim);
    // Rows of the panels [first, last) of one head.
    void (*attend)(const Flash& call, int64_t batch, int64_t head, int64_t first, int64_t last, float* room);
};

using FlashKernelTable = FlashKernels[3];  // [f32, f16, bf16]

namespace isa_portable { extern const FlashKernelTable flash_kernels; }
#ifdef BARK_FAST_X86
namespace isa_avx2 { extern const FlashKernelTable flash_kernels; }
namespace isa_avx512 { extern const FlashKernelTable flash_kernels; }
namespace isa_avx512bf16 { extern const FlashKernels flash_kernels_bf16; }
#endif

}  // namespace bark_fast
