// Python face of attention over contiguous keys. bark_fast/ops/attention.py documents it; this checks and calls.
#include "flash_bindings.h"

#include "checks.h"
#include "flash.h"

namespace py = pybind11;

namespace bark_fast {
namespace {

// (batch, heads, rows, head_dim) of this dtype on the CPU; -1 takes any number.
TensorView heads_of(py::handle object, const char* name, DType dtype, std::initializer_list<int64_t> shape) {
    const TensorView t = tensor_view(object, name);
    if (t.cuda) reject(std::string(name) + " is on cuda; expected cpu");
    check_dtype(t, dtype);
    check_shape(t, shape);
    check_packed(t, 3);
    check_aligned(t);
    return t;
}

template <class Pointer>
HeadRows<Pointer> rows_of(const TensorView& t) {
    return {t.data, t.strides[0], t.strides[1], t.strides[2]};
}

void flash(py::handle query_, py::handle key_, py::handle value_, py::handle out_, bool causal, float scale,
           int threads) {
    const TensorView any = tensor_view(query_, "query");
    check_floating(any);
    const DType dtype = any.dtype;
    const TensorView query = heads_of(query_, "query", dtype, {-1, -1, -1, -1});
    const int64_t batch = query.shape[0], heads = query.shape[1], rows = query.shape[2], head_dim = query.shape[3];
    const TensorView key = heads_of(key_, "key", dtype, {batch, heads, -1, head_dim});
    const int64_t keys = key.shape[2];
    const TensorView value = heads_of(value_, "value", dtype, {batch, heads, keys, head_dim});
    const TensorView out = heads_of(out_, "out", dtype, {batch, heads, rows, head_dim});
    if (keys < (causal ? rows : 1))
        reject("there are " + std::to_string(keys) + " keys for " + std::to_string(rows) + " queries; expected " +
               (causal ? "as many or more" : "at least one"));
    if (head_dim % 2) reject("head_dim is " + std::to_string(head_dim) + "; expected an even number");
    if (!(scale > 0)) reject("scale is " + std::to_string(scale) + "; expected a positive value");
    const Flash call = {dtype, rows_of<const void*>(query), rows_of<const void*>(key), rows_of<const void*>(value),
                        rows_of<void*>(out), batch, heads, rows, keys, head_dim, scale, causal};
    py::gil_scoped_release release;
    cpu::flash(call, threads);
}

}  // namespace
}  // namespace bark_fast

void bind_flash(py::module_& module) {
    using namespace bark_fast;
    module.def("flash", &flash, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("out"), py::arg("causal"),
               py::arg("scale"), py::arg("threads"));
}
