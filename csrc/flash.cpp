#include "flash.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "flash_kernels.h"
#include "gemm.h"
#include "isa.h"
#include "parallel.h"

namespace bark_fast {
namespace cpu {
namespace {

const PerIsa<FlashKernels> kFloats = {
    &isa_portable::flash_kernels_f32,
#ifdef BARK_FAST_X86
    &isa_avx2::flash_kernels_f32,
    &isa_avx512::flash_kernels_f32,
    &isa_avx512::flash_kernels_f32,
#endif
};

const FlashKernels& kernels_for(DType dtype) {
#ifdef BARK_FAST_X86
    if (dtype == DType::bf16) return isa_avx512bf16::flash_kernels_bf16;
#endif
    (void)dtype;
    return kFloats.chosen();
}

constexpr int64_t kLine = 64;

}  // namespace

void flash(const Flash& call, int threads) {
    const FlashKernels& kernels = kernels_for(call.dtype);
    const int64_t panels = kernels.panels(call.rows), room = kernels.room(call.head_dim);
    if (!panels) return;
    parallel_for(call.batch * call.heads * panels, 1, threads, [&](int64_t first, int64_t last) {
        thread_local std::vector<char> bytes;  // kept between calls
        bytes.resize(std::max<size_t>(bytes.size(), room * sizeof(float) + kLine));
        const uintptr_t start = (reinterpret_cast<uintptr_t>(bytes.data()) + kLine - 1) / kLine * kLine;
        for (int64_t ticket = first; ticket < last; ++ticket) {
            const int64_t head = ticket / panels, panel = panels - 1 - ticket % panels;  // causal: the longest first
            kernels.attend(call, head / call.heads, head % call.heads, panel, reinterpret_cast<float*>(start));
        }
    });
}

bool has_flash(DType dtype) {
#ifdef BARK_FAST_X86
    if (dtype == DType::bf16) return chosen_isa() > kAvx512;
#endif
    return dtype == DType::f32;
}

bool flash_pays(DType dtype) { return has_flash(dtype) && gemm_pays(); }

}  // namespace cpu
}  // namespace bark_fast
