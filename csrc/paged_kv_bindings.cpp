// Python face of the paged cache. bark_fast/ops/paged_kv.py documents the functions; this checks and calls.
#include "paged_kv_bindings.h"

#include "paged_kv_checks.h"

namespace py = pybind11;

namespace bark_fast {
namespace {

// CUDA calls carry the stream; a build without CUDA says so.
void need_cuda([[maybe_unused]] const TensorView& t) {
#ifndef BARK_FAST_CUDA
    reject(std::string(t.name) + " is on CUDA, and this build of bark_fast._C has no CUDA code");
#endif
}

// Rows of q | k | v and where their keys and values go.
Append append_of(const TensorView& qkv, const TensorView& k, const TensorView& v, const TensorView& slots) {
    const PageShape pages = check_page_pair(k, v);
    const int64_t width = int64_t{pages.n_head} * pages.head_dim;
    check_dtype(qkv, k.dtype);
    check_same_device(qkv, k);
    check_shape(qkv, {-1, 3 * width});
    check_packed(qkv, 1);
    check_aligned(qkv);
    check_fits(qkv, 0, INT32_MAX / 2);
    check_dtype(slots, DType::i64);
    check_same_device(slots, k);
    check_shape(slots, {qkv.shape[0]});
    check_packed(slots, 0);
    return {pages,  k.dtype, qkv.data, qkv.strides[0], k.data, v.data, slots.as<int64_t>(),
            static_cast<int32_t>(qkv.shape[0])};
}

// What rows of queries attend to. `query` and `k` are checked.
Attention attention_of(const TensorView& query, const TensorView& k, const TensorView& v, const PageShape& pages,
                       const TensorView& table, const TensorView& lengths, const TensorView& starts,
                       const TensorView& out, float scale) {
    check_dtype(out, k.dtype);
    check_shape(out, {query.shape[0], int64_t{pages.n_head} * pages.head_dim});
    check_packed(out, 1);
    check_rows(out, out.shape[1]);
    check_aligned(out);
    check_dtype(table, DType::i32);
    check_shape(table, {-1, -1});
    if (query.shape[0] && !table.shape[0])
        reject("block_table has no sequence; expected one or more for " + std::to_string(query.shape[0]) + " rows");
    check_packed(table, 1);
    check_fits(table, 0, INT32_MAX / 2);
    check_fits(table, 1, INT32_MAX / pages.page_size);
    check_dtype(lengths, DType::i32);
    check_shape(lengths, {table.shape[0]});
    check_packed(lengths, 0);
    check_dtype(starts, DType::i32);
    check_shape(starts, {table.shape[0] + 1});
    check_packed(starts, 0);
    for (const TensorView* t : {&out, &table, &lengths, &starts}) check_same_device(*t, k);
    return {pages,
            k.dtype,
            query.data,
            query.strides[0],
            k.data,
            v.data,
            table.as<int32_t>(),
            table.strides[0],
            lengths.as<int32_t>(),
            starts.as<int32_t>(),
            out.data,
            out.strides[0],
            static_cast<int32_t>(table.shape[0]),
            static_cast<int32_t>(query.shape[0]),
            scale,
            nullptr};
}

// Enqueues attention. Releases the GIL.
void attend_on_cuda([[maybe_unused]] const Attention& call, const TensorView& k,
                    [[maybe_unused]] int64_t table_columns, [[maybe_unused]] py::handle partials_,
                    [[maybe_unused]] py::handle counters_, [[maybe_unused]] uintptr_t stream) {
    need_cuda(k);
#ifdef BARK_FAST_CUDA
    cuda::Scratch scratch{};
    if (!partials_.is_none() && !counters_.is_none()) {
        const TensorView partials = tensor_view(partials_, "partials"), counters = tensor_view(counters_, "counters");
        check_dtype(partials, DType::f32);
        check_dtype(counters, DType::i32);
        for (const TensorView* t : {&partials, &counters}) {
            check_shape(*t, {-1});
            check_packed(*t, 0);
            check_same_device(*t, k);
        }
        scratch = {partials.as<float>(), counters.as<int32_t>(), partials.shape[0], counters.shape[0]};
    }
    py::gil_scoped_release release;
    cuda::paged_attention(call, static_cast<int32_t>(table_columns * call.pages.page_size), scratch, k.device_index,
                          reinterpret_cast<void*>(stream));
#endif
}

void append_kv(py::handle qkv_, py::handle k_, py::handle v_, py::handle slots_, int threads, uintptr_t stream) {
    const TensorView qkv = tensor_view(qkv_, "qkv"), k = tensor_view(k_, "k_pages"), v = tensor_view(v_, "v_pages");
    const Append call = append_of(qkv, k, v, tensor_view(slots_, "slots"));
    py::gil_scoped_release release;
    if (k.cuda) {
        need_cuda(k);
#ifdef BARK_FAST_CUDA
        cuda::append_kv(call, k.device_index, reinterpret_cast<void*>(stream));
#endif
    } else {
        check_slots(call);
        cpu::append_kv(call, threads);
    }
    (void)stream;
}

void paged_attention(py::handle query_, py::handle k_, py::handle v_, py::handle table_, py::handle lengths_,
                     py::handle starts_, py::handle out_, float scale, py::handle partials, py::handle counters,
                     int threads, uintptr_t stream) {
    const TensorView query = tensor_view(query_, "query"), k = tensor_view(k_, "k_pages");
    const TensorView v = tensor_view(v_, "v_pages"), table = tensor_view(table_, "block_table");
    const PageShape pages = check_page_pair(k, v);
    check_dtype(query, k.dtype);
    check_same_device(query, k);
    check_shape(query, {-1, pages.n_head, pages.head_dim});
    check_packed(query, 1);
    check_aligned(query);
    check_fits(query, 0, INT32_MAX / 2);
    const Attention call = attention_of(query, k, v, pages, table, tensor_view(lengths_, "lengths"),
                                        tensor_view(starts_, "query_starts"), tensor_view(out_, "out"), scale);
    if (k.cuda) return attend_on_cuda(call, k, table.shape[1], partials, counters, stream);
    py::gil_scoped_release release;
    check_attention(call, table.shape[1]);
    cpu::paged_attention(call, threads);
}

void append_attention(py::handle qkv_, py::handle k_, py::handle v_, py::handle table_, py::handle lengths_,
                      py::handle starts_, py::handle slots_, py::handle out_, float scale, py::handle partials,
                      py::handle counters, int threads, uintptr_t stream) {
    const TensorView qkv = tensor_view(qkv_, "qkv"), k = tensor_view(k_, "k_pages");
    const TensorView v = tensor_view(v_, "v_pages"), table = tensor_view(table_, "block_table");
    const Append append = append_of(qkv, k, v, tensor_view(slots_, "slots"));
    Attention call = attention_of(qkv, k, v, append.pages, table, tensor_view(lengths_, "lengths"),
                                  tensor_view(starts_, "query_starts"), tensor_view(out_, "out"), scale);
    if (k.cuda) {
        call.slots = append.slots;
        return attend_on_cuda(call, k, table.shape[1], partials, counters, stream);
    }
    py::gil_scoped_release release;
    check_slots(append);
    check_attention(call, table.shape[1]);
    cpu::append_kv(append, threads);
    cpu::paged_attention(call, threads);
}

Copy copy_of(const TensorView& from, const TensorView& to, const TensorView& pairs) {
    check_dtype(pairs, DType::i32);
    check_shape(pairs, {-1, 2});
    check_packed(pairs, 0);
    check_fits(pairs, 0, INT32_MAX / 4);
    const int64_t bytes = page_elements(check_pages(from)) * size_of(from.dtype);
    return {from.data,   to.data, bytes, from.shape[0], to.shape[0], pairs.as<int32_t>(),
            static_cast<int32_t>(pairs.shape[0])};
}

void copy_pages(py::handle k_, py::handle v_, py::handle pairs_, int threads, uintptr_t stream) {
    const TensorView k = tensor_view(k_, "k_pages"), v = tensor_view(v_, "v_pages");
    const TensorView pairs = tensor_view(pairs_, "pairs");
    check_page_pair(k, v);
    check_same_device(pairs, k);
    const Copy copies[] = {copy_of(k, k, pairs), copy_of(v, v, pairs)};
    py::gil_scoped_release release;
    if (k.cuda) {
        need_cuda(k);
#ifdef BARK_FAST_CUDA
        cuda::copy_pages(copies, 2, k.device_index, reinterpret_cast<void*>(stream));
#endif
    } else {
        check_pairs(copies[0]);
        cpu::copy_pages(copies, 2, threads);
    }
    (void)stream;
}

void gather_kv(py::handle source_, py::handle table_, int64_t length, py::handle out_, int threads, uintptr_t stream) {
    const TensorView source = tensor_view(source_, "pages"), table = tensor_view(table_, "block_table");
    const TensorView out = tensor_view(out_, "out");
    const PageShape pages = check_pages(source);
    check_dtype(table, DType::i32);
    check_shape(table, {-1});
    check_packed(table, 0);
    check_fits(table, 0, INT32_MAX / pages.page_size);
    if (length < 0 || length > table.shape[0] * pages.page_size)
        reject("length is " + std::to_string(length) + "; expected a value in [0, " +
               std::to_string(table.shape[0] * pages.page_size) + "]");
    check_dtype(out, source.dtype);
    check_shape(out, {pages.n_head, length, pages.head_dim});
    check_packed(out, 0);
    check_aligned(out);
    for (const TensorView* t : {&table, &out}) check_same_device(*t, source);
    const Gather call{pages,      size_of(source.dtype), source.data, table.as<int32_t>(), static_cast<int32_t>(length),
                      out.data};
    py::gil_scoped_release release;
    if (source.cuda) {
        need_cuda(source);
#ifdef BARK_FAST_CUDA
        cuda::gather_kv(call, source.device_index, reinterpret_cast<void*>(stream));
#endif
    } else {
        check_table("block_table", call.table, 0, call.length, pages);
        cpu::gather_kv(call, threads);
    }
    (void)stream;
}

void swap_pages(py::handle from_, py::handle to_, py::handle pairs_, int threads, uintptr_t stream) {
    const TensorView from = tensor_view(from_, "source"), to = tensor_view(to_, "destination");
    const TensorView pairs = tensor_view(pairs_, "pairs");
    check_pages(from);
    check_pages(to);
    check_dtype(to, from.dtype);
    check_shape(to, {-1, from.shape[1], from.shape[2], from.shape[3]});
    if (pairs.cuda) reject("pairs is on cuda; expected cpu: the host enqueues one copy a pair");
    const Copy call = copy_of(from, to, pairs);
    py::gil_scoped_release release;
    check_pairs(call);
    if (!from.cuda && !to.cuda) return cpu::copy_pages(&call, 1, threads);
    need_cuda(from.cuda ? from : to);
#ifdef BARK_FAST_CUDA
    cuda::swap_pages(call, from.cuda ? from.device_index : to.device_index, reinterpret_cast<void*>(stream));
#endif
    (void)stream;
}

}  // namespace
}  // namespace bark_fast

