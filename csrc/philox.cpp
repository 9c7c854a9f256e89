#include "philox.h"

namespace bark_fast {
namespace {

constexpr int kBlocks = 16;  // computed side by side

}  // namespace

void philox_uniform(uint64_t seed, uint32_t stream, uint32_t chunk, uint32_t first_step, int64_t rows, int64_t width,
                    float* out) {
    for (int64_t row = 0; row < rows; ++row, out += width) {
        for (int64_t from = 0; from < width; from += 4 * kBlocks) {
            uint32_t c[4][kBlocks];
            for (int i = 0; i < kBlocks; ++i) {
                c[0][i] = static_cast<uint32_t>(from / 4 + i);
                c[1][i] = first_step + static_cast<uint32_t>(row);
                c[2][i] = stream;
                c[3][i] = chunk;
            }
            uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
            for (int round = 0; round < 10; ++round) {
                for (int i = 0; i < kBlocks; ++i) {
                    const uint64_t product0 = uint64_t{c[0][i]} * 0xD2511F53u, product1 = uint64_t{c[2][i]} * 0xCD9E8D57u;
                    c[0][i] = static_cast<uint32_t>(product1 >> 32) ^ c[1][i] ^ key0;
                    c[1][i] = static_cast<uint32_t>(product1);
                    c[2][i] = static_cast<uint32_t>(product0 >> 32) ^ c[3][i] ^ key1;
                    c[3][i] = static_cast<uint32_t>(product0);
                }
                key0 += 0x9E3779B9u;
                key1 += 0xBB67AE85u;
            }
            float found[4 * kBlocks];
            for (int i = 0; i < kBlocks; ++i)
                for (int lane = 0; lane < 4; ++lane)
                    found[4 * i + lane] =
                        (static_cast<float>(static_cast<int32_t>(c[lane][i] >> 9)) + 0.5f) * (1.0f / 8388608.0f);
            const int64_t count = width - from < 4 * kBlocks ? width - from : 4 * kBlocks;
            for (int64_t j = 0; j < count; ++j) out[from + j] = found[j];
        }
    }
}

}  // namespace bark_fast
