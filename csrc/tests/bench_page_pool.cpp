// How fast the pool is from C++. Prints "name operations-per-second" a line; best of several rounds.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "../page_pool.h"

using namespace bark_fast;

namespace {

constexpr int kRounds = 7;
constexpr std::int64_t kPageSize = 16;

// `work` returns how many operations it did.
template <typename Work>
void measure(const char* name, Work&& work) {
    double best = 0;
    for (int round = 0; round < kRounds; ++round) {
        const auto start = std::chrono::steady_clock::now();
        const long operations = work();
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
        best = std::max(best, operations / spent.count());
    }
    std::printf("%s %.0f\n", name, best);
}

void measure_step(const char* name, int batch) {
    constexpr int kContext = 1024, kMaxPages = kContext / kPageSize;
    PagePool pool(batch * kMaxPages, kPageSize);
    std::vector<Handle> handles;
    for (int i = 0; i < batch; ++i) handles.push_back(pool.create());
    const std::vector<std::int32_t> n_new(batch, 1);
    std::vector<std::int32_t> tables(batch * kMaxPages), lengths(batch);
    std::vector<std::int64_t> slots(batch);
    std::vector<PageCopy> copies;
    const StepOutput out{tables.data(), kMaxPages, kMaxPages, slots.data(), batch, lengths.data()};
    measure(name, [&] {
        const int repeats = std::max(1, 64 / batch);
        for (int repeat = 0; repeat < repeats; ++repeat) {
            for (Handle handle : handles) pool.truncate(handle, 0);
            for (int token = 0; token < kContext; ++token)
                pool.step(handles.data(), n_new.data(), batch, out, copies);
        }
        return static_cast<long>(repeats) * kContext * batch;
    });
}

}  // namespace

int main() {
    // glibc spares a process that never had a second thread the atomics of a mutex; Python's has many
    std::thread([] {}).detach();
    PagePool pool(64 * 64, kPageSize);
    std::vector<Handle> handles;
    for (int i = 0; i < 64; ++i) handles.push_back(pool.create());
    measure("extend_by_one", [&] {
        for (Handle handle : handles) pool.truncate(handle, 0);
        for (int token = 0; token < 1024; ++token)
            for (Handle handle : handles) pool.extend(handle, 1);
        return 64L * 1024;
    });
    measure("create_free", [&] {
        for (int i = 0; i < 100000; ++i) pool.free(pool.create());
        return 2L * 100000;
    });
    // fork of a 40-token sequence, a copy on write, and the fork given back
    const Handle parent = handles[0];
    pool.truncate(parent, 40);
    measure("fork_extend_free", [&] {
        for (int i = 0; i < 100000; ++i) {
            const Handle child = pool.fork(parent);
            pool.extend(child, 1);
            pool.free(child);
        }
        return 3L * 100000;
    });
    measure_step("step_sequences_batch_1", 1);
    measure_step("step_sequences_batch_16", 16);
    measure_step("step_sequences_batch_64", 64);
    return 0;
}
