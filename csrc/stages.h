// Several parallel loops, each waiting for the one before, within one run_on_threads: entering a parallel region for
// each linear layer of a decode step would cost more than the layers' arithmetic.
#pragma once

#include <cstdint>

namespace bark_fast {

// Lines of memory that will be read next, for prefetching. Null: not known.
struct Ahead {
    const char* first;
    int64_t stride;  // in bytes
};

// A loop over tickets.
class Stage {
public:
    virtual ~Stage() = default;
    virtual int64_t tickets() const = 0;
    // Bytes a thread needs to itself.
    virtual int64_t room() const { return 0; }
    // What a ticket reads that no earlier stage writes.
    virtual Ahead ahead(int64_t) const { return {nullptr, 0}; }
    // Called by each thread that takes part, when all earlier stages are finished.
    virtual void begin(char*) const {}
    // Must not throw. next: the ticket of this stage the thread will run next, or -1. ahead: what it will read next.
    virtual void run(int64_t ticket, int64_t next, Ahead ahead, char* room) const = 0;
};

// Stages without tickets are allowed. Fewer threads may take part than asked for.
void run_stages(const Stage* const* stages, int count, int threads);

}  // namespace bark_fast
