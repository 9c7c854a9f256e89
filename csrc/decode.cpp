#include "decode.h"

#include <vector>

#include "attention_stage.h"
#include "linear_stage.h"

namespace bark_fast {
namespace cpu {

void decode_layers(const DecodeLayer* layers, int count, int threads) {
    if (count == 0) return;
    thread_local AttentionPlan plan;
    plan.make(layers[0].attention, threads);
    std::vector<LinearStage> linears;
    std::vector<AttentionStage> attentions;
    linears.reserve(4 * count);
    attentions.reserve(count);
    std::vector<const Stage*> order;
    const auto add = [&](const Linear& call) {
        linears.emplace_back(call);
        order.push_back(&linears.back());
    };
    for (const DecodeLayer* layer = layers; layer != layers + count; ++layer) {
        add(layer->qkv);
        attentions.emplace_back(layer->attention, plan, threads, &layer->append);
        order.push_back(&attentions.back());
        for (const Linear* call : {&layer->out, &layer->fc, &layer->proj}) add(*call);
    }
    int64_t bytes = count * plan.bytes;
    for (const LinearStage& linear : linears) bytes += linear.weight_bytes();
    run_stages(order.data(), static_cast<int>(order.size()), useful_threads(threads, bytes));
}

}  // namespace cpu
}  // namespace bark_fast
