#include "attention_stage.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

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

// Keys of a part: fewer cost more to join than they gain. They begin at the same keys whatever the context's length, so
// that the sums of a row are the same alone and beside later rows of its sequence.
constexpr int32_t kPart = 256;
constexpr int kUnitsPerThread = 4;
constexpr int64_t kMostUnits = 4;

}  // namespace

void AttentionPlan::make(const Attention& call, int threads) {
    threads = std::max(threads, 1);
    jobs.clear();
    units = bytes = 0;
    int64_t floats = 0, key_heads = 0;
    for (int32_t seq = 0; seq < call.seqs; ++seq) {
        const int32_t start = call.query_starts[seq], stop = call.query_starts[seq + 1];
        for (int32_t row = start; row < stop; row += kQueryTile) {
            const int32_t rows = stop - row < kQueryTile ? stop - row : kQueryTile;
            const int32_t seen = visible_keys(call.lengths[seq], stop - start, row + rows - 1 - start);
            const int32_t keys = seen > 0 ? seen : 0;
            key_heads += int64_t{keys} * call.pages.n_head;
            jobs.push_back({seq, row, rows, keys, 1, 0, 0});
        }
    }
    for (Job& job : jobs) {
        // as if the sequence were alone: a row's sums must not depend on its neighbours
        if (threads > 1 && int64_t{threads} * kUnitsPerThread > call.pages.n_head)
            job.parts = std::max(1, (job.keys + kPart - 1) / kPart);
        job.first_unit = units;
        job.first_partial = floats;
        units += int64_t{call.pages.n_head} * job.parts;
        if (job.parts > 1)
            floats += int64_t{call.pages.n_head} * job.parts * job.rows * partial_size(call.pages.head_dim);
    }
    bytes = key_heads * call.pages.head_dim * 2 * size_of(call.dtype);
    if (floats == 0) return;
    if (static_cast<int64_t>(partials.size()) < floats) partials.resize(floats);
    if (counters_ < units) {
        left.reset(new std::atomic<int32_t>[units]);
        counters_ = units;
    }
    for (const Job& job : jobs)
        for (int32_t head = 0; head < call.pages.n_head; ++head)
            left[job.first_unit + head * job.parts].store(job.parts, std::memory_order_relaxed);
}

AttentionStage::AttentionStage(const Attention& call, AttentionPlan& plan, int threads, const Append* append)
    : call_(call), plan_(&plan), append_(append), kernels_(&kernels_for(call.dtype, call.pages.head_dim)) {
    // neighbouring heads lie next to each other in every page, so a thread takes a few at a time
    grain_ = std::max<int64_t>(1, std::min(plan.units / (int64_t{std::max(threads, 1)} * kUnitsPerThread), kMostUnits));
}

const AttentionPlan::Job& AttentionStage::job_of(int64_t index) const {
    const auto after = std::upper_bound(plan_->jobs.begin(), plan_->jobs.end(), index,
                                        [](int64_t i, const AttentionPlan::Job& job) { return i < job.first_unit; });
    return *(after - 1);
}

float* AttentionStage::partials_of(const AttentionPlan::Job& job, int32_t head) const {
    const int64_t size = job.rows * partial_size(call_.pages.head_dim);
    return plan_->partials.data() + job.first_partial + head * job.parts * size;
}

Unit AttentionStage::unit_at(const AttentionPlan::Job& job, int64_t index) const {
    const int64_t place = index - job.first_unit;
    const int32_t head = static_cast<int32_t>(place / job.parts), part = static_cast<int32_t>(place % job.parts);
    Unit unit{job.seq, job.row, job.rows, head, 0, job.keys, nullptr, 0, nullptr};
    if (job.parts > 1) {
        unit.first_key = part * kPart;
        unit.last_key = std::min(unit.first_key + kPart, job.keys);
        unit.partial_stride = partial_size(call_.pages.head_dim);
        unit.partial = partials_of(job, head) + part * job.rows * unit.partial_stride;
    }
    return unit;
}

// The last part of a head to finish joins them all, and counts from the start for the next layer.
void AttentionStage::finish(const AttentionPlan::Job& job, int32_t head) const {
    std::atomic<int32_t>& left = plan_->left[job.first_unit + head * job.parts];
    if (left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    left.store(job.parts, std::memory_order_relaxed);
    const int64_t size = partial_size(call_.pages.head_dim);
    const float* first = partials_of(job, head);
    for (int32_t r = 0; r < job.rows; ++r)
        kernels_->combine(call_, job.row + r, head, first + r * size, job.parts, size * job.rows);
}

void AttentionStage::run(int64_t ticket, int64_t next_ticket, Ahead, char*) const {
    const int64_t first = ticket * grain_, last = std::min(first + grain_, plan_->units);
    const AttentionPlan::Job* job = &job_of(first);
    Unit unit = unit_at(*job, first);
    for (int64_t index = first; index < last; ++index) {
        const int64_t following = index + 1 < last ? index + 1 : next_ticket >= 0 ? next_ticket * grain_ : -1;
        const AttentionPlan::Job* next_job = nullptr;
        Unit next{};
        if (following >= 0) {
            next_job = &job_of(following);
            next = unit_at(*next_job, following);
            unit.next = &next;
        }
        for (int32_t row = unit.row; append_ && row < unit.row + unit.rows; ++row) {
            const int32_t key = job->keys - (unit.row + unit.rows - row);  // the row's own
            if (unit.first_key <= key && key < unit.last_key) append_head(*append_, row, unit.head);
        }
        kernels_->attend(call_, unit);
        if (job->parts > 1) finish(*job, unit.head);
        unit = next;
        job = next_job;
    }
}

void append_head(const Append& call, int64_t row, int64_t head) {
    const int64_t slot = call.slots[row];
    if (slot < 0) return;
    const int64_t size = size_of(call.dtype), bytes = call.pages.head_dim * size, width = call.pages.n_head * bytes;
    const char* source = static_cast<const char*>(call.qkv) + row * call.qkv_stride * size + width + head * bytes;
    const int64_t to = slot_offset(call.pages, slot, static_cast<int32_t>(head)) * size;
    std::memcpy(static_cast<char*>(call.k_pages) + to, source, bytes);
    std::memcpy(static_cast<char*>(call.v_pages) + to, source + width, bytes);
}

}  // namespace cpu
}  // namespace bark_fast
