#include "paged_kv.h"

#include <cstring>

#include "attention_stage.h"
#include "parallel.h"

namespace bark_fast {
namespace cpu {
namespace {

// Bytes of memory traffic under which waking a thread costs more than it saves.
constexpr int64_t kLeastBytes = 64 * 1024;

}  // namespace

void paged_attention(const Attention& call, int threads) {
    thread_local AttentionPlan plan;  // kept between calls: a decode step makes one a layer, all of one shape
    plan.make(call, threads);
    if (plan.bytes < kLeastBytes) threads = 1;
    const AttentionStage stage(call, plan, threads, nullptr);
    const Stage* const stages[] = {&stage};
    run_stages(stages, 1, threads);
}

void append_kv(const Append& call, int threads) {
    const int64_t row_bytes = int64_t{call.pages.n_head} * call.pages.head_dim * size_of(call.dtype);
    if (call.rows * row_bytes < kLeastBytes) threads = 1;
    parallel_for(call.rows, 16, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row)
            for (int32_t head = 0; head < call.pages.n_head; ++head) append_head(call, row, head);
    });
}

void copy_pages(const Copy* copies, int count, int threads) {
    for (int i = 0; i < count; ++i) {
        const Copy& call = copies[i];
        if (call.page_bytes * call.count < kLeastBytes) threads = 1;
        // every thread takes a stripe of the page through all pairs, so that the pairs' order holds
        parallel_for(call.page_bytes, 4096, threads, [&](int64_t first, int64_t last) {
            for (int32_t pair = 0; pair < call.count; ++pair) {
                const int64_t from = call.pairs[2 * pair], to = call.pairs[2 * pair + 1];
                std::memmove(static_cast<char*>(call.destination) + to * call.page_bytes + first,
                             static_cast<const char*>(call.source) + from * call.page_bytes + first, last - first);
            }
        });
    }
}

void gather_kv(const Gather& call, int threads) {
    const int64_t row_bytes = int64_t{call.pages.head_dim} * call.element_size;
    if (call.length * row_bytes * call.pages.n_head < kLeastBytes) threads = 1;
    parallel_for(call.pages.n_head, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; ++head) {
            char* out = static_cast<char*>(call.out) + head * call.length * row_bytes;
            for (int32_t t = 0; t < call.length; t += call.pages.page_size) {
                const int32_t left = call.length - t;
                const int32_t tokens = left < call.pages.page_size ? left : call.pages.page_size;
                const int64_t from =
                    page_offset(call.pages, call.table[t / call.pages.page_size], static_cast<int32_t>(head), 0);
                std::memcpy(out + t * row_bytes, static_cast<const char*>(call.source) + from * call.element_size,
                            tokens * row_bytes);
            }
        }
    });
}

}  // namespace cpu
}  // namespace bark_fast
