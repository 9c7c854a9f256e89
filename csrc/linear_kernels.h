// What linear.cpp asks of each instruction set.
#pragma once

#include "linear.h"
#include "stages.h"

namespace bark_fast {

constexpr int64_t kMostOutputs = 64;  // of one call of `multiply`

struct LinearKernels {
    // Bytes of rows x k as `multiply` wants them, and putting them there, normalised if the call says so.
    int64_t (*packed_bytes)(int64_t rows, int64_t k);
    void (*pack)(const Linear& call, void* packed);
    // Outputs [first, last) of all rows, at most kMostOutputs of them.
    void (*multiply)(const Linear& call, const void* packed, int64_t first, int64_t last, Ahead ahead);
    // Outputs that are computed together: ranges are best a multiple of it.
    int64_t (*block)(int64_t rows, int64_t k);
};

using LinearKernelTable = LinearKernels[2][3];  // [weights of the call's dtype, int8][f32, f16, bf16]

namespace isa_portable { extern const LinearKernelTable linear_kernels; }
#ifdef BARK_FAST_X86
namespace isa_avx2 { extern const LinearKernelTable linear_kernels; }
namespace isa_avx512 { extern const LinearKernelTable linear_kernels; }
namespace isa_avx512bf16 { extern const LinearKernels linear_kernels_bf16; }
#endif

}  // namespace bark_fast
