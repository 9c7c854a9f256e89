// All layers of a decode step on the CPU: a few new rows a sequence.
#pragma once

#include "linear.h"
#include "paged_kv.h"

namespace bark_fast {

// x + out(attend(qkv(LN(x)))), then x + proj(gelu(fc(LN(x)))), over keys and values in pages, the new ones included.
struct DecodeLayer {
    Linear qkv;
    Append append;
    Attention attention;  // a sequence has at most kQueryTile rows
    Linear out, fc, proj;
};

namespace cpu {
// Layers read what those before them wrote.
void decode_layers(const DecodeLayer* layers, int count, int threads);
}  // namespace cpu

}  // namespace bark_fast
