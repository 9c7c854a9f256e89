// The Python module bark_fast._C: what it was built with, and the parts it is put together from.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "page_pool_bindings.h"
#if __has_include("paged_kv_bindings.h")
#include "paged_kv_bindings.h"
#define BARK_FAST_HAS_PAGED_KV 1
#endif

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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled parts of bark_fast.";
    m.def("build_info", &build_info, "What this was built with: compiler, isas, cuda_archs, no_cuda (the reason).");
    bark_fast::bind_page_pool(m);
#ifdef BARK_FAST_HAS_PAGED_KV
    bind_paged_kv(m);
#endif
}
