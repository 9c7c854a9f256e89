// The paged cache on CUDA: one launch an operation, on the caller's stream, no allocation, nothing waits, so every
// call can be captured in a graph. Tables live on the device and cannot be checked before the launch: entries out
// of range are treated as absent (a key that is not there, a row that is not stored), never followed.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "paged_kv.h"

namespace bark_fast {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kLeastPart = 64;  // keys of a part: below that joining costs more than it gains
constexpr int kMaxParts = 32;
constexpr float kLog2e = 1.44269504088896341f;

struct alignas(16) Bytes16 {
    uint32_t word[4];
};

__device__ __forceinline__ void widen(const Bytes16& x, float (&v)[4], const float*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = __uint_as_float(x.word[i]);
}
__device__ __forceinline__ void widen(const Bytes16& x, float (&v)[8], const __half*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __half2 pair = *reinterpret_cast<const __half2*>(&x.word[i]);
        v[2 * i] = __low2float(pair);
        v[2 * i + 1] = __high2float(pair);
    }
}
__device__ __forceinline__ void widen(const Bytes16& x, float (&v)[8], const __nv_bfloat16*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = __uint_as_float(x.word[i] << 16);
        v[2 * i + 1] = __uint_as_float(x.word[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void narrow(float x, float* out) { *out = x; }
__device__ __forceinline__ void narrow(float x, __half* out) { *out = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

// Joins the softmax state (maximum, total, o) of another set of keys, base 2. Both may be empty (-inf, 0, 0).
template <int N>
__device__ __forceinline__ void join(float& maximum, float& total, float (&o)[N], float other_maximum,
                                     float other_total, const float (&other)[N]) {
    const float larger = fmaxf(maximum, other_maximum);
    const float shift = larger == -INFINITY ? 0.0f : larger;
    const float mine = exp2f(maximum - shift), theirs = exp2f(other_maximum - shift);
    total = total * mine + other_total * theirs;
#pragma unroll
    for (int i = 0; i < N; ++i) o[i] = o[i] * mine + other[i] * theirs;
    maximum = larger;
}

// Grid (parts, n_head, rows): one block reads a part of the keys of one query row and head. A key is held by kLanes
// neighbouring lanes, 16 bytes each; the block's kGroups groups of lanes take keys in turn, kUnroll at a time.
// With slots, keys of the call's own rows are read where the projection left them, by the last block of each row and
// head, and the first one stores its row: no block reads what another one writes. Eight blocks fit a processor.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 8) attend(Attention call, int32_t parts, Scratch scratch, int32_t columns) {
    constexpr int kElements = 16 / sizeof(T);
    constexpr int kLanes = D / kElements;
    constexpr int kGroups = kThreads / kLanes;
    constexpr int kUnroll = 4;
    const int32_t part = blockIdx.x, head = blockIdx.y, row = blockIdx.z;
    const int32_t lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
    const PageShape pages = call.pages;
    const int32_t shift = 31 - __clz(pages.page_size);

    const int32_t seq = sequence_of_row(call.query_starts, call.seqs, row);
    const int32_t start = call.query_starts[seq], rows = call.query_starts[seq + 1] - start;
    const int32_t length = min(max(call.lengths[seq], 0), columns << shift);
    // a row outside its sequence (query_starts is wrong) sees nothing
    const bool inside = start >= 0 && row >= start && row - start < rows;
    const int32_t keys = inside ? max(visible_keys(length, rows, row - start), 0) : 0;
    // keys from `older` on are those of the call's own rows: not on pages yet, the last part takes them
    const int32_t older = call.slots ? max(length - rows, 0) : length, stored = min(keys, older);
    const int32_t first = part_start(stored, parts, part, kGroups), last = part_start(stored, parts, part + 1, kGroups);
    const int32_t* table = call.block_table + seq * call.table_stride;
    const int32_t page_stride = static_cast<int32_t>(page_elements(pages));
    const int32_t num_pages = static_cast<int32_t>(pages.num_pages);
    const int64_t head_start = page_offset(pages, 0, head, 0) + lane * kElements;
    const T* k_pages = static_cast<const T*>(call.k_pages) + head_start;
    const T* v_pages = static_cast<const T*>(call.v_pages) + head_start;
    const int64_t width = int64_t{pages.n_head} * D;
    const T* projected = static_cast<const T*>(call.query) + int64_t{head} * D + lane * kElements;
    const int64_t slot = call.slots && part == 0 ? call.slots[row] : -1;  // asked for early

    float q[kElements], o[kElements] = {};
    float maximum = -INFINITY, total = 0.0f;
    widen(*reinterpret_cast<const Bytes16*>(projected + row * call.query_stride), q, static_cast<const T*>(nullptr));
#pragma unroll
    for (int i = 0; i < kElements; ++i) q[i] *= call.scale * kLog2e;

    // Takes keys in; those not `seen` are zeros. All lanes of a warp come here together, for the shuffles.
    const auto take = [&](const auto& k, const auto& v, const auto& seen) {
        constexpr int kCount = sizeof(seen) / sizeof(seen[0]);
        float score[kCount], best = maximum;
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
            float x[kElements], sum = 0.0f;
            widen(k[u], x, static_cast<const T*>(nullptr));
#pragma unroll
            for (int i = 0; i < kElements; ++i) sum = fmaf(q[i], x[i], sum);
#pragma unroll
            for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
            score[u] = seen[u] ? sum : -INFINITY;
            best = fmaxf(best, score[u]);
        }
        const float base = best == -INFINITY ? 0.0f : best;
        const float keep = exp2f(maximum - base);
        total *= keep;
#pragma unroll
        for (int i = 0; i < kElements; ++i) o[i] *= keep;
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
            float x[kElements];
            widen(v[u], x, static_cast<const T*>(nullptr));
            const float weight = exp2f(score[u] - base);
            total += weight;
#pragma unroll
            for (int i = 0; i < kElements; ++i) o[i] = fmaf(weight, x[i], o[i]);
        }
        maximum = best;
    };
    if (part == parts - 1) {
#pragma unroll 1
        for (int32_t t0 = older; t0 < keys; t0 += kGroups) {
            const int32_t t = t0 + group;
            Bytes16 k[1] = {}, v[1] = {};
            const bool seen[1] = {t < keys};
            if (seen[0]) {
                const T* from = projected + (start + t - (length - rows)) * call.query_stride;
                k[0] = *reinterpret_cast<const Bytes16*>(from + width);
                v[0] = *reinterpret_cast<const Bytes16*>(from + 2 * width);
            }
            take(k, v, seen);
        }
    }

    if (threadIdx.x < 2 * kLanes && slot_in_range(pages, slot)) {
        const bool is_value = threadIdx.x >= kLanes;
        T* to = static_cast<T*>(is_value ? call.v_pages : call.k_pages) + lane * kElements;
        *reinterpret_cast<Bytes16*>(to + slot_offset(pages, slot, head)) =
            *reinterpret_cast<const Bytes16*>(projected + row * call.query_stride + (is_value ? 2 : 1) * width);
    }

#pragma unroll 1
    for (int32_t t0 = first; t0 < last; t0 += kGroups * kUnroll) {
        Bytes16 k[kUnroll], v[kUnroll];
        int32_t page[kUnroll];
        bool seen[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {  // all entries are asked for before the first is waited for
            const int32_t t = t0 + u * kGroups + group;
            page[u] = t < last ? table[t >> shift] : -1;
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int32_t t = t0 + u * kGroups + group;
            seen[u] = page[u] >= 0 && page[u] < num_pages;
            k[u] = v[u] = Bytes16{};
            if (seen[u]) {
                const int64_t at = int64_t{page[u]} * page_stride + (t & (pages.page_size - 1)) * D;
                k[u] = *reinterpret_cast<const Bytes16*>(k_pages + at);
                v[u] = *reinterpret_cast<const Bytes16*>(v_pages + at);
            }
        }
        take(k, v, seen);
    }

    // groups of a warp by shuffles, warps through shared memory
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2) {
        float other[kElements];
        const float other_maximum = __shfl_xor_sync(0xffffffffu, maximum, step);
        const float other_total = __shfl_xor_sync(0xffffffffu, total, step);
#pragma unroll
        for (int i = 0; i < kElements; ++i) other[i] = __shfl_xor_sync(0xffffffffu, o[i], step);
        join(maximum, total, o, other_maximum, other_total, other);
    }
    __shared__ float shared[kWarps][D + 2];
    const int32_t warp = threadIdx.x / 32;
    if (threadIdx.x % 32 < kLanes) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) shared[warp][lane * kElements + i] = o[i];
        if (lane == 0) {
            shared[warp][D] = maximum;
            shared[warp][D + 1] = total;
        }
    }
    __syncthreads();

    // from here on thread d holds element d of the head
    const int32_t d = threadIdx.x;
    float value[1] = {0.0f};
    maximum = -INFINITY;
    total = 0.0f;
    if (d < D) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float other[1] = {shared[w][d]};
            join(maximum, total, value, shared[w][D], shared[w][D + 1], other);
        }
    }
    if (parts > 1) {
        // the last block of this row and head to arrive joins all parts and leaves the counter at zero for the next
        // launch, so a captured graph can be replayed
        const int64_t pair = static_cast<int64_t>(row) * pages.n_head + head;
        float* partials = scratch.partials + pair * parts * (D + 2);
        if (d < D) {
            partials[part * (D + 2) + d] = value[0];
            if (d == 0) {
                partials[part * (D + 2) + D] = maximum;
                partials[part * (D + 2) + D + 1] = total;
            }
        }
        __shared__ bool is_last;
        __syncthreads();
        if (d == 0) {
            __threadfence();
            is_last = atomicAdd(scratch.counters + pair, 1) == parts - 1;
            __threadfence();
        }
        __syncthreads();
        if (!is_last) return;
        if (d == 0) scratch.counters[pair] = 0;
        static_assert(kMaxParts <= 32, "a lane for each part");
        if (d < D) {  // whole warps: lane i looks after part i
            const int32_t i = threadIdx.x % 32;
            const float* mine = partials + i * (D + 2) + D;
            const float its_maximum = i < parts ? __ldcg(mine) : -INFINITY;
            total = i < parts ? __ldcg(mine + 1) : 0.0f;
            maximum = its_maximum;
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, step));
            const float weight = exp2f(its_maximum - (maximum == -INFINITY ? 0.0f : maximum));
            total *= weight;
