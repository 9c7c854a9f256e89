#ifdef BARK_FAST_X86
#define BARK_FAST_ISA isa_avx2
#include "linear_kernels.inl"
#endif
