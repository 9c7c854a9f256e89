// Random words of Philox4x32-10 (Salmon et al., SC'11) as uniform numbers.
#pragma once

#include <cstdint>

namespace bark_fast {

// out[r * width + j], the lane j % 4 of the block at counter (j / 4, first_step + r, stream, chunk) under `seed`, as
// (word / 512 + 1/2) / 2^23: exact in fp32, inside (0, 1).
void philox_uniform(uint64_t seed, uint32_t stream, uint32_t chunk, uint32_t first_step, int64_t rows, int64_t width,
                    float* out);

}  // namespace bark_fast
