"""Triton's interpreter, mended for bfloat16, Bark's dtype on most GPUs, and made faster.

As of triton 3.9 it keeps bfloat16 as its bits in uint16, multiplies matrices of those integers, and cuts
float32 to bfloat16 where hardware rounds; before 3.9 its fma rounds twice. All are put right here, for tests.
Reductions and arithmetic over bfloat16 remain wrong: kernels widen to float32 before them.

Half of a launch's time goes into putting the interpreted operations into `triton.language` again for every call
of a device function, a quarter of the rest into a check for overflow that is not looked at without `debug`:
`hasten` spares both.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np

Bits = np.ndarray


def widen(bits: Bits) -> Bits:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Bits) -> Bits:
    """The bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def mend() -> None:
    """Replace the interpreter's matrix product, its cast to bfloat16 and its fma of float32; give it TF32."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast, convert = (
        InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp,
    )  # fmt: skip

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(widen(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *options)

    def rounds(source: Any, target: Any) -> bool:
        return bool(source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if rounds(source, target):
            return TensorHandle(narrow(source.data), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if rounds(source, target):
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    fma = InterpreterBuilder.create_fma

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar != tl.float32:
            return fma(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), tl.float32)

    def create_inline_asm(self: Any, asm: str, constraints: str, values: Any, types: Any, *rest: Any) -> Any:
        if not asm.startswith("cvt.rna.tf32.f32 "):
            return inline_asm(self, asm, constraints, values, types, *rest)
        (source,) = values
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = ((bits + 0x1000) & 0xFFFFE000).view(np.float32)
        result = TensorHandle(np.where(np.isnan(source.data), source.data, rounded), tl.float32)
        return SimpleNamespace(get_result=lambda index: result)

    inline_asm = InterpreterBuilder.create_inline_asm
    InterpreterBuilder.create_inline_asm = create_inline_asm
    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def hasten() -> None:
    """Put the operations in where they are missing, look a dtype up once, leave out what nobody looks at."""
    import triton.language as tl
    from triton.runtime import interpreter

    put_in, any_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    scalar_dtype = cache(any_dtype)

    @cache
    def languages(fn: FunctionType) -> list[Any]:
        return [value for value in fn.__globals__.values() if value is tl or value is tl.core]

    def put_in_once(fn: FunctionType) -> Any:
        # what is put in has lost the mark of a builtin
        if any(tl.core.is_builtin(language.load) for language in languages(fn)):
            return put_in(fn)
        return interpreter._LangPatchScope()  # nothing to take out again

    def numpy_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        return any_dtype(scalar) if scalar.is_ptr() else scalar_dtype(scalar)  # pointers cannot be looked up

    interpreter._patch_lang = put_in_once
    interpreter._get_np_dtype = numpy_dtype
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
