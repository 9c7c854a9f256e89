// Element types that cross from Python.
#pragma once

namespace bark_fast {

enum class DType { f32 = 0, f16 = 1, bf16 = 2, i32 = 3, i64 = 4, i8 = 5 };

inline int size_of(DType dtype) {
    switch (dtype) {
        case DType::i64: return 8;
        case DType::f16:
        case DType::bf16: return 2;
        case DType::i8: return 1;
        default: return 4;
    }
}

inline const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::f32: return "float32";
        case DType::f16: return "float16";
        case DType::bf16: return "bfloat16";
        case DType::i32: return "int32";
        case DType::i8: return "int8";
        default: return "int64";
    }
}

}  // namespace bark_fast
