// Parallel loops on the CPU for code that lives inside a torch process.
//
// torch's OpenMP workers spin for a while after each of torch's own loops. A second thread pool would fight them for
// the cores, so the loop runs on the process's libgomp when one is visible, and on a small pool of its own otherwise.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace bark_fast {

// Runs body(context) on up to `threads` threads at once, the caller among them; returns when all are done. Fewer
// threads may take part (a nested region, a busy pool), so the body must fetch its work from a shared counter.
// body must not throw.
void run_on_threads(int threads, void (*body)(void*), void* context);

// Where run_on_threads runs: "openmp" or "threads".
const char* parallel_backend();

// For tests: true makes run_on_threads ignore OpenMP.
void avoid_openmp(bool avoid);

// Calls chunk(first, last) for consecutive ranges of at most `grain` indices that cover [0, count), on up to
// `threads` threads. Ranges are handed out one at a time, so a thread that is held up does not hold up the rest.
template <class Chunk>
void parallel_for(int64_t count, int64_t grain, int threads, const Chunk& chunk) {
    if (count <= 0) return;
    if (grain < 1) grain = 1;
    const int64_t chunks = (count + grain - 1) / grain;
    if (threads > chunks) threads = static_cast<int>(chunks);
    if (threads <= 1) {
        chunk(int64_t{0}, count);
        return;
    }
    struct Shared {
        std::atomic<int64_t> next{0};
        std::atomic_flag failed = ATOMIC_FLAG_INIT;
        std::exception_ptr error;
        const Chunk* chunk;
        int64_t count, grain;
    } shared;
    shared.chunk = &chunk;
    shared.count = count;
    shared.grain = grain;
    run_on_threads(
        threads,
        [](void* context) {
            auto& s = *static_cast<Shared*>(context);
            try {
                for (;;) {
                    const int64_t first = s.next.fetch_add(s.grain, std::memory_order_relaxed);
                    if (first >= s.count) return;
                    const int64_t last = first + s.grain < s.count ? first + s.grain : s.count;
                    (*s.chunk)(first, last);
                }
            } catch (...) {
                if (!s.failed.test_and_set()) s.error = std::current_exception();
            }
        },
        &shared);
    if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace bark_fast
