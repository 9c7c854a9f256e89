#define BARK_FAST_ISA isa_portable
#include "linear_kernels.inl"