void bind_paged_kv(py::module_& module) {
    using namespace bark_fast;
    module.def("append_kv", &append_kv, py::arg("qkv"), py::arg("k_pages"), py::arg("v_pages"), py::arg("slots"),
               py::arg("threads"), py::arg("stream"));
    module.def("paged_attention", &paged_attention, py::arg("query"), py::arg("k_pages"), py::arg("v_pages"),
               py::arg("block_table"), py::arg("lengths"), py::arg("query_starts"), py::arg("out"), py::arg("scale"),
               py::arg("partials"), py::arg("counters"), py::arg("threads"), py::arg("stream"));
    module.def("append_attention", &append_attention, py::arg("qkv"), py::arg("k_pages"), py::arg("v_pages"),
               py::arg("block_table"), py::arg("lengths"), py::arg("query_starts"), py::arg("slots"), py::arg("out"),
               py::arg("scale"), py::arg("partials"), py::arg("counters"), py::arg("threads"), py::arg("stream"));
    module.def("copy_pages", &copy_pages, py::arg("k_pages"), py::arg("v_pages"), py::arg("pairs"),
               py::arg("threads"), py::arg("stream"));
    module.def("gather_kv", &gather_kv, py::arg("pages"), py::arg("block_table"), py::arg("length"), py::arg("out"),
               py::arg("threads"), py::arg("stream"));
    module.def("swap_pages", &swap_pages, py::arg("source"), py::arg("destination"), py::arg("pairs"),
               py::arg("threads"), py::arg("stream"));
#ifdef BARK_FAST_CUDA
    module.def("cuda_fault", &cuda::fault, py::arg("device"));
#else
    module.def("cuda_fault", [](int) { return std::string("built without CUDA"); }, py::arg("device"));
#endif
}
