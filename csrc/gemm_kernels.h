// What gemm.cpp asks of each instruction set.
#pragma once

#include "linear.h"

namespace bark_fast {

constexpr int64_t kGemmOutputs = 48;  // of one call of `multiply`, at most; a multiple of all vectors' widths
constexpr int64_t kGemmRows = 256;    // likewise

struct GemmKernels {
    // Rows are cut into so many panels, of which so many are multiplied together.
    int64_t (*panels)(int64_t rows);
    int64_t together;
    // Floats of all panels.
    int64_t (*packed_size)(int64_t rows, int64_t k);
    // One panel's rows, normalised if the call says so, to where `multiply` looks for them.
    void (*pack)(const Linear& call, int64_t panel, float* packed);
    // Outputs [first, last) of the rows of these panels.
    void (*multiply)(const Linear& call, const float* packed, int64_t first_panel, int64_t last_panel, int64_t first,
                     int64_t last);
};

using GemmKernelTable = GemmKernels[3];  // [f32, f16, bf16]

namespace isa_portable { extern const GemmKernelTable gemm_kernels; }
#ifdef BARK_FAST_X86
namespace isa_avx2 { extern const GemmKernelTable gemm_kernels; }
namespace isa_avx512 { extern const GemmKernelTable gemm_kernels; }
#endif

}  // namespace bark_fast
