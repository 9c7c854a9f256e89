// Python face of whole decode steps. bark_fast/ops/decode_layers.py documents it; this checks and calls.
#include "decode_bindings.h"

#include <vector>

#include "decode.h"
#include "linear_checks.h"
#include "paged_kv_checks.h"
#include "paged_kv_kernels.h"

namespace py = pybind11;

namespace bark_fast {
namespace {

constexpr size_t kWeights = 12;  // of a layer: weight and bias of ln_1, qkv, out, ln_2, fc and proj
constexpr size_t kScales = 4;    // of a layer whose qkv, out, fc and proj are int8

// A row's key and value must go where its sequence looks for them: others may not write what it reads meanwhile.
void check_new_keys(const Attention& call, const int64_t* slots) {
    const int32_t page = call.pages.page_size;
    for (int32_t seq = 0; seq < call.seqs; ++seq) {
        const int32_t start = call.query_starts[seq], rows = call.query_starts[seq + 1] - start;
        check_value("rows of sequence", seq, rows, 0, kQueryTile + 1);
        check_value("lengths", seq, call.lengths[seq], rows, INT32_MAX);
        for (int32_t row = start; row < start + rows; ++row) {
            if (slots[row] < 0) continue;
            const int32_t key = call.lengths[seq] - rows + row - start;
            const int64_t place = call.block_table[seq * call.table_stride + key / page] * int64_t{page} + key % page;
            if (slots[row] != place)
                reject("slots[" + std::to_string(row) + "] is " + std::to_string(slots[row]) + "; expected " +
                       std::to_string(place) + ", the slot of its key, or -1");
        }
    }
}

void check_same_pages(const PageShape& pages, const PageShape& first, size_t layer) {
    if (pages.num_pages != first.num_pages || pages.n_head != first.n_head || pages.page_size != first.page_size ||
        pages.head_dim != first.head_dim)
        reject("keys of layer " + std::to_string(layer) + " have another shape than those of layer 0");
}

// Everything between the layers, kept between calls.
struct Room {
    std::vector<char> bytes;
    int64_t used = 0;

