// The Python module bark_fast._C: what it was built with, and the parts it is put together from.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "decode_bindings.h"
#include "flash_bindings.h"
#include "isa.h"
#include "linear_bindings.h"
#include "page_pool_bindings.h"
#include "paged_kv_bindings.h"
#include "parallel.h"
#include "philox.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
    return parts;
}

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#else
    return "g++ " __VERSION__;
#endif
}

// setup.py passes the three macros as string literals
py::dict build_info() {
    py::dict info;
    info["compiler"] = compiler();
    info["isas"] = split(BARK_FAST_BUILD_ISAS, ',');
    info["cuda_archs"] = split(BARK_FAST_BUILD_CUDA_ARCHS, ' ');
    info["no_cuda"] = std::string(BARK_FAST_BUILD_NO_CUDA);
    return info;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const char* const* name = bark_fast::cpu::isas(); *name; ++name) names.emplace_back(*name);
    return names;
}

void use_isa(const std::string& name) {
    if (!bark_fast::cpu::use_isa(name.c_str()))
        throw std::invalid_argument("instruction set '" + name + "' is not available here");
}

void use_cpu_kind(const std::string& name) {
    if (!bark_fast::use_cpu_kind(name.c_str()))
        throw std::invalid_argument("CPU kind '" + name + "' is none of intel, zen5, others");
}

void philox_uniform(uint64_t seed, uint32_t stream, uint32_t chunk, uint32_t first_step, py::handle out_) {
    using namespace bark_fast;
    const TensorView out = tensor_view(out_, "out");
    if (out.cuda) reject("out is on cuda; expected cpu");
    check_dtype(out, DType::f32);
    check_shape(out, {-1, -1});
    check_packed(out, 0);
    py::gil_scoped_release release;
    bark_fast::philox_uniform(seed, stream, chunk, first_step, out.shape[0], out.shape[1], out.as<float>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled parts of bark_fast.";
    m.attr("interface") = 1;  // raised with every change of a name or signature, here and in bark_fast/extension.py
    m.def("build_info", &build_info, "What this was built with: compiler, isas, cuda_archs, no_cuda (the reason).");
    bark_fast::bind_page_pool(m);
    bind_paged_kv(m);
    bind_linear(m);
    bind_decode(m);
    bind_flash(m);
    m.def("philox_uniform", &philox_uniform, py::arg("seed"), py::arg("stream"), py::arg("chunk"),
          py::arg("first_step"), py::arg("out"), "Uniform numbers of PhiloxNoise, before their logarithm.");
    m.def("isas", &isas, "Instruction sets that this build has and this machine runs, best first.");
    m.def("isa", &bark_fast::cpu::current_isa, "The instruction set in use.");
    m.def("use_isa", &use_isa, py::arg("name"), "Choose another instruction set, for tests.");
    m.def("cpu_kind", &bark_fast::cpu_kind, "The kind of CPU whose way of reading memory is followed.");
    m.def("use_cpu_kind", &use_cpu_kind, py::arg("name"), "Follow another: 'intel', 'zen5' or 'others', for tests.");
    m.def("cpu_is_intels", [] { return bark_fast::intels_cpu; },
          "Whether MKL, with which torch multiplies, is at its best here.");
    m.def("parallel_backend", &bark_fast::parallel_backend, "What CPU loops run on: 'openmp' or 'threads'.");
    m.def("avoid_openmp", &bark_fast::avoid_openmp, py::arg("avoid"),
          "Run loops on this library's own threads, for tests.");
}
