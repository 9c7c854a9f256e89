#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simulated {

int processors = 132;

namespace {

// Where somebody stopped, on a stack of their own; `leave` stops there and goes on at `to`.
#if defined(__x86_64__)
// swapcontext asks the kernel for the signal mask at every turn, which takes most of a test's time
struct Place {
    void* stack_pointer;
};
extern "C" void simulated_leave(Place* from, const Place* to);
asm(R"(
    .text
    .type simulated_leave, @function
simulated_leave:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simulated_leave, . - simulated_leave
)");
void leave(Place& from, const Place& to) { simulated_leave(&from, &to); }
void prepare(Place& place, char* stack, size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
    *--top = nullptr;  // where entry would return to, so that the stack is aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    place.stack_pointer = top - 6;  // what is popped first does not matter
}
#else
using Place = ucontext_t;
void leave(Place& from, const Place& to) { swapcontext(&from, &to); }
void prepare(Place& place, char* stack, size_t bytes, void (*entry)()) {
    getcontext(&place);
    place.uc_stack.ss_sp = stack;
    place.uc_stack.ss_size = bytes;
    makecontext(&place, entry, 0);
}
#endif

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kWarp = 32, kMostThreads = 1024;

enum class State { ready, at_shuffle, at_barrier, done };

struct Fiber {
    Place place;
    std::unique_ptr<char[]> stack;
    bool begun;  // its thread of the last block has ended, and waits for the next block's
    State state;
    unsigned shuffles;  // how many it has passed; its parity picks the slots, so nobody overwrites what is still read
};

struct Warp {
    uint32_t slots[2][kWarp];
    unsigned waiting;
};

std::mutex one_launch;
std::vector<Fiber> fibers;
std::vector<unsigned> order, places;  // the order in which threads take turns, and each thread's place in it
Warp warps[kMostThreads / kWarp];
unsigned threads, current, waiting;
Place outside;
const std::function<void()>* body;
std::string failure;
std::mt19937 randomness;

[[noreturn]] void give_up(const std::string& why) {
    failure = why + " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
              std::to_string(blockIdx.z) + ")";
    for (Fiber& fiber : fibers) fiber.begun = false;  // left where they are; they own nothing
    leave(fibers[current].place, outside);
    __builtin_unreachable();
}

// Goes on with the next thread that can; back outside when all are done.
void take_turns() {
    Fiber& mine = fibers[current];
    for (unsigned step = 1; step <= threads; ++step) {
        const unsigned next = order[(places[current] + step) % threads];
        if (fibers[next].state != State::ready) continue;
        if (next == current) return;
        current = next;
        threadIdx = {next, 0, 0};
        leave(mine.place, fibers[next].place);
        return;
    }
    for (unsigned thread = 0; thread < threads; ++thread) {
        if (fibers[thread].state == State::done) continue;
        const bool shuffle = fibers[thread].state == State::at_shuffle;
        give_up("thread " + std::to_string(thread) + " waits at a " +
                (shuffle ? "shuffle that not all lanes of its warp reach"
                         : "barrier that not all threads of its block reach"));
    }
    leave(mine.place, outside);
}

void start() {
    for (;;) {
        (*body)();
        fibers[current].state = State::done;
        take_turns();
    }
}

void run_block() {
    waiting = 0;
    for (Warp& warp : warps) warp.waiting = 0;
    // warps in a random order, as are the lanes of each
    std::vector<unsigned> warp_order(threads / kWarp);
    for (unsigned warp = 0; warp < warp_order.size(); ++warp) warp_order[warp] = warp;
    std::shuffle(warp_order.begin(), warp_order.end(), randomness);
    for (unsigned warp = 0; warp < warp_order.size(); ++warp) {
        const auto first = order.begin() + warp * kWarp;
        for (unsigned lane = 0; lane < kWarp; ++lane) first[lane] = warp_order[warp] * kWarp + lane;
        std::shuffle(first, first + kWarp, randomness);
    }
    for (unsigned place = 0; place < threads; ++place) {
        places[order[place]] = place;
        Fiber& fiber = fibers[order[place]];
        fiber.state = State::ready;
        fiber.shuffles = 0;
        if (!fiber.begun) prepare(fiber.place, fiber.stack.get(), kStackBytes, start);
        fiber.begun = true;
    }
    current = order[0];
    threadIdx = {current, 0, 0};
    leave(outside, fibers[current].place);
}

}  // namespace

bool run(dim3 grid, dim3 block, const std::function<void()>& thread) {
    const std::lock_guard<std::mutex> alone(one_launch);
    failure.clear();
    threads = block.x;
    if (block.y != 1 || block.z != 1 || threads == 0 || threads > kMostThreads || threads % kWarp) {
        failure = "a block is not one row of up to 1024 threads in whole warps";
        return false;
    }
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        failure = "the grid is empty or larger than CUDA's";
        return false;
    }
    fibers.reserve(kMostThreads);  // whoever waits must not be moved
    while (fibers.size() < threads) {
        fibers.emplace_back();
        fibers.back().stack.reset(new char[kStackBytes]);
    }
    order.resize(threads);
    places.resize(threads);
    blockDim = block;
    gridDim = grid;
    body = &thread;
    std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
    for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), randomness);
    for (const uint64_t i : blocks) {
        blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y)};
        run_block();
        if (!failure.empty()) return false;
    }
    return true;
}

const char* reason() { return failure.c_str(); }

void block_barrier() {
    if (++waiting < threads) {
        fibers[current].state = State::at_barrier;
        take_turns();
        return;
    }
    waiting = 0;
    for (unsigned thread = 0; thread < threads; ++thread)
        if (fibers[thread].state == State::at_barrier) fibers[thread].state = State::ready;
}

uint32_t exchange(uint32_t bits, uint32_t mask, int flip) {
    if (mask != 0xffffffffu) give_up("a shuffle of a part of a warp, which is not simulated");
    const unsigned first = current / kWarp * kWarp, lane = current % kWarp;
    Warp& warp = warps[current / kWarp];
    uint32_t* slots = warp.slots[fibers[current].shuffles++ % 2];
    slots[lane] = bits;
    if (++warp.waiting < kWarp) {
        fibers[current].state = State::at_shuffle;
        take_turns();
    } else {
        warp.waiting = 0;
        for (unsigned other = first; other < first + kWarp; ++other)
            if (fibers[other].state == State::at_shuffle) fibers[other].state = State::ready;
    }
    return slots[(lane ^ static_cast<unsigned>(flip)) % kWarp];
}

}  // namespace simulated
