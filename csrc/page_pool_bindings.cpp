#include "page_pool_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>

#include "page_pool.h"

namespace py = pybind11;

namespace bark_fast {
namespace {

// The classes of bark_fast/errors.py, held for good: exception translators cannot carry state.
struct PythonErrors {
    PyObject* out_of_pages;
    PyObject* invalid_sequence;
    PyObject* invalid_input;
};

const PythonErrors& python_errors() {
    static const PythonErrors errors = [] {
        const py::module_ module = py::module_::import("bark_fast.errors");
        const auto get = [&](const char* name) { return py::object(module.attr(name)).release().ptr(); };
        return PythonErrors{get("OutOfPages"), get("InvalidSequence"), get("InvalidInput")};
    }();
    return errors;
}

void translate(std::exception_ptr pointer) {
    try {
        std::rethrow_exception(pointer);
    } catch (const OutOfPages& error) {
        PyErr_SetString(python_errors().out_of_pages, error.what());
    } catch (const InvalidSequence& error) {
        PyErr_SetString(python_errors().invalid_sequence, error.what());
    } catch (const InvalidInput& error) {
        PyErr_SetString(python_errors().invalid_input, error.what());
    }
}

// Checked, never converted: a converted copy would be written in vain. Rows may be strided, elements may not.
template <typename T>
T* elements(const char* name, py::array& array, py::ssize_t ndim, bool writable) {
    constexpr const char* kDtype = sizeof(T) == 8 ? "int64" : "int32";
    if (!py::isinstance<py::array_t<T>>(array))
        throw InvalidInput(std::string(name) + " has dtype " + std::string(py::str(array.dtype())) + "; it must be " +
                           kDtype);
    if (array.ndim() != ndim)
        throw InvalidInput(std::string(name) + " has " + std::to_string(array.ndim()) + " dimensions; it must have " +
                           std::to_string(ndim));
    const bool aligned = (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
    const bool strided = ndim == 2 && (array.strides(0) < 0 || array.strides(0) % static_cast<py::ssize_t>(sizeof(T)));
    if (array.size() > 0 && (!aligned || strided || array.strides(ndim - 1) != sizeof(T)))
        throw InvalidInput(std::string(name) + " is not contiguous in its last dimension; it must be");
    if (writable && !array.writeable()) throw InvalidInput(std::string(name) + " is read-only; it must be writable");
    return static_cast<T*>(const_cast<void*>(array.data()));
}

void check_size(const char* name, py::ssize_t size, py::ssize_t batch) {
    if (size != batch)
        throw InvalidInput(std::string(name) + " has " + std::to_string(size) + " elements; handles has " +
                           std::to_string(batch));
}

struct Batch {
    Batch(py::array& handles, py::array& n_new)
        : handles(elements<Handle>("handles", handles, 1, false)),
          n_new(elements<std::int32_t>("n_new", n_new, 1, false)),
          size(handles.size()) {
        check_size("n_new", n_new.size(), size);
    }
    const Handle* handles;
    const std::int32_t* n_new;
    py::ssize_t size;
};

py::array_t<std::int32_t> step(PagePool& pool, py::array handles, py::array n_new, py::array block_tables,
                               py::array slots, py::array lengths) {
    const Batch batch(handles, n_new);
    StepOutput out{};
    out.block_tables = elements<std::int32_t>("block_tables", block_tables, 2, true);
    check_size("block_tables", block_tables.shape(0), batch.size);
    out.row_stride = block_tables.strides(0) / static_cast<py::ssize_t>(sizeof(std::int32_t));
    out.max_pages = block_tables.shape(1);
    out.slots = elements<std::int64_t>("slots", slots, 1, true);
    out.num_slots = slots.size();
    out.lengths = elements<std::int32_t>("lengths", lengths, 1, true);
    check_size("lengths", lengths.size(), batch.size);
    std::vector<PageCopy> copies;
    {
        py::gil_scoped_release released;
        pool.step(batch.handles, batch.n_new, batch.size, out, copies);
    }
    static_assert(sizeof(PageCopy) == 2 * sizeof(std::int32_t));
    py::array_t<std::int32_t> result({static_cast<py::ssize_t>(copies.size()), py::ssize_t{2}});
    if (!copies.empty()) std::memcpy(result.mutable_data(), copies.data(), copies.size() * sizeof(PageCopy));
    return result;
}

template <typename Result>
Result ask(const PagePool& pool, py::array& handles, py::array& n_new,
           Result (PagePool::*question)(const Handle*, const std::int32_t*, std::size_t) const) {
    const Batch batch(handles, n_new);
    py::gil_scoped_release released;
    return (pool.*question)(batch.handles, batch.n_new, batch.size);
}

py::array_t<std::int32_t> as_array(const std::vector<std::int32_t>& values) {
    return py::array_t<std::int32_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

}  // namespace

void bind_page_pool(py::module_& m) {
    python_errors();
    py::register_local_exception_translator(&translate);

    py::class_<PoolStats>(m, "PoolStats")
        .def_readonly("pages_total", &PoolStats::pages_total)
        .def_readonly("pages_used", &PoolStats::pages_used)
        .def_readonly("pages_free", &PoolStats::pages_free)
        .def_readonly("pages_shared", &PoolStats::pages_shared)
        .def_readonly("tokens_live", &PoolStats::tokens_live)
        .def_readonly("tokens_reserved", &PoolStats::tokens_reserved)
        .def_readonly("tokens_waste", &PoolStats::tokens_waste)
        .def_readonly("sequences", &PoolStats::sequences);

    // Nobody who holds a pool's mutex ever wants the GIL, so there is no deadlock; giving it up merely spares the
    // other threads the wait.
    const py::call_guard<py::gil_scoped_release> released;
    py::class_<PagePool>(m, "PagePool")
        .def(py::init<std::int64_t, std::int64_t>(), py::arg("num_pages"), py::arg("page_size"))
        .def_property_readonly("num_pages", &PagePool::num_pages)
        .def_property_readonly("page_size", &PagePool::page_size)
        .def("create", &PagePool::create, released)
        .def(
            "extend",
            [](PagePool& pool, Handle handle, std::int64_t n) -> std::optional<std::pair<std::int32_t, std::int32_t>> {
                const std::optional<PageCopy> copy = pool.extend(handle, n);
                if (!copy) return std::nullopt;
                return std::pair(copy->source, copy->target);
            },
            py::arg("handle"), py::arg("n"), released)
        .def("truncate", &PagePool::truncate, py::arg("handle"), py::arg("length"), released)
        .def("fork", &PagePool::fork, py::arg("handle"), py::arg("length") = py::none(), released)
        .def("free", &PagePool::free, py::arg("handle"), released)
        .def("length", &PagePool::length, py::arg("handle"), released)
        .def(
            "pages", [](const PagePool& pool, Handle handle) { return as_array(pool.pages(handle)); },
            py::arg("handle"))
        .def("reference_counts", [](const PagePool& pool) { return as_array(pool.reference_counts()); })
        .def("stats", &PagePool::stats, released)
        .def("step", &step, py::arg("handles"), py::arg("n_new"), py::arg("block_tables"), py::arg("slots"),
             py::arg("lengths"))
        .def(
            "pages_needed",
            [](const PagePool& pool, py::array handles, py::array n_new) {
                return ask(pool, handles, n_new, &PagePool::pages_needed);
            },
            py::arg("handles"), py::arg("n_new"))
        .def(
            "can_extend",
            [](const PagePool& pool, py::array handles, py::array n_new) {
                return ask(pool, handles, n_new, &PagePool::can_extend);
            },
            py::arg("handles"), py::arg("n_new"));
}

}  // namespace bark_fast
