// Linear layers of many rows on the CPU, with LayerNorm, GELU and residual.
#pragma once

#include "linear.h"

namespace bark_fast {
namespace cpu {

// Any number of rows.
void gemm(const Linear& call, int threads);

}  // namespace cpu
}  // namespace bark_fast
