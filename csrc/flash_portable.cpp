#define BARK_FAST_ISA isa_portable
#include "flash_kernels.inl"
