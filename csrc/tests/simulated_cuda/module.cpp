// Python module `simulated_cuda`: the bindings of the paged cache over simulated CUDA, and kernels that break its rules.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "paged_kv_bindings.h"

namespace py = pybind11;

namespace {

// Threads from `from` on do not reach the barrier, or the shuffle.
void lonely_barrier(int from) {
    if (static_cast<int>(threadIdx.x) < from) __syncthreads();
}
void lonely_shuffle(int from) {
    if (static_cast<int>(threadIdx.x) < from) __shfl_xor_sync(0xffffffffu, 1, 1);
}
// Adds up thread numbers through shared memory, with and without the barrier that it takes.
void sum_of_block(int32_t* out, bool with_barrier) {
    __shared__ int32_t shared[64];
    shared[threadIdx.x] = static_cast<int32_t>(threadIdx.x + blockIdx.x);
    if (with_barrier) __syncthreads();
    int32_t sum = 0;
    for (int32_t i = 0; i < 64; ++i) sum += shared[i];
    if (threadIdx.x == 7) out[blockIdx.x] = sum;
    __syncthreads();
}

void past_the_end(int32_t* out, int32_t count) {
    if (threadIdx.x == 0) out[count] = 1;
}

template <class... Parameters, class... Arguments>
void launch(unsigned blocks, unsigned threads, void (*kernel)(Parameters...), const Arguments&... arguments) {
    cudaLaunchConfig_t config;
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    if (cudaLaunchKernelEx(&config, kernel, arguments...) != cudaSuccess)
        throw std::runtime_error(simulated::reason());
}

py::list sums(bool with_barrier) {
    int32_t out[20] = {};
    launch(20, 64, sum_of_block, static_cast<int32_t*>(out), with_barrier);
    py::list list;
    for (const int32_t sum : out) list.append(sum);
    return list;
}

}  // namespace

PYBIND11_MODULE(simulated_cuda, module) {
    bind_paged_kv(module);
    module.def("set_processors", [](int count) { simulated::processors = count; });
    module.def("lonely_barrier", [](int from) { launch(1, 64, lonely_barrier, from); });
    module.def("lonely_shuffle", [](int from) { launch(1, 64, lonely_shuffle, from); });
    module.def("sums", &sums);
    module.def("write_past_the_end", [] {
        std::vector<int32_t> out(20);
        launch(1, 64, past_the_end, out.data(), 20);
    });
}
