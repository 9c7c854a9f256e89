// A linear layer as a stage of a longer computation.
#pragma once

#include "linear.h"
#include "linear_kernels.h"
#include "stages.h"

namespace bark_fast {
namespace cpu {

// Each thread packs the rows for itself: they are few, and its own caches are the nearest.
class LinearStage final : public Stage {
public:
    explicit LinearStage(const Linear& call);
    int64_t tickets() const override;
    int64_t room() const override { return kernels_->packed_bytes(call_.rows, call_.k); }
    Ahead ahead(int64_t ticket) const override;
    void begin(char* room) const override { kernels_->pack(call_, room); }
    void run(int64_t ticket, int64_t next, Ahead ahead, char* room) const override;

    int64_t weight_bytes() const { return call_.n * call_.k * weight_size(call_); }

private:
    Linear call_;
    const LinearKernels* kernels_;
    int64_t outputs_;  // of one ticket
};

// As many of `threads` as are worth waking for so many bytes.
int useful_threads(int threads, int64_t bytes);

}  // namespace cpu
}  // namespace bark_fast
