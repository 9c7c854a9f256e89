// Which of the CPU code's instruction sets runs. Each kernel file is compiled once per set and chosen here.
#pragma once

namespace bark_fast {

// Kinds of CPUs, told apart by how they like memory to be streamed, by measurement.
extern bool intels_cpu;
// AMD's from Zen 5 on. Memory is best asked for into their L1; elsewhere the line buffers, through which it would go, are
// too few for what is under way, and the L2 is the better place.
extern bool zen5_or_later;

// "intel", "zen5" or "others".
const char* cpu_kind();
// For tests; false when there is no such kind. Not for use while another thread computes.
bool use_cpu_kind(const char* name);

namespace cpu {

// Instruction sets this build has and this machine runs, best first; null-terminated.
const char* const* isas();
const char* current_isa();
// False when the machine or the build does not have it. Not for use while another thread computes.
bool use_isa(const char* name);

// One implementation per instruction set.
template <class Table>
struct PerIsa {
    const Table* portable;
#ifdef BARK_FAST_X86
    const Table* avx2;
    const Table* avx512;
    const Table* avx512bf16;
#endif
    // The one in use.
    const Table& chosen() const;
};

// Place of the one in use in the struct above.
int chosen_isa();
constexpr int kAvx512 = 2;

template <class Table>
const Table& PerIsa<Table>::chosen() const {
#ifdef BARK_FAST_X86
    const Table* const all[] = {portable, avx2, avx512, avx512bf16};
    return *all[chosen_isa()];
#else
    return *portable;
#endif
}

}  // namespace cpu
}  // namespace bark_fast
