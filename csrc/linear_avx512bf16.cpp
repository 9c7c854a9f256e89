#ifdef BARK_FAST_X86
#define BARK_FAST_ISA isa_avx512bf16
#include "linear_kernels.inl"
#endif