    TensorView rows(DType dtype, int64_t rows, int64_t columns) {
        const TensorView t = room_of(bytes.data() + used, dtype, rows, columns);
        used += (rows * columns * size_of(dtype) + 63) / 64 * 64;
        return t;
    }
};

void decode_layers(py::handle x_, const py::list& weights, const py::list& keys, const py::list& values,
                   py::handle table_, py::handle lengths_, py::handle starts_, py::handle slots_, py::handle out_,
                   float scale, int threads, const py::list& scales) {
    const TensorView x = few_rows(x_);
    const DType dtype = x.dtype;
    const int64_t rows = x.shape[0], width = x.shape[1];
    const TensorView out = out_rows(out_, dtype, rows, width);
    const TensorView table = tensor_view(table_, "block_table"), lengths = tensor_view(lengths_, "lengths");
    const TensorView starts = tensor_view(starts_, "query_starts"), slots = tensor_view(slots_, "slots");
    check_dtype(table, DType::i32);
    check_shape(table, {-1, -1});
    const int64_t seqs = table.shape[0];
    check_packed(table, 1);
    check_dtype(lengths, DType::i32);
    check_shape(lengths, {seqs});
    check_packed(lengths, 0);
    check_dtype(starts, DType::i32);
    check_shape(starts, {seqs + 1});
    check_packed(starts, 0);
    check_dtype(slots, DType::i64);
    check_shape(slots, {rows});
    check_packed(slots, 0);
    const size_t count = keys.size();
    if (values.size() != count || weights.size() != kWeights * count || count == 0)
        reject("there are " + std::to_string(weights.size()) + " weights, " + std::to_string(count) + " keys and " +
               std::to_string(values.size()) + " values; expected " + std::to_string(kWeights) +
               ", one and one of each layer");
    if (!scales.empty() && scales.size() != kScales * count)
        reject("there are " + std::to_string(scales.size()) + " scales; expected none, or " + std::to_string(kScales) +
               " of each layer");
    thread_local Room room;
    thread_local std::vector<DecodeLayer> calls;
    room.used = 0;
    calls.clear();
    TensorView before = x;
    TensorView qkv, attended, middle, hidden;
    for (size_t i = 0; i < count; ++i) {
        const auto weight = [&](size_t at) { return py::handle(PyList_GET_ITEM(weights.ptr(), kWeights * i + at)); };
        const auto scales_of = [&](size_t at) {
            return scales.empty() ? py::handle(Py_None) : py::handle(PyList_GET_ITEM(scales.ptr(), kScales * i + at));
        };
        const TensorView k = tensor_view(PyList_GET_ITEM(keys.ptr(), i), "keys");
        const TensorView v = tensor_view(PyList_GET_ITEM(values.ptr(), i), "values");
        const PageShape pages = check_page_pair(k, v);
        check_dtype(k, dtype);
        check_fits(table, 1, INT32_MAX / pages.page_size);
        for (const TensorView* t : {&table, &lengths, &starts, &slots, &k}) check_same_device(*t, x);
        DecodeLayer call{};
        call.qkv = call_of(before, weight(0), weight(1), weight(2), "qkv", weight(3), scales_of(0));
        if (int64_t{pages.n_head} * pages.head_dim != width || call.qkv.n != 3 * width)
            reject("x has " + std::to_string(width) + " columns, qkv " + std::to_string(call.qkv.n) + " rows and keys " +
                   std::to_string(pages.n_head) + " heads of " + std::to_string(pages.head_dim) +
                   "; expected x's columns in heads, three times");
        if (i == 0) {
            const int64_t inner = tensor_view(weight(8), "fc").shape[0];
            const size_t bytes = static_cast<size_t>(rows * (5 * width + inner) * size_of(dtype) + 4 * 64);
            if (room.bytes.size() < bytes) room.bytes.resize(bytes);
            qkv = room.rows(dtype, rows, 3 * width);
            attended = room.rows(dtype, rows, width);
            middle = room.rows(dtype, rows, width);
            hidden = room.rows(dtype, rows, inner);
        }
        write_to(call.qkv, qkv);
        call.append = {pages, dtype, qkv.data, qkv.strides[0], k.data, v.data, slots.as<int64_t>(),
                       static_cast<int32_t>(rows)};
        call.attention = {pages, dtype, qkv.data, qkv.strides[0], k.data, v.data, table.as<int32_t>(),
                          table.strides[0], lengths.as<int32_t>(), starts.as<int32_t>(), attended.data,
                          attended.strides[0], static_cast<int32_t>(seqs), static_cast<int32_t>(rows), scale,
                          nullptr};
        call.out = call_of(attended, py::none(), py::none(), weight(4), "out", weight(5), scales_of(1));
        add(call.out, before);
        write_to(call.out, middle);
        call.fc = call_of(middle, weight(6), weight(7), weight(8), "fc", weight(9), scales_of(2));
        call.fc.gelu = true;
        write_to(call.fc, hidden);
        call.proj = call_of(hidden, py::none(), py::none(), weight(10), "proj", weight(11), scales_of(3));
        add(call.proj, middle);
        write_to(call.proj, out);
        if (call.out.n != width || call.fc.n != hidden.shape[1] || call.proj.n != width)
            reject("layer " + std::to_string(i) + " has out, fc and proj of " + std::to_string(call.out.n) + ", " +
                   std::to_string(call.fc.n) + " and " + std::to_string(call.proj.n) + " rows; expected " +
                   std::to_string(width) + ", " + std::to_string(hidden.shape[1]) + " and " + std::to_string(width));
        check_same_pages(pages, i == 0 ? pages : calls[0].append.pages, i);
        if (i == 0) {
            check_slots(call.append);
            check_attention(call.attention, table.shape[1]);
            check_new_keys(call.attention, call.append.slots);
        }
        calls.push_back(call);
        before = out;
    }
    py::gil_scoped_release release;
    cpu::decode_layers(calls.data(), static_cast<int>(calls.size()), threads);
}

}  // namespace
}  // namespace bark_fast

void bind_decode(py::module_& module) {
    using namespace bark_fast;
    module.def("decode_layers", &decode_layers, py::arg("x"), py::arg("weights"), py::arg("keys"), py::arg("values"),
               py::arg("block_table"), py::arg("lengths"), py::arg("query_starts"), py::arg("slots"), py::arg("out"),
               py::arg("scale"), py::arg("threads"), py::arg("scales") = py::list());
}
