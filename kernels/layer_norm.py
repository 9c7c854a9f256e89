"""LayerNorm of whole rows, the epilogue a matrix product leaves to do, and the pieces other kernels share.

y = (x - mean) * rsqrt(var + eps) * weight + bias, eps 1e-5, var the mean squared distance from the mean.
Statistics and y are fp32; y is rounded once, to the dtype of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bark_fast.kernels.target import COMPILE, cdiv, power_of_2

EPS = tl.constexpr(1e-5)

MAX_WIDTH = 16_384
"""Widest row that is held in registers whole."""

EPILOGUE_BLOCK = 1024


@triton.jit
def gelu(x):
    """x * Phi(x) with the exact error function, fp32."""
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def row_moments(x, width, BLOCK: tl.constexpr):
    """Mean and 1 / sqrt(var + eps) of a contiguous row, in two passes over registers."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + columns, inside, 0.0).to(tl.float32)
    mean = tl.sum(values, 0) / width
    distance = tl.where(inside, values - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(distance * distance, 0) / width + EPS)


@triton.jit
def _layer_norm_kernel(
    x, norm_weight, norm_bias, out, width, x_stride, out_stride,
    HAS_NORM_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x += row * x_stride
    mean, rstd = row_moments(x, width, BLOCK)
    values = tl.load(x + columns, inside, 0.0).to(tl.float32)
    y = (values - mean) * rstd * tl.load(norm_weight + columns, inside, 0.0).to(tl.float32)
    if HAS_NORM_BIAS:
        y += tl.load(norm_bias + columns, inside, 0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, y.to(out.dtype.element_ty), inside)


@triton.jit
def _epilogue_kernel(
    y, bias, residual, width, y_stride, residual_stride,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    y += row * y_stride
    values = tl.load(y + columns, inside, 0.0).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + columns, inside, 0.0).to(tl.float32)
    if GELU:
        values = gelu(values)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * residual_stride + columns, inside, 0.0).to(tl.float32)
    tl.store(y + columns, values.to(y.dtype.element_ty), inside)


def layer_norm(x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None) -> Tensor:
    """LayerNorm of each row of x (rows, width), rows any stride apart, in x's dtype."""
    rows, width = x.shape
    assert x.stride(1) == 1 and 0 < width <= MAX_WIDTH and norm_weight.shape == (width,)
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        block = power_of_2(width)
        warps = min(max(1, block // 256), 16)
        _layer_norm_kernel[(rows,)](
            x, norm_weight, norm_weight if norm_bias is None else norm_bias, out,
            width, x.stride(0), out.stride(0),
            HAS_NORM_BIAS=norm_bias is not None, BLOCK=block, num_warps=warps, **COMPILE,
        )  # fmt: skip
    return out


def epilogue_(y: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: bool) -> Tensor:
    """act(y + bias) + residual, in place, for y (rows, width): what F.linear leaves undone. One rounding."""
    rows, width = y.shape
    assert y.stride(1) == 1
    assert residual is None or (residual.shape == y.shape and residual.stride(1) == 1)
    if y.numel() and (bias is not None or residual is not None or gelu):
        _epilogue_kernel[(rows, cdiv(width, EPILOGUE_BLOCK))](
            y, y if bias is None else bias, y if residual is None else residual,
            width, y.stride(0), 0 if residual is None else residual.stride(0),
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, GELU=gelu,
            BLOCK=EPILOGUE_BLOCK, num_warps=4, **COMPILE,
        )  # fmt: skip
    return y
