// What bindings demand of tensors. Each check throws std::invalid_argument (ValueError in Python) with the argument's
// name, its value and the bound.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "tensor_view.h"

namespace bark_fast {

[[noreturn]] inline void reject(const std::string& what) { throw std::invalid_argument(what); }

inline std::string shape_of(const TensorView& t) {
    std::string text = "(";
    for (int i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
    return text + (t.ndim == 1 ? ",)" : ")");
}

inline void check_dtype(const TensorView& t, DType dtype) {
    if (t.dtype != dtype) reject(std::string(t.name) + " is " + name_of(t.dtype) + "; expected " + name_of(dtype));
}

inline void check_floating(const TensorView& t) {
    if (t.dtype != DType::f32 && t.dtype != DType::f16 && t.dtype != DType::bf16)
        reject(std::string(t.name) + " is " + name_of(t.dtype) + "; expected float32, float16 or bfloat16");
}

// A dimension of -1 takes any size.
inline void check_shape(const TensorView& t, std::initializer_list<int64_t> shape) {
    bool same = t.ndim == static_cast<int>(shape.size());
    std::string wanted;
    int i = 0;
    for (const int64_t size : shape) {
        same = same && (size < 0 || t.shape[i] == size);
        wanted += (i++ ? ", " : "") + (size < 0 ? "any" : std::to_string(size));
    }
    if (!same)
        reject(std::string(t.name) + " has shape " + shape_of(t) + "; expected (" + wanted + (i == 1 ? ",)" : ")"));
}

// Dimensions from `first` on lie one after another in memory.
inline void check_packed(const TensorView& t, int first) {
    for (int i = 0; i < t.ndim; ++i)
        if (t.shape[i] == 0) return;
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= first; --i) {
        if (t.shape[i] > 1 && t.strides[i] != stride)
            reject(std::string(t.name) + " has stride " + std::to_string(t.strides[i]) + " in dimension " +
                   std::to_string(i) + "; expected " + std::to_string(stride) + " (contiguous)");
        stride *= t.shape[i];
    }
}

// Rows may lie anywhere, but not on top of each other or backwards when they are written.
inline void check_rows(const TensorView& t, int64_t width) {
    if (t.shape[0] > 1 && t.strides[0] < width)
        reject(std::string(t.name) + " has row stride " + std::to_string(t.strides[0]) + "; expected at least " +
               std::to_string(width));
}

// CUDA kernels move 16 bytes at a time; the CPU code takes any address that its elements may have.
inline void check_aligned(const TensorView& t) {
    const uintptr_t unit = t.cuda ? 16 : static_cast<uintptr_t>(size_of(t.dtype));
    if (reinterpret_cast<uintptr_t>(t.data) % unit)
        reject(std::string(t.name) + " starts at an address that is not a multiple of " + std::to_string(unit));
    if (t.cuda && t.ndim > 1 && t.shape[0] > 1 && t.strides[0] * size_of(t.dtype) % 16)
        reject(std::string(t.name) + " has a row stride of " + std::to_string(t.strides[0] * size_of(t.dtype)) +
               " bytes; expected a multiple of 16");
}

inline void check_same_device(const TensorView& t, const TensorView& as) {
    if (t.cuda != as.cuda || t.device_index != as.device_index) {
        const auto device = [](const TensorView& v) {
            return v.cuda ? "cuda:" + std::to_string(v.device_index) : std::string("cpu");
        };
        reject(std::string(t.name) + " is on " + device(t) + "; expected " + device(as) + " as " + as.name);
    }
}

inline void check_fits(const TensorView& t, int dim, int64_t most) {
    if (t.shape[dim] > most)
        reject(std::string(t.name) + " has " + std::to_string(t.shape[dim]) + " entries in dimension " +
               std::to_string(dim) + "; at most " + std::to_string(most));
}

}  // namespace bark_fast