#pragma unroll
            for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
            value[0] = 0.0f;
#pragma unroll 8
            for (int32_t p = 0; p < parts; ++p)
                value[0] = fmaf(__shfl_sync(0xffffffffu, weight, p), __ldcg(partials + p * (D + 2) + d), value[0]);
        }
    }
    if (d < D)
        narrow(total == 0.0f ? 0.0f : value[0] / total,
               static_cast<T*>(call.out) + row * call.out_stride + int64_t{head} * D + d);
}

// One thread moves 16 bytes of K or V of one row.
__global__ void __launch_bounds__(kThreads) append(Append call, int32_t element_size) {
    const int32_t head_chunks = call.pages.head_dim * element_size / 16, chunks = 2 * call.pages.n_head * head_chunks;
    const int32_t chunk = blockIdx.y * kThreads + threadIdx.x;
    const int64_t row = blockIdx.x, slot = call.slots[row];
    if (chunk >= chunks || !slot_in_range(call.pages, slot)) return;
    const int32_t head = chunk / head_chunks % call.pages.n_head;
    const bool is_value = chunk >= chunks / 2;
    const char* qkv = static_cast<const char*>(call.qkv) + row * call.qkv_stride * element_size;
    const int64_t to = slot_offset(call.pages, slot, head) * element_size + chunk % head_chunks * 16;
    *reinterpret_cast<Bytes16*>(static_cast<char*>(is_value ? call.v_pages : call.k_pages) + to) =
        reinterpret_cast<const Bytes16*>(qkv)[chunks / 2 + chunk];
}

