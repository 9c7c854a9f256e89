#include "stages.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "parallel.h"

namespace bark_fast {
namespace {

constexpr int kSpins = 2000;

// Tickets are handed out in order, and a thread finishes its own in order, so whoever has the lowest unfinished one
// waits for nobody.
class Tickets {
public:
    int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }
    void finish() { done_.fetch_add(1, std::memory_order_release); }
    // Until the first `count` are finished; what was written under them can then be read.
    void wait_for(int64_t count) const {
        for (int spins = 0; done_.load(std::memory_order_acquire) < count; ++spins) {
            if (spins >= kSpins) {
                std::this_thread::yield();  // who is waited for may have no core
                continue;
            }
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
        }
    }

private:
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int64_t> done_{0};
};

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

struct Shared {
    const Stage* const* stages;
    std::vector<int64_t> ends;  // of each stage's tickets
    char* rooms;
    int64_t room_bytes;
    std::atomic<int> entered{0};
    Tickets tickets;
};

void work(Shared& s) {
    char* const room = s.rooms + s.room_bytes * s.entered.fetch_add(1, std::memory_order_relaxed);
    const int count = static_cast<int>(s.ends.size());
    const auto first_of = [&](int stage) { return stage ? s.ends[stage - 1] : 0; };
    int stage = 0, begun = -1;
    // one ticket is taken ahead, so that what it reads is asked for before it is needed
    for (int64_t ticket = s.tickets.take(), next;; ticket = next) {
        while (stage < count && ticket >= s.ends[stage]) ++stage;
        if (stage == count) return;
        next = s.tickets.take();
        int following = stage;
        while (following < count && next >= s.ends[following]) ++following;
        const Ahead ahead =
            following < count ? s.stages[following]->ahead(next - first_of(following)) : Ahead{nullptr, 0};
        const Stage& current = *s.stages[stage];
        if (begun != stage) {
            s.tickets.wait_for(first_of(stage));
            current.begin(room);
            begun = stage;
        }
        current.run(ticket - first_of(stage), following == stage ? next - first_of(stage) : -1, ahead, room);
        s.tickets.finish();
    }
}

}  // namespace

void run_stages(const Stage* const* stages, int count, int threads) {
    Shared shared;
    shared.stages = stages;
    int64_t tickets = 0, bytes = 0;
    for (int i = 0; i < count; ++i) {
        shared.ends.push_back(tickets += stages[i]->tickets());
        bytes = std::max(bytes, stages[i]->room());
    }
    if (tickets == 0) return;
    threads = std::max(threads, 1);
    shared.room_bytes = (bytes + 63) / 64 * 64;
    shared.rooms = room_for(shared.room_bytes * threads);
    run_on_threads(threads, [](void* context) { work(*static_cast<Shared*>(context)); }, &shared);
}

}  // namespace bark_fast
