// What our kernels use of CUDA, carried out on a CPU, so that the very source that nvcc compiles also runs in tests
// (and under sanitizers) where there is no GPU. Not the hardware: blocks run one after another, in a random order;
// the threads of a block are fibers that take turns where they wait for one another. What it can show: results,
// index arithmetic, out-of-bounds accesses, barriers and shuffles that not everybody reaches, results that depend on
// which block or warp comes first. What it cannot: the memory model, speed, launch limits.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using cudaStream_t = struct Stream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaMemcpyKind { cudaMemcpyDefault = 4 };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

namespace simulated {

extern int processors;  // what the device says it has

// Runs the grid; false when a block got stuck or broke a rule, see `reason`.
bool run(dim3 grid, dim3 block, const std::function<void()>& thread);
const char* reason();

void block_barrier();
// The 32 bits that lane `lane ^ flip` of the caller's warp brought to the same call.
uint32_t exchange(uint32_t bits, uint32_t mask, int flip);

}  // namespace simulated

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
    const auto thread = [&] { kernel(arguments...); };
    return simulated::run(config->gridDim, config->blockDim, thread) ? cudaSuccess : cudaErrorLaunchFailure;
}
inline const char* cudaGetErrorString(cudaError_t) { return simulated::reason(); }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    return *value = simulated::processors, cudaSuccess;
}
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return std::memcpy(to, from, bytes), cudaSuccess;
}

inline void __syncthreads() { simulated::block_barrier(); }
inline void __threadfence() {}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int flip) {
    static_assert(sizeof(T) == 4, "one register");
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = simulated::exchange(bits, mask, flip);
    std::memcpy(&value, &bits, 4);
    return value;
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int from) {
    return __shfl_xor_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ from);
}
inline int32_t atomicAdd(int32_t* at, int32_t value) {
    const int32_t before = *at;
    *at += value;
    return before;
}
template <class T>
T __ldcg(const T* at) {
    return *at;
}
inline int __clz(int32_t x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline int32_t min(int32_t a, int32_t b) { return a < b ? a : b; }
inline int32_t max(int32_t a, int32_t b) { return a > b ? a : b; }
