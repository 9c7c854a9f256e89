#include "flash.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "flash_kernels.h"
#include "isa.h"
#include "parallel.h"

namespace bark_fast {
namespace cpu {
namespace {

const PerIsa<FlashKernelTable> kTables = {
    &isa_portable::flash_kernels,
#ifdef BARK_FAST_X86
    &isa_avx2::flash_kernels,
    &isa_avx512::flash_kernels,
    &isa_avx512::flash_kernels,
#endif
};

const FlashKernels& kernels_for(DType dtype) {
#ifdef BARK_FAST_X86
    if (dtype == DType::bf16 && chosen_isa() > kAvx512) return isa_avx512bf16::flash_kernels_bf16;
#endif
    return kTables.chosen()[static_cast<int>(dtype)];
}

constexpr int64_t kLine = 64;

}  // namespace

void flash(const Flash& call, int threads) {
    const FlashKernels& kernels = kernels_for(call.dtype);
    const int64_t panels = kernels.panels(call.rows), room = kernels.room(call.keys, call.head_dim);
    const int64_t groups = (panels + kernels.together - 1) / kernels.together;
    if (!panels) return;
    parallel_for(call.batch * call.heads * groups, 1, threads, [&](int64_t first, int64_t last) {
        thread_local std::vector<char> bytes;  // kept between calls
        bytes.resize(std::max<size_t>(bytes.size(), room * sizeof(float) + kLine));
        const uintptr_t start = (reinterpret_cast<uintptr_t>(bytes.data()) + kLine - 1) / kLine * kLine;
        for (int64_t ticket = first; ticket < last; ++ticket) {
            const int64_t head = ticket / groups, group = groups - 1 - ticket % groups;  // causal: the longest first
            kernels.attend(call, head / call.heads, head % call.heads, panels * group / groups,
                           panels * (group + 1) / groups, reinterpret_cast<float*>(start));
        }
    });
}

}  // namespace cpu
}  // namespace bark_fast
