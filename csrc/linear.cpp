#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "linear_kernels.h"
#include "parallel.h"

namespace bark_fast {
namespace cpu {
namespace {

const PerIsa<LinearKernelTable> kTables = {
    &isa_portable::linear_kernels,
#ifdef BARK_FAST_X86
    &isa_avx2::linear_kernels,
    &isa_avx512::linear_kernels,
    &isa_avx512::linear_kernels,  // its dot products are slower than fma here, see linear_kernels.inl
#endif
};

// Bytes of weights of one ticket: large beside the cost of taking one, small beside what a layer has.
constexpr int64_t kTicketBytes = 48 * 1024;
// Bytes of weights under which waking a thread costs more than it saves.
constexpr int64_t kLeastBytes = 64 * 1024;

// One call as tickets [first, last).
struct Phase {
    const Linear* call;
    const LinearKernels* kernels;
    int64_t first, last;
    int64_t outputs;  // of one ticket
};

Ahead ahead_of(const Phase& phase, int64_t ticket) {
    const int64_t size = size_of(phase.call->dtype);
    const int64_t line = (ticket - phase.first) * phase.outputs, stride = phase.call->weight_stride * size;
    return {static_cast<const char*>(phase.call->weight) + line * stride, stride};
}

// Room kept between calls; grows, and is aligned to a cache line.
char* room_for(int64_t bytes) {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    thread_local std::unique_ptr<void, Free> room;
    thread_local int64_t size = 0;
    if (size < bytes) {
        room.reset();
        size = 0;
        const int64_t rounded = (bytes + 4095) / 4096 * 4096;
        room.reset(std::aligned_alloc(64, rounded));
        if (!room) throw std::bad_alloc();
        size = rounded;
    }
    return static_cast<char*>(room.get());
}

}  // namespace

void linear_chain(const Linear* calls, int count, int threads) {
    std::vector<Phase> phases;
    int64_t tickets = 0, bytes = 0, packed_bytes = 0;
    const LinearKernelTable& table = kTables.chosen();
    for (int i = 0; i < count; ++i) {
        const Linear& call = calls[i];
        if (call.rows == 0 || call.n == 0) continue;
        const LinearKernels& kernels = table[static_cast<int>(call.dtype)];
        const int64_t line = std::max<int64_t>(1, call.k * size_of(call.dtype)), block = kernels.block(call.rows);
        const int64_t blocks = std::max<int64_t>(1, std::min(kMostOutputs, kTicketBytes / line) / block);
        const int64_t outputs = blocks * block;
        const int64_t last = tickets + (call.n + outputs - 1) / outputs;
        phases.push_back({&call, &kernels, tickets, last, outputs});
        tickets = last;
        bytes += call.n * line;
        packed_bytes = std::max(packed_bytes, kernels.packed_bytes(call.rows, call.k));
    }
    if (tickets == 0) return;
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, bytes / kLeastBytes)));
    packed_bytes = (packed_bytes + 63) / 64 * 64;
    struct Shared {
        const std::vector<Phase>* phases;
        char* rooms;  // one of packed_bytes for each thread, which packs for itself: x is small, its L1 is near
        int64_t packed_bytes;
        std::atomic<int> entered;
        Tickets tickets;
    } shared{&phases, room_for(packed_bytes * threads), packed_bytes, {0}, {}};
    const auto body = [](void* context) {
        auto& s = *static_cast<Shared*>(context);
        void* packed = s.rooms + s.packed_bytes * s.entered.fetch_add(1, std::memory_order_relaxed);
        const Phase* phase = s.phases->data();
        const Phase* const end = phase + s.phases->size();
        const Phase* packed_for = nullptr;
        // one ticket is taken ahead, so that its weights are asked for before they are needed
        for (int64_t ticket = s.tickets.take(), next;; ticket = next) {
            while (phase != end && ticket >= phase->last) ++phase;
            if (phase == end) return;
            next = s.tickets.take();
            const Phase* follows = phase;
            while (follows != end && next >= follows->last) ++follows;
            const Ahead ahead = follows == end ? ahead_of(*phase, ticket) : ahead_of(*follows, next);
            const Linear& call = *phase->call;
            if (packed_for != phase) {
                s.tickets.wait_for(phase->first);
                phase->kernels->pack(call, packed);
                packed_for = phase;
            }
            const int64_t first = (ticket - phase->first) * phase->outputs;
            phase->kernels->multiply(call, packed, first, std::min(first + phase->outputs, call.n), ahead);
            s.tickets.finish();
        }
    };
    run_on_threads(threads, body, &shared);
}

}  // namespace cpu
}  // namespace bark_fast
