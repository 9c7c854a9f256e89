// Paged attention of one layer as a stage of a longer computation.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "paged_kv.h"
#include "paged_kv_kernels.h"
#include "stages.h"

namespace bark_fast {
namespace cpu {

// How query rows, heads and parts of their keys are shared out. The same for all layers of a step.
class AttentionPlan {
public:
    // Parts of contexts are there to occupy `threads`.
    void make(const Attention& call, int threads);

    // Up to kQueryTile rows of one sequence, with as many parts of their keys as it takes.
    struct Job {
        int32_t seq, row, rows, keys, parts;
        int64_t first_unit;     // units before this job: n_head * parts each
        int64_t first_partial;  // floats before this job's partial results
    };

    int64_t units = 0;
    int64_t bytes = 0;  // of keys and values
    std::vector<Job> jobs;
    std::vector<float> partials;
    std::unique_ptr<std::atomic<int32_t>[]> left;  // parts of a head that are not finished

private:
    int64_t counters_ = 0;
};

// append: keys and values of the query rows are stored on the way; then a sequence has at most kQueryTile rows.
class AttentionStage final : public Stage {
public:
    AttentionStage(const Attention& call, AttentionPlan& plan, int threads, const Append* append);
    int64_t tickets() const override { return (plan_->units + grain_ - 1) / grain_; }
    void run(int64_t ticket, int64_t next, Ahead ahead, char* room) const override;

private:
    Unit unit_at(const AttentionPlan::Job& job, int64_t index) const;
    const AttentionPlan::Job& job_of(int64_t index) const;
    float* partials_of(const AttentionPlan::Job& job, int32_t head) const;
    void finish(const AttentionPlan::Job& job, int32_t head) const;

    Attention call_;
    AttentionPlan* plan_;
    const Append* append_;
    const Kernels* kernels_;
    int64_t grain_;
};

// Keys and values of row `row` and head `head`, if the row has a slot.
void append_head(const Append& call, int64_t row, int64_t head);

}  // namespace cpu
}  // namespace bark_fast
