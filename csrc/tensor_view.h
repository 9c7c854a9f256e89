// Typed, checked views of Python tensors, without libtorch.
//
// A tensor crosses through DLPack. torch >= 2.10 offers DLPack's C exchange table on its tensor type, which costs some
// 10 ns a tensor; anything else goes through a `__dlpack__()` capsule. The structs below are DLPack 1.x's binary
// interface (https://dmlc.github.io/dlpack/latest/c_api.html), declared here so that no header is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace bark_fast {

namespace dlpack {
struct Device {
    int32_t type;
    int32_t index;
};
struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};
struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};
struct ManagedTensor {  // what an unversioned "dltensor" capsule holds
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};
struct ExchangeTable {
    struct {
        uint32_t major, minor;
    } version;
    ExchangeTable* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*tensor_from_object)(void* object, Tensor* out);
    int (*current_stream)(int32_t device_type, int32_t device_index, void** out);
};
enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };
}  // namespace dlpack

struct TensorView {
    static constexpr int kMaxDims = 4;
    const char* name;
    void* data;
    DType dtype;
    bool cuda;
    int device_index;
    int ndim;
    int64_t shape[kMaxDims];
    int64_t strides[kMaxDims];  // in elements

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

namespace detail {

inline DType dtype_of(dlpack::DataType type, const char* name) {
    if (type.lanes == 1) {
        if (type.code == dlpack::kFloat && type.bits == 32) return DType::f32;
        if (type.code == dlpack::kFloat && type.bits == 16) return DType::f16;
        if (type.code == dlpack::kBfloat && type.bits == 16) return DType::bf16;
        if (type.code == dlpack::kInt && type.bits == 8) return DType::i8;
        if (type.code == dlpack::kInt && type.bits == 32) return DType::i32;
        if (type.code == dlpack::kInt && type.bits == 64) return DType::i64;
    }
    throw std::invalid_argument(std::string(name) +
                                " has an unsupported dtype; expected float32, float16, bfloat16, int8, int32 or int64");
}

inline TensorView view_of(const dlpack::Tensor& source, const char* name) {
    TensorView view{};
    view.name = name;
    view.dtype = dtype_of(source.dtype, name);
    view.cuda = source.device.type == dlpack::kCuda;
    if (!view.cuda && source.device.type != dlpack::kCpu && source.device.type != dlpack::kCudaHost)
        throw std::invalid_argument(std::string(name) + " is on a device that is neither CPU nor CUDA");
    view.device_index = view.cuda ? source.device.index : 0;
    view.ndim = source.ndim;
    if (view.ndim > TensorView::kMaxDims)
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(view.ndim) +
                                    " dimensions; at most 4 are used");
    view.data = static_cast<char*>(source.data) + source.byte_offset;
    int64_t packed = 1;
    for (int i = view.ndim - 1; i >= 0; --i) {
        view.shape[i] = source.shape[i];
        view.strides[i] = source.strides ? source.strides[i] : packed;
        packed *= source.shape[i];
    }
    int64_t elements = 1;
    for (int i = 0; i < view.ndim; ++i) elements *= view.shape[i];
    if (!source.data && elements)  // a subclass that keeps its numbers elsewhere, or a fake
        throw std::invalid_argument(std::string(name) + " has no memory of its own; expected a plain tensor");
    return view;
}

// The exchange table of a type, or null. Two types are remembered: in practice every argument is a torch.Tensor or a
// torch.nn.Parameter. Callers hold the GIL. Remembered types are kept alive so that their addresses cannot be reused.
inline const dlpack::ExchangeTable* exchange_table(PyTypeObject* type) {
    struct Known {
        PyTypeObject* type;
        const dlpack::ExchangeTable* table;
    };
    static Known known[2] = {};
    static int oldest = 0;
    for (const Known& one : known)
        if (type == one.type) return one.table;
    const dlpack::ExchangeTable* found = nullptr;
    if (PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__")) {
        if (PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
            found = static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        Py_DECREF(capsule);
    }
    PyErr_Clear();
    while (found && found->version.major != 1) found = found->previous;
    if (found && !found->tensor_from_object) found = nullptr;
    Py_INCREF(type);
    Py_XDECREF(known[oldest].type);
    known[oldest] = {type, found};
    oldest ^= 1;
    return found;
}

inline TensorView view_through_capsule(pybind11::handle object, const char* name) {
    if (!pybind11::hasattr(object, "__dlpack__"))
        throw std::invalid_argument(std::string(name) + " is not a tensor");
    // the capsule owns the exported tensor and frees it, unconsumed, when it goes out of scope here; the caller's
    // reference keeps the memory itself alive
    pybind11::object capsule = object.attr("__dlpack__")();
    auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (!managed) throw pybind11::error_already_set();
    return view_of(managed->tensor, name);
}

}  // namespace detail

// A view of `object` that lives as long as the caller keeps `object` alive and unresized. Needs the GIL.
inline TensorView tensor_view(pybind11::handle object, const char* name) {
    if (const auto* table = detail::exchange_table(Py_TYPE(object.ptr()))) {
        dlpack::Tensor tensor{};
        if (table->tensor_from_object(object.ptr(), &tensor) != 0) throw pybind11::error_already_set();
        return detail::view_of(tensor, name);
    }
    return detail::view_through_capsule(object, name);
}

}  // namespace bark_fast
