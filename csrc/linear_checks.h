// What bindings demand of linear layers.
#pragma once

#include "checks.h"
#include "linear.h"

namespace bark_fast {

// (rows, columns) of the call's dtype on the CPU; -1 takes any number.
inline TensorView matrix(pybind11::handle object, const char* name, DType dtype, int64_t rows, int64_t columns) {
    const TensorView t = tensor_view(object, name);
    if (t.cuda) reject(std::string(name) + " is on cuda; expected cpu");
    check_dtype(t, dtype);
    check_shape(t, {rows, columns});
    check_packed(t, 1);
    check_aligned(t);
    return t;
}

// (size,) or, where the argument is None, null.
inline const void* vector(pybind11::handle object, const char* name, DType dtype, int64_t size) {
    if (object.is_none()) return nullptr;
    const TensorView t = tensor_view(object, name);
    if (t.cuda) reject(std::string(name) + " is on cuda; expected cpu");
    check_dtype(t, dtype);
    check_shape(t, {size});
    check_packed(t, 0);
    check_aligned(t);
    return t.data;
}

// x and weight, and the norm before them; the rest is the caller's. scales: of an int8 weight, else None.
inline Linear call_of(const TensorView& x, pybind11::handle norm_weight, pybind11::handle norm_bias, pybind11::handle weight_,
                      const char* weight_name, pybind11::handle bias, pybind11::handle scales = pybind11::none()) {
    const DType dtype = x.dtype;
    const TensorView weight = matrix(weight_, weight_name, scales.is_none() ? dtype : DType::i8, -1, x.shape[1]);
    Linear call{};
    call.dtype = dtype;
    call.x = x.data;
    call.x_stride = x.strides[0];
    call.rows = x.shape[0];
    call.k = x.shape[1];
    call.n = weight.shape[0];
    call.norm_weight = vector(norm_weight, "norm_weight", dtype, call.k);
    call.norm_bias = vector(norm_bias, "norm_bias", dtype, call.k);
    call.weight = weight.data;
    call.scales = static_cast<const float*>(vector(scales, "scales", DType::f32, call.n));
    call.weight_stride = weight.strides[0];
    call.bias = vector(bias, "bias", dtype, call.n);
    return call;
}

// Rows that are computed, from the caller's own memory.
inline TensorView room_of(void* data, DType dtype, int64_t rows, int64_t columns) {
    TensorView t{};
    t.data = data;
    t.dtype = dtype;
    t.ndim = 2;
    t.shape[0] = rows;
    t.shape[1] = t.strides[0] = columns;
    t.strides[1] = 1;
    return t;
}

inline void write_to(Linear& call, const TensorView& out) {
    call.out = out.data;
    call.out_stride = out.strides[0];
}

inline void add(Linear& call, const TensorView& residual) {
    call.residual = residual.data;
    call.residual_stride = residual.strides[0];
}

// x: (rows, any).
inline TensorView any_rows(pybind11::handle x_) {
    const TensorView x = tensor_view(x_, "x");
    check_floating(x);
    return matrix(x_, "x", x.dtype, -1, -1);
}

// The same, at most kMostLinearRows of them.
inline TensorView few_rows(pybind11::handle x_) {
    const TensorView x = any_rows(x_);
    if (x.shape[0] > kMostLinearRows)
        reject("x has " + std::to_string(x.shape[0]) + " rows; at most " + std::to_string(kMostLinearRows));
    return x;
}

inline TensorView out_rows(pybind11::handle out_, DType dtype, int64_t rows, int64_t columns) {
    const TensorView out = matrix(out_, "out", dtype, rows, columns);
    check_rows(out, columns);
    return out;
}

}  // namespace bark_fast
