#include "isa.h"

#include <atomic>
#include <cstring>
#include <vector>

#ifdef BARK_FAST_X86
#include <cpuid.h>
#endif

namespace bark_fast {

namespace {

#ifdef BARK_FAST_X86
bool is_intels() {
    __builtin_cpu_init();  // may be asked before constructors have run
    return __builtin_cpu_is("intel");
}

bool is_zen5_or_later() {
    constexpr unsigned kZen5 = 0x1a;
    unsigned a, b, c, d;
    __builtin_cpu_init();
    if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
    const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
    return family >= kZen5;
}
#else
bool is_intels() { return false; }
bool is_zen5_or_later() { return false; }
#endif

}  // namespace

bool intels_cpu = is_intels();
bool zen5_or_later = is_zen5_or_later();

const char* cpu_kind() { return intels_cpu ? "intel" : zen5_or_later ? "zen5" : "others"; }

bool use_cpu_kind(const char* name) {
    const bool intel = std::strcmp(name, "intel") == 0, zen5 = std::strcmp(name, "zen5") == 0;
    if (!intel && !zen5 && std::strcmp(name, "others") != 0) return false;
    intels_cpu = intel;
    zen5_or_later = zen5;
    return true;
}

namespace cpu {
namespace {

struct Isa {
    const char* name;
    bool (*runs)();
};

#ifdef BARK_FAST_X86
bool has_f16c() {  // clang 14 and gcc 10 cannot be asked for it by name
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// in the order of PerIsa: worst first
const Isa kIsas[] = {
    {"portable", [] { return true; }},
#ifdef BARK_FAST_X86
    {"avx2", has_avx2},
    {"avx512", has_avx512},
    {"avx512bf16", has_avx512bf16},
#endif
};
constexpr int kCount = sizeof kIsas / sizeof *kIsas;

int best_isa() {
    int best = kCount - 1;
    while (!kIsas[best].runs()) --best;
    return best;
}

std::atomic<int>& chosen() {
    static std::atomic<int> isa{best_isa()};
    return isa;
}

}  // namespace

int chosen_isa() { return chosen().load(std::memory_order_relaxed); }

const char* const* isas() {
    static const std::vector<const char*> names = [] {
        std::vector<const char*> found;
        for (int i = kCount - 1; i >= 0; --i)
            if (kIsas[i].runs()) found.push_back(kIsas[i].name);
        found.push_back(nullptr);
        return found;
    }();
    return names.data();
}

const char* current_isa() { return kIsas[chosen_isa()].name; }

bool use_isa(const char* name) {
    for (int i = 0; i < kCount; ++i)
        if (std::strcmp(kIsas[i].name, name) == 0 && kIsas[i].runs()) {
            chosen().store(i);
            return true;
        }
    return false;
}

}  // namespace cpu
}  // namespace bark_fast
