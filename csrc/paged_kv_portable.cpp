#define BARK_FAST_ISA isa_portable
#include "paged_kv_kernels.inl"