// One thread takes the same 16 bytes of a page through all pairs, so that the pairs' order holds.
// `other` are the addresses of a second tensor of the same geometry, V to the first one's K.
__global__ void __launch_bounds__(kThreads) copy(Copy call, const void* other_source, void* other_destination) {
    const char* source = static_cast<const char*>(blockIdx.y ? other_source : call.source);
    char* destination = static_cast<char*>(blockIdx.y ? other_destination : call.destination);
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 16;
    if (at >= call.page_bytes) return;
    for (int32_t pair = 0; pair < call.count; ++pair) {
        const int64_t from = call.pairs[2 * pair], to = call.pairs[2 * pair + 1];
        if (from < 0 || from >= call.source_pages || to < 0 || to >= call.destination_pages) continue;
        *reinterpret_cast<Bytes16*>(destination + to * call.page_bytes + at) =
            *reinterpret_cast<const Bytes16*>(source + from * call.page_bytes + at);
    }
}

// One thread moves 16 bytes of one token and head; tokens of a page out of range become zeros.
__global__ void __launch_bounds__(kThreads) gather(Gather call) {
    const int32_t chunks = call.pages.head_dim * call.element_size / 16;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= static_cast<int64_t>(call.length) * chunks) return;
    const int32_t t = static_cast<int32_t>(index / chunks), head = blockIdx.y;
    const int32_t page = call.table[t / call.pages.page_size];
    Bytes16 moved{};
    if (page >= 0 && page < call.pages.num_pages) {
        const int64_t from = page_offset(call.pages, page, head, t % call.pages.page_size) * call.element_size;
        moved = *reinterpret_cast<const Bytes16*>(static_cast<const char*>(call.source) + from + index % chunks * 16);
    }
    static_cast<Bytes16*>(call.out)[static_cast<int64_t>(head) * call.length * chunks + index] = moved;
}

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes `device` current and puts the caller's back.
class Device {
public:
    explicit Device(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = before_ != device;
    }
    ~Device() {
        if (changed_) (void)cudaSetDevice(before_);
    }
    Device(const Device&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

unsigned blocks_for(int64_t count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }

// A function, not <<<>>>: this file is C++ then, and the tests run its kernels on a CPU (tests/simulated_cuda).
template <class... Parameters, class... Arguments>
void launch(const char* what, dim3 grid, void* stream, void (*kernel)(Parameters...), const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

template <class T>
void launch_attend(const Attention& call, dim3 grid, const Scratch& scratch, int32_t columns, void* stream) {
    const int32_t width = call.pages.head_dim;
    const auto kernel = width == 32 ? attend<T, 32> : width == 64 ? attend<T, 64> : attend<T, 128>;
    launch("paged_attention", grid, stream, kernel, call, static_cast<int32_t>(grid.x), scratch, columns);
}

}  // namespace

void paged_attention(const Attention& call, int32_t max_keys, const Scratch& scratch, int device, void* stream) {
    if (!call.rows || !call.pages.n_head) return;
    if (call.rows > 65535)  // the z dimension of a grid
        throw std::invalid_argument("query has " + std::to_string(call.rows) + " rows; at most 65535 on CUDA");
    const Device guard(device);
    // two blocks a multiprocessor are enough to keep the memory busy; the rule sees shapes only, so that a captured
    // graph stays right whatever the lengths become
    int processors = 1;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    const int64_t pairs = int64_t{call.rows} * call.pages.n_head;
    int64_t parts = (2 * processors + pairs - 1) / pairs;
    const int64_t room =
        scratch.counter_count < pairs ? 1 : scratch.partial_count / (pairs * (call.pages.head_dim + 2));
    for (const int64_t most : {int64_t{max_keys / kLeastPart}, room, int64_t{kMaxParts}})
        parts = parts < most ? parts : most;
    parts = parts > 1 ? parts : 1;
    const dim3 grid(static_cast<unsigned>(parts), call.pages.n_head, call.rows);
    const int32_t columns = max_keys / call.pages.page_size;
    if (call.dtype == DType::f32) launch_attend<float>(call, grid, scratch, columns, stream);
    if (call.dtype == DType::f16) launch_attend<__half>(call, grid, scratch, columns, stream);
    if (call.dtype == DType::bf16) launch_attend<__nv_bfloat16>(call, grid, scratch, columns, stream);
}

std::string fault(int device) {
    try {
        const Device guard(device);
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, attend<float, 64>), "cudaFuncGetAttributes");
        return "";
    } catch (const std::runtime_error& error) {
        (void)cudaGetLastError();  // or the next launch would report it
        return error.what();
    }
}

