#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "gemm_kernels.h"
#include "isa.h"
#include "linear_stage.h"

namespace bark_fast {
namespace cpu {
namespace {

const PerIsa<GemmKernelTable> kTables = {
    &isa_portable::gemm_kernels,
#ifdef BARK_FAST_X86
    &isa_avx2::gemm_kernels,
    &isa_avx512::gemm_kernels,
    &isa_avx512::gemm_kernels,
#endif
};

// Rows that are packed at a time; more go round again.
constexpr int64_t kMostPacked = 1024;

struct Free {
    void operator()(float* p) const { std::free(p); }
};

class PackStage final : public Stage {
public:
    PackStage(const Linear& call, const GemmKernels& kernels, float* packed)
        : call_(call), kernels_(kernels), packed_(packed) {}
    int64_t tickets() const override { return kernels_.panels(call_.rows); }
    void run(int64_t panel, int64_t, Ahead, char*) const override { kernels_.pack(call_, panel, packed_); }

private:
    const Linear& call_;
    const GemmKernels& kernels_;
    float* packed_;
};

// A ticket is a range of outputs of a group of panels.
class MultiplyStage final : public Stage {
public:
    MultiplyStage(const Linear& call, const GemmKernels& kernels, const float* packed)
        : call_(call), kernels_(kernels), packed_(packed), panels_(kernels.panels(call.rows)),
          groups_((panels_ + kernels.together - 1) / kernels.together),
          ranges_((call.n + kGemmOutputs - 1) / kGemmOutputs) {}
    int64_t tickets() const override { return groups_ * ranges_; }
    void run(int64_t ticket, int64_t, Ahead, char*) const override {
        const int64_t group = ticket / ranges_, first = ticket % ranges_ * kGemmOutputs;
        kernels_.multiply(call_, packed_, first_panel(group), first_panel(group + 1), first,
                          std::min(first + kGemmOutputs, call_.n));
    }

private:
    const Linear& call_;
    const GemmKernels& kernels_;
    const float* packed_;
    int64_t panels_, groups_, ranges_;

    // Groups of about the same size: a last one of a single panel would read all weights for it.
    int64_t first_panel(int64_t group) const { return panels_ * group / groups_; }
};

}  // namespace

void gemm(const Linear& whole, int threads) {
    if (whole.rows == 0) return;
    const GemmKernels& kernels = kTables.chosen()[static_cast<int>(whole.dtype)];
    const int64_t bytes = size_of(whole.dtype);
    const int64_t size = kernels.packed_size(std::min(whole.rows, kMostPacked), std::max<int64_t>(whole.k, 1));
    const std::unique_ptr<float, Free> packed(
        static_cast<float*>(std::aligned_alloc(64, (size * sizeof(float) + 63) / 64 * 64)));
    if (!packed) throw std::bad_alloc();
    threads = useful_threads(threads, whole.rows / kMostLinearRows * whole.n * whole.k * bytes);
    for (int64_t row = 0; row < whole.rows; row += kMostPacked) {
        Linear call = whole;
        call.rows = std::min(whole.rows - row, kMostPacked);
        call.x = static_cast<const char*>(whole.x) + row * whole.x_stride * bytes;
        call.out = static_cast<char*>(whole.out) + row * whole.out_stride * bytes;
        if (whole.residual)
            call.residual = static_cast<const char*>(whole.residual) + row * whole.residual_stride * bytes;
        const PackStage pack(call, kernels, packed.get());
        const MultiplyStage multiply(call, kernels, packed.get());
        const Stage* stages[] = {&pack, &multiply};
        run_stages(stages, 2, threads);
    }
}

}  // namespace cpu
}  // namespace bark_fast
