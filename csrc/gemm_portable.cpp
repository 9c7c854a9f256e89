#define BARK_FAST_ISA isa_portable
#include "gemm_kernels.inl"
