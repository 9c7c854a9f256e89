#include "paged_kv.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "isa.h"
#include "paged_kv_kernels.h"
#include "parallel.h"

namespace bark_fast {
namespace cpu {
namespace {

const PerIsa<KernelTable> kTables = {
    &isa_portable::kernels,
#ifdef BARK_FAST_X86
    &isa_avx2::kernels,
    &isa_avx512::kernels,
    &isa_avx512bf16::kernels,
#endif
};

const Kernels& kernels_for(DType dtype, int32_t head_dim) {
    const int width = head_dim == 32 ? 0 : head_dim == 64 ? 1 : 2;
    return kTables.chosen()[static_cast<int>(dtype)][width];
}

// Up to kQueryTile rows of one sequence, with as many parts of their keys as it takes to occupy the threads.
struct Job {
    int32_t seq, row, rows, keys, parts;
    int64_t first_unit;     // units before this job: n_head * parts each
    int64_t first_partial;  // floats before this job's partial results
};

// Below this many keys a part costs more to join than it gains.
constexpr int32_t kLeastPart = 256;
constexpr int32_t kPartGrain = 128;
constexpr int kUnitsPerThread = 4;
constexpr int64_t kMostUnits = 4;
// Bytes of memory traffic under which waking a thread costs more than it saves.
constexpr int64_t kLeastBytes = 64 * 1024;

struct Plan {
    std::vector<Job> jobs;
    int64_t units = 0;
    int64_t partials = 0;
    int64_t key_heads = 0;
};

void make_plan(const Attention& call, int threads, Plan& plan) {
    plan.jobs.clear();
    plan.units = plan.partials = plan.key_heads = 0;
    for (int32_t seq = 0; seq < call.seqs; ++seq) {
        const int32_t start = call.query_starts[seq], stop = call.query_starts[seq + 1];
        for (int32_t row = start; row < stop; row += kQueryTile) {
            const int32_t rows = stop - row < kQueryTile ? stop - row : kQueryTile;
            const int32_t seen = visible_keys(call.lengths[seq], stop - start, row + rows - 1 - start);
            const int32_t keys = seen > 0 ? seen : 0;
            plan.key_heads += int64_t{keys} * call.pages.n_head;
            plan.jobs.push_back({seq, row, rows, keys, 1, 0, 0});
        }
    }
    const int64_t wanted = plan.key_heads / (int64_t{threads} * kUnitsPerThread) + 1;
    for (Job& job : plan.jobs) {
        if (threads > 1 && job.keys > wanted && job.keys >= 2 * kLeastPart) {
            const int64_t parts = (job.keys + wanted - 1) / wanted, most = job.keys / kLeastPart;
            job.parts = static_cast<int32_t>(parts < most ? parts : most);
        }
        job.first_unit = plan.units;
        job.first_partial = plan.partials;
        plan.units += int64_t{call.pages.n_head} * job.parts;
        if (job.parts > 1)
            plan.partials += int64_t{call.pages.n_head} * job.parts * job.rows * partial_size(call.pages.head_dim);
    }
}

float* partials_of(const Attention& call, const Job& job, int32_t head, float* partials) {
    return partials + job.first_partial + head * job.parts * job.rows * partial_size(call.pages.head_dim);
}

Unit unit_of(const Attention& call, const Job& job, int64_t index, float* partials) {
    const int32_t head = static_cast<int32_t>(index / job.parts), part = static_cast<int32_t>(index % job.parts);
    Unit unit{job.seq, job.row, job.rows, head, 0, job.keys, nullptr, 0, nullptr};
    if (job.parts > 1) {
        unit.first_key = part_start(job.keys, job.parts, part, kPartGrain);
        unit.last_key = part_start(job.keys, job.parts, part + 1, kPartGrain);
        unit.partial_stride = partial_size(call.pages.head_dim);
        unit.partial = partials_of(call, job, head, partials) + part * job.rows * unit.partial_stride;
    }
    return unit;
}

// The last part of a head to finish joins them all.
void finish(const Attention& call, const Kernels& kernels, const Job& job, int32_t head, float* partials,
            std::atomic<int32_t>* left) {
    if (left[job.first_unit + head * job.parts].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    const int64_t size = partial_size(call.pages.head_dim);
    const float* first = partials_of(call, job, head, partials);
    for (int32_t r = 0; r < job.rows; ++r)
        kernels.combine(call, job.row + r, head, first + r * size, job.parts, size * job.rows);
}

}  // namespace

void paged_attention(const Attention& call, int threads) {
    // kept between calls: a decode step makes one call a layer, all of one shape
    thread_local Plan plan;
    thread_local std::vector<float> partials;
    make_plan(call, threads, plan);
    if (plan.key_heads * call.pages.head_dim * 2 * size_of(call.dtype) < kLeastBytes) threads = 1;
    std::unique_ptr<std::atomic<int32_t>[]> left;
    if (plan.partials) {
        if (static_cast<int64_t>(partials.size()) < plan.partials) partials.resize(plan.partials);
        left.reset(new std::atomic<int32_t>[plan.units]);
        for (const Job& job : plan.jobs)
            for (int32_t head = 0; head < call.pages.n_head; ++head)
                left[job.first_unit + head * job.parts].store(job.parts, std::memory_order_relaxed);
    }
    const Kernels& kernels = kernels_for(call.dtype, call.pages.head_dim);
    const Plan& shared = plan;  // thread_locals are not captured: name the caller's
    float* shared_partials = partials.data();
    // neighbouring heads lie next to each other in every page, so a thread takes a few at a time
    const int64_t share = plan.units / (int64_t{threads} * kUnitsPerThread);
    const int64_t grain = share < kMostUnits ? share : kMostUnits;
    parallel_for(plan.units, grain, threads, [&, shared_partials](int64_t first, int64_t last) {
        size_t job = 0, high = shared.jobs.size();
        while (high - job > 1) {
            const size_t middle = (job + high) / 2;
            (shared.jobs[middle].first_unit <= first ? job : high) = middle;
        }
        const auto unit_at = [&](size_t j, int64_t index) {
            return unit_of(call, shared.jobs[j], index - shared.jobs[j].first_unit, shared_partials);
        };
        Unit unit = unit_at(job, first);
        for (int64_t index = first; index < last; ++index) {
            const Job& current = shared.jobs[job];
            Unit next{};
            if (index + 1 < last) {
                if (job + 1 < shared.jobs.size() && shared.jobs[job + 1].first_unit <= index + 1) ++job;
                next = unit_at(job, index + 1);
                unit.next = &next;
            }
            kernels.attend(call, unit);
            if (current.parts > 1) finish(call, kernels, current, unit.head, shared_partials, left.get());
            unit = next;
        }
    });
}

void append_kv(const Append& call, int threads) {
    const int64_t size = size_of(call.dtype), head_bytes = call.pages.head_dim * size;
    const int64_t width = int64_t{call.pages.n_head} * head_bytes;
    if (call.rows * width < kLeastBytes) threads = 1;
    parallel_for(call.rows, 16, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t slot = call.slots[row];
            if (slot < 0) continue;
            const char* source = static_cast<const char*>(call.qkv) + row * call.qkv_stride * size + width;
            for (int32_t head = 0; head < call.pages.n_head; ++head) {
                const int64_t to = slot_offset(call.pages, slot, head) * size;
                std::memcpy(static_cast<char*>(call.k_pages) + to, source + head * head_bytes, head_bytes);
                std::memcpy(static_cast<char*>(call.v_pages) + to, source + width + head * head_bytes, head_bytes);
            }
        }
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
