"""What tensor cores multiply as TF32, rounded to it: of fp32 they cut off the last 13 bits themselves."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def for_product(x, PRECISION: tl.constexpr):
    """An operand of `tl.dot` with this input precision: fp32 rounded to the nearest TF32, where it is that.

    Cut off, operands are on average half a unit too small, which adds up: errors of attention are four times,
    of plain products twice as large.
    """
    if PRECISION == "tf32":
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    return x
