"""Triton's interpreter, mended for bfloat16, Bark's dtype on most GPUs.

As of triton 3.9 it keeps bfloat16 as its bits in uint16, multiplies matrices of those integers, and cuts
float32 to bfloat16 where hardware rounds; before 3.9 its fma rounds twice. All are put right here, for tests.
Reductions and arithmetic over bfloat16 remain wrong: kernels widen to float32 before them.
"""

from __future__ import annotations

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
    """Replace the interpreter's matrix product, its cast to bfloat16 and its fma of float32."""
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

    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
