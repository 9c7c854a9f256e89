// Python face of the linear layers. bark_fast/ops/norm_linear.py and mlp.py document them; this checks and calls.
#include "linear_bindings.h"

#include <vector>

#include "gemm.h"
#include "linear_checks.h"

namespace py = pybind11;

namespace bark_fast {
namespace {

void linear(py::handle x_, py::handle norm_weight, py::handle norm_bias, py::handle weight, py::handle bias,
            py::handle residual, py::handle out, bool gelu, int threads, py::handle scales) {
    const TensorView x = any_rows(x_);
    Linear call = call_of(x, norm_weight, norm_bias, weight, "weight", bias, scales);
    if (call.scales) few_rows(x_);
    call.gelu = gelu;
    if (!residual.is_none()) add(call, matrix(residual, "residual", call.dtype, call.rows, call.n));
    write_to(call, out_rows(out, call.dtype, call.rows, call.n));
    py::gil_scoped_release release;
    if (call.rows > kMostLinearRows)
        cpu::gemm(call, threads);
    else
        cpu::linear_chain(&call, 1, threads);
}

void mlp(py::handle x_, py::handle norm_weight, py::handle norm_bias, py::handle fc_weight, py::handle fc_bias,
         py::handle proj_weight, py::handle proj_bias, py::handle out, int threads) {
    const TensorView x = few_rows(x_);
    Linear fc = call_of(x, norm_weight, norm_bias, fc_weight, "fc_weight", fc_bias);
    fc.gelu = true;
    thread_local std::vector<char> room;  // kept between calls
    const size_t bytes = static_cast<size_t>(fc.rows * fc.n * size_of(fc.dtype));
    if (room.size() < bytes) room.resize(bytes);
    const TensorView hidden = room_of(room.data(), fc.dtype, fc.rows, fc.n);
    write_to(fc, hidden);
    Linear proj = call_of(hidden, py::none(), py::none(), proj_weight, "proj_weight", proj_bias);
    check_shape(x, {proj.rows, proj.n});
    add(proj, x);
    write_to(proj, out_rows(out, proj.dtype, proj.rows, proj.n));
    const Linear calls[] = {fc, proj};
    py::gil_scoped_release release;
    cpu::linear_chain(calls, 2, threads);
}

}  // namespace
}  // namespace bark_fast

void bind_linear(py::module_& module) {
    using namespace bark_fast;
    module.attr("linear_rows") = kMostLinearRows;
    module.def("bf16_in_pairs", &cpu::bf16_in_pairs,
               "Whether rows of bf16 are multiplied two elements at a time, which takes half as long.");
    module.def("linear", &linear, py::arg("x"), py::arg("norm_weight"), py::arg("norm_bias"), py::arg("weight"),
               py::arg("bias"), py::arg("residual"), py::arg("out"), py::arg("gelu"), py::arg("threads"),
               py::arg("scales") = py::none());
    module.def("mlp", &mlp, py::arg("x"), py::arg("norm_weight"), py::arg("norm_bias"), py::arg("fc_weight"),
               py::arg("fc_bias"), py::arg("proj_weight"), py::arg("proj_bias"), py::arg("out"), py::arg("threads"));
}
