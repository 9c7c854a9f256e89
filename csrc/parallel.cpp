#include "parallel.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#define BARK_FAST_POSIX 1
#endif

namespace bark_fast {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
std::atomic<bool> openmp_avoided{false};

GompParallel gomp() {
#ifdef BARK_FAST_POSIX
    // looked up once, at the first loop: by then torch has loaded its OpenMP runtime, if it has one
    static const GompParallel found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return openmp_avoided.load(std::memory_order_relaxed) ? nullptr : found;
#else
    return nullptr;
#endif
}

// Sleeping workers that run one job at a time; whoever finds the pool busy runs alone.
class Pool {
public:
    void run(int threads, void (*body)(void*), void* context) {
        std::unique_lock<std::mutex> use(busy_, std::try_to_lock);
        if (!use.owns_lock()) return body(context);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(workers_.size()) < threads - 1) {
                try {
                    workers_.emplace_back(&Pool::work, this, static_cast<int>(workers_.size()), generation_);
                } catch (const std::system_error&) {
                    break;  // the system gives no more threads: fewer take part
                }
            }
            const int helpers = static_cast<int>(workers_.size());
            wanted_ = threads - 1 < helpers ? threads - 1 : helpers;
            running_ = wanted_;
            body_ = body;
            context_ = context;
            ++generation_;
        }
        wake_.notify_all();
        body(context);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
    }

private:
    void work(int index, uint64_t seen) {
        for (;;) {
            void (*body)(void*);
            void* context;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_ != seen; });
                seen = generation_;
                if (index >= wanted_) continue;
                body = body_;
                context = context_;
            }
            body(context);
            std::lock_guard<std::mutex> lock(mutex_);
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    void (*body_)(void*) = nullptr;
    void* context_ = nullptr;
    int wanted_ = 0, running_ = 0;
    uint64_t generation_ = 0;
};

// Never destroyed: its threads sleep until the process ends, and joining them from a static destructor can hang an
// interpreter on its way out. A forked child has none of the threads, so it starts a pool of its own.
Pool& pool() {
    static std::mutex mutex;
    static Pool* current = nullptr;
    static long owner = -1;
    std::lock_guard<std::mutex> lock(mutex);
#ifdef BARK_FAST_POSIX
    const long self = getpid();
#else
    const long self = 0;
#endif
    if (owner != self) {
        current = new Pool;
        owner = self;
    }
    return *current;
}

}  // namespace

void run_on_threads(int threads, void (*body)(void*), void* context) {
    if (threads <= 1) return body(context);
    if (const GompParallel parallel = gomp()) return parallel(body, context, static_cast<unsigned>(threads), 0);
    pool().run(threads, body, context);
}

const char* parallel_backend() { return gomp() ? "openmp" : "threads"; }

void avoid_openmp(bool avoid) { openmp_avoided.store(avoid); }

}  // namespace bark_fast
