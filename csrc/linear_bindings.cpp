// Python face of the linear layers. bark_fast/ops/norm_linear.py and mlp.py document them; this checks and calls.
#include "linear_bindings.h"

#include <vector>

#include "checks.h"
#include "linear.h"

namespace py = pybind11;

namespace bark_fast {
namespace {

void check_floating(const TensorView& t) {
    if (t.dtype == DType::i32 || t.dtype == DType::i64)
        reject(std::string(t.name) + " is " + name_of(t.dtype) + "; expected float32, float16 or bfloat16");
}

// (rows, columns) of the call's dtype on the CPU; -1 takes any number.
TensorView matrix(py::handle object, const char* name, DType dtype, int64_t rows, int64_t columns) {
    const TensorView t = tensor_view(object, name);
    if (t.cuda) reject(std::string(name) + " is on cuda; expected cpu");
    check_dtype(t, dtype);
    check_shape(t, {rows, columns});
    check_packed(t, 1);
    check_aligned(t);
    return t;
}

// (size,) or, where the argument is None, null.
const void* vector(py::handle object, const char* name, DType dtype, int64_t size) {
    if (object.is_none()) return nullptr;
    const TensorView t = tensor_view(object, name);
    if (t.cuda) reject(std::string(name) + " is on cuda; expected cpu");
    check_dtype(t, dtype);
    check_shape(t, {size});
    check_packed(t, 0);
    check_aligned(t);
    return t.data;
}

// x and weight, and the norm before them; the rest is the caller's.
Linear call_of(const TensorView& x, py::handle norm_weight, py::handle norm_bias, py::handle weight_,
               const char* weight_name, py::handle bias) {
    const DType dtype = x.dtype;
    const TensorView weight = matrix(weight_, weight_name, dtype, -1, x.shape[1]);
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
    call.weight_stride = weight.strides[0];
    call.bias = vector(bias, "bias", dtype, call.n);
    return call;
}

TensorView rows_of(py::handle x_) {
    TensorView x = tensor_view(x_, "x");
    check_floating(x);
    x = matrix(x_, "x", x.dtype, -1, -1);
    if (x.shape[0] > kMostLinearRows)
        reject("x has " + std::to_string(x.shape[0]) + " rows; at most " + std::to_string(kMostLinearRows));
    return x;
}

void write_to(Linear& call, py::handle out_) {
    const TensorView out = matrix(out_, "out", call.dtype, call.rows, call.n);
    check_rows(out, call.n);
    call.out = out.data;
    call.out_stride = out.strides[0];
}

void add_residual(Linear& call, py::handle residual_) {
    if (residual_.is_none()) return;
    const TensorView residual = matrix(residual_, "residual", call.dtype, call.rows, call.n);
    call.residual = residual.data;
    call.residual_stride = residual.strides[0];
}

void linear(py::handle x_, py::handle norm_weight, py::handle norm_bias, py::handle weight, py::handle bias,
            py::handle residual, py::handle out, bool gelu, int threads) {
    Linear call = call_of(rows_of(x_), norm_weight, norm_bias, weight, "weight", bias);
    call.gelu = gelu;
    add_residual(call, residual);
    write_to(call, out);
    py::gil_scoped_release release;
    cpu::linear_chain(&call, 1, threads);
}

void mlp(py::handle x_, py::handle norm_weight, py::handle norm_bias, py::handle fc_weight, py::handle fc_bias,
         py::handle proj_weight, py::handle proj_bias, py::handle out, int threads) {
    Linear fc = call_of(rows_of(x_), norm_weight, norm_bias, fc_weight, "fc_weight", fc_bias);
    fc.gelu = true;
    thread_local std::vector<char> room;  // of the hidden rows
    const size_t bytes = static_cast<size_t>(fc.rows * fc.n * size_of(fc.dtype));
    if (room.size() < bytes) room.resize(bytes);
    fc.out = room.data();
    fc.out_stride = fc.n;
    TensorView hidden{};
    hidden.name = "hidden";
    hidden.data = fc.out;
    hidden.dtype = fc.dtype;
    hidden.ndim = 2;
    hidden.shape[0] = fc.rows;
    hidden.shape[1] = hidden.strides[0] = fc.n;
    hidden.strides[1] = 1;
    Linear proj = call_of(hidden, py::none(), py::none(), proj_weight, "proj_weight", proj_bias);
    add_residual(proj, x_);
    write_to(proj, out);
    const Linear calls[] = {fc, proj};
    py::gil_scoped_release release;
    cpu::linear_chain(calls, 2, threads);
}

}  // namespace
}  // namespace bark_fast

void bind_linear(py::module_& module) {
    using namespace bark_fast;
    module.attr("linear_rows") = kMostLinearRows;
    module.def("linear", &linear, py::arg("x"), py::arg("norm_weight"), py::arg("norm_bias"), py::arg("weight"),
               py::arg("bias"), py::arg("residual"), py::arg("out"), py::arg("gelu"), py::arg("threads"));
    module.def("mlp", &mlp, py::arg("x"), py::arg("norm_weight"), py::arg("norm_bias"), py::arg("fc_weight"),
               py::arg("fc_bias"), py::arg("proj_weight"), py::arg("proj_bias"), py::arg("out"), py::arg("threads"));
}
