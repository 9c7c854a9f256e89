// Linear layers of many rows on the CPU: fp32, with LayerNorm, GELU and residual.
#pragma once

#include "linear.h"

namespace bark_fast {
namespace cpu {

// Any number of rows. call.dtype is f32.
void gemm(const Linear& call, int threads);

// Whether `gemm` is faster here than what torch brings along. MKL, which its x86 builds multiply fp32 with, keeps to
// AVX2 on CPUs that are not Intel's: half of what one with full-width AVX-512 (Zen 5) can do.
bool gemm_pays();

}  // namespace cpu
}  // namespace bark_fast
