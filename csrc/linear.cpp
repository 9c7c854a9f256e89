#include "linear.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "linear_stage.h"

namespace bark_fast {
namespace cpu {
namespace {

const PerIsa<LinearKernelTable> kTables = {
    &isa_portable::linear_kernels,
#ifdef BARK_FAST_X86
    &isa_avx2::linear_kernels,
    &isa_avx512::linear_kernels,
    &isa_avx512::linear_kernels,
#endif
};

const LinearKernels* kernels_for(const Linear& call) {
#ifdef BARK_FAST_X86
    if (call.dtype == DType::bf16 && !call.scales && bf16_in_pairs())
        return &isa_avx512bf16::linear_kernels_bf16;
#endif
    return &kTables.chosen()[call.scales ? 1 : 0][static_cast<int>(call.dtype)];
}

// Bytes of weights of one ticket: large beside the cost of taking one and of finding another place in memory, small
// beside what a layer has.
constexpr int64_t kLeastTicket = 48 * 1024, kMostTicket = 96 * 1024, kTickets = 16;
// Bytes of weights under which waking a thread costs more than it saves.
constexpr int64_t kLeastBytes = 64 * 1024;

}  // namespace

bool bf16_in_pairs() {
#ifdef BARK_FAST_X86
    return chosen_isa() > kAvx512 && !intels_cpu;  // whose dot products are slower than fma, see linear_kernels.inl
#else
    return false;
#endif
}

LinearStage::LinearStage(const Linear& call)
    : call_(call), kernels_(kernels_for(call)) {
    const int64_t line = std::max<int64_t>(1, call.k * weight_size(call)), block = kernels_->block(call.rows, call.k);
    const int64_t ticket = std::clamp(weight_bytes() / kTickets, kLeastTicket, kMostTicket);
    outputs_ = block * std::max<int64_t>(1, std::min(kMostOutputs, ticket / line) / block);
}

int64_t LinearStage::tickets() const { return call_.rows ? (call_.n + outputs_ - 1) / outputs_ : 0; }

Ahead LinearStage::ahead(int64_t ticket) const {
    const int64_t stride = call_.weight_stride * weight_size(call_);
    return {static_cast<const char*>(call_.weight) + ticket * outputs_ * stride, stride};
}

void LinearStage::run(int64_t ticket, int64_t, Ahead ahead, char* room) const {
    const int64_t first = ticket * outputs_;
    kernels_->multiply(call_, room, first, std::min(first + outputs_, call_.n), ahead);
}

int useful_threads(int threads, int64_t bytes) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, bytes / kLeastBytes)));
}

void linear_chain(const Linear* calls, int count, int threads) {
    std::vector<LinearStage> stages(calls, calls + count);
    std::vector<const Stage*> order;
    int64_t bytes = 0;
    for (const LinearStage& stage : stages) {
        order.push_back(&stage);
        bytes += stage.weight_bytes();
    }
    run_stages(order.data(), count, useful_threads(threads, bytes));
}

}  // namespace cpu
}  // namespace bark_fast
