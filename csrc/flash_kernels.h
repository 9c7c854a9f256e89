// What flash.cpp asks of each instruction set.
#pragma once

#include "flash.h"

namespace bark_fast {

struct FlashKernels {
    int64_t (*panels)(int64_t rows);
    // Floats that `attend` needs to itself, from a multiple of 64 bytes on.
    int64_t (*room)(int64_t head_dim);
    // Rows of one panel of one head.
    void (*attend)(const Flash& call, int64_t batch, int64_t head, int64_t panel, float* room);
};

namespace isa_portable { extern const FlashKernels flash_kernels_f32; }
#ifdef BARK_FAST_X86
namespace isa_avx2 { extern const FlashKernels flash_kernels_f32; }
namespace isa_avx512 { extern const FlashKernels flash_kernels_f32; }
namespace isa_avx512bf16 { extern const FlashKernels flash_kernels_bf16; }
#endif

}  // namespace bark_fast