void append_kv(const Append& call, int device, void* stream) {
    const int64_t chunks = int64_t{2} * call.pages.n_head * call.pages.head_dim * size_of(call.dtype) / 16;
    if (!call.rows || !chunks) return;
    const Device guard(device);
    const dim3 grid(call.rows, blocks_for(chunks));
    launch("append_kv", grid, stream, append, call, size_of(call.dtype));
}

void copy_pages(const Copy* copies, int count, int device, void* stream) {
    if (!count || !copies[0].count || !copies[0].page_bytes) return;
    const Device guard(device);
    const dim3 grid(blocks_for(copies[0].page_bytes / 16), count);
    launch("copy_pages", grid, stream, copy, copies[0], copies[count - 1].source, copies[count - 1].destination);
}

void gather_kv(const Gather& call, int device, void* stream) {
    const int64_t chunks = int64_t{call.length} * call.pages.head_dim * call.element_size / 16;
    if (!chunks || !call.pages.n_head) return;
    const Device guard(device);
    launch("gather_kv", dim3(blocks_for(chunks), call.pages.n_head), stream, gather, call);
}

void swap_pages(const Copy& call, int device, void* stream) {
    const Device guard(device);
    for (int32_t pair = 0; pair < call.count; ++pair)
        check(cudaMemcpyAsync(static_cast<char*>(call.destination) + call.pairs[2 * pair + 1] * call.page_bytes,
                              static_cast<const char*>(call.source) + call.pairs[2 * pair] * call.page_bytes,
                              static_cast<size_t>(call.page_bytes), cudaMemcpyDefault,
                              static_cast<cudaStream_t>(stream)),
              "swap_pages");
}

}  // namespace cuda
}  // namespace bark_fast
