"""Linear layers of one to eight rows: act(LN(x) @ weight.T + bias) + residual, limited by the bytes of weights.

x (rows, k), weight (n, k) as torch.nn.Linear keeps it, out (rows, n). A program takes BLOCK_N rows of the
weight whole and issues all their loads, 16 bytes each, before it looks at x: an SM then has its share of a
layer in flight at once (Little's law wants about 26 KB an SM on an H200), and the LayerNorm, which every
program repeats on its few KB of x from the L2, hides behind them. Long rows are shared by the warps of a
program, so narrow layers fill the chip without partial sums in memory. Multiply-adds and LayerNorm are fp32
throughout: the normalised row is not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bark_fast.kernels.layer_norm import EPS, gelu
from bark_fast.kernels.target import COMPILE, Target, cdiv, registers

MAX_ROWS = 8
MAX_CHUNKS = 16
WEIGHT_BYTES = 256
"""Of weights in a thread's registers: with LayerNorm's bias and three rows, more spill (SASS of triton 3.9)."""


@triton.jit
def _chunks(row, k, columns, CHUNKS: tl.constexpr, EVEN: tl.constexpr):
    """Loads of a row of x, or of LayerNorm's weights, in the pieces in which it is used."""
    pieces = ()
    for chunk in tl.static_range(CHUNKS):
        here = chunk * columns.shape[0] + columns
        pieces += (tl.load(row + here, EVEN | (here < k), 0.0),)
    return pieces


@triton.jit
def _gemv_kernel(
    x, norm_weight, norm_bias, weight, bias, residual, out,
    n, k, x_stride, weight_stride, residual_stride, out_stride,
    HAS_NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    line = tl.arange(0, BLOCK_N)
    present = first + line < n
    columns = tl.arange(0, BLOCK_K)
    tile = weight + first * weight_stride + line[:, None] * weight_stride + columns[None, :]
    weights = ()
    for chunk in tl.static_range(CHUNKS):
        here = chunk * BLOCK_K + columns
        inside = present[:, None] & (EVEN | (here < k))[None, :]
        weights += (tl.load(tile + chunk * BLOCK_K, inside, 0.0, eviction_policy="evict_first"),)
    if HAS_NORM:
        gains = _chunks(norm_weight, k, columns, CHUNKS, EVEN)
    if HAS_NORM_BIAS:
        shifts = _chunks(norm_bias, k, columns, CHUNKS, EVEN)
    if HAS_BIAS:
        offset = tl.load(bias + first + line, present, 0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    else:
        tl.debug_barrier()  # keeps the compiler from issuing the loads above after it has waited for x
    ahead = _chunks(x, k, columns, CHUNKS, EVEN)
    for row in tl.static_range(ROWS):
        values = ahead
        if row + 1 < ROWS:
            ahead = _chunks(x + (row + 1) * x_stride, k, columns, CHUNKS, EVEN)
        if HAS_RESIDUAL:
            added = tl.load(residual + row * residual_stride + first + line, present, 0.0).to(tl.float32)
        if HAS_NORM:
            total = tl.zeros([BLOCK_K], tl.float32)
            for chunk in tl.static_range(CHUNKS):
                total += values[chunk].to(tl.float32)
            mean = tl.sum(total, 0) / k
            total = tl.zeros([BLOCK_K], tl.float32)
            for chunk in tl.static_range(CHUNKS):
                distance = tl.where(
                    EVEN | (chunk * BLOCK_K + columns < k), values[chunk].to(tl.float32) - mean, 0.0
                )
                total += distance * distance
            rstd = tl.rsqrt(tl.sum(total, 0) / k + EPS)
        sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            y = values[chunk].to(tl.float32)
            if HAS_NORM:
                y = (y - mean) * rstd * gains[chunk].to(tl.float32)
            if HAS_NORM_BIAS:
                y += shifts[chunk].to(tl.float32)
            sums += weights[chunk].to(tl.float32) * y[None, :]
        z = tl.sum(sums, 1)
        if HAS_BIAS:
            z += offset
        if GELU:
            z = gelu(z)
        if HAS_RESIDUAL:
            z += added
        tl.store(out + row * out_stride + first + line, z.to(out.dtype.element_ty), present)


@dataclass(frozen=True)
class Tile:
    """block_n rows of the weight a program, read block_k columns at a time by `warps` side by side."""

    block_n: int
    block_k: int
    warps: int


@cache
def tile(target: Target, dtype: torch.dtype, rows: int, n: int, k: int) -> Tile:
    """One warp a program where it spans a row in eight loads: no barrier then, and x needs no exchange.

    More rows of the weight a program where that leaves enough programs: the LayerNorm is repeated less often.
    Reasoned from bytes in flight and instructions, unmeasured: `bench_norm_linear.py --tune` tries others.
    """
    span = 32 * (16 // dtype.itemsize)  # columns one warp reads in one 16-byte load a thread
    warps = 1
    while warps < 8 and k > 8 * span * warps:
        warps *= 2
    kept = dtype.itemsize if rows == 1 else 4  # bytes of a weight: for several rows it is converted once
    block_n = 1
    for wider in (2, 4):
        programs = cdiv(n, wider)
        if (
            programs >= (4 if rows == 1 else 2) * target.processors
            and wider * k * kept <= WEIGHT_BYTES * 32 * warps
        ):
            block_n = wider
    return Tile(block_n, warps * span, warps)


def fits(rows: int, k: int, chosen: Tile) -> bool:
    """Whether the kernel takes so many rows of x, and holds rows of the weight of that length."""
    return rows <= MAX_ROWS and cdiv(k, chosen.block_k) <= MAX_CHUNKS


def gemv(
    x: Tensor, norm: tuple[Tensor, Tensor | None] | None, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, gelu: bool, chosen: Tile, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """act(LN(x) @ weight.T + bias) + residual: (rows, n) in x's dtype.

    norm: LayerNorm's weight and bias, None for no norm. pdl: programmatic dependent launch (compute capability
    9 and later): weights are read before the kernel ahead in the stream has finished, everything else after.
    """
    (rows, k), n = x.shape, len(weight)
    assert weight.shape == (n, k) and x.dtype == weight.dtype and fits(rows, k, chosen)
    assert x.stride(1) == weight.stride(1) == 1
    assert residual is None or (residual.shape == (rows, n) and residual.stride(1) == 1)
    norm_weight, norm_bias = norm or (None, None)
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if out.numel():
        _gemv_kernel[(cdiv(n, chosen.block_n),)](
            x, x if norm_weight is None else norm_weight, x if norm_bias is None else norm_bias,
            weight, x if bias is None else bias, x if residual is None else residual, out,
            n, k, x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
            HAS_NORM=norm is not None, HAS_NORM_BIAS=norm_bias is not None, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, GELU=gelu, ROWS=rows,
            BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k, CHUNKS=cdiv(k, chosen.block_k),
            EVEN=k % chosen.block_k == 0, PDL=pdl, num_warps=chosen.warps,
            # not told so, ptxas spills to fit one program more onto a processor (SASS of triton 3.9)
            **(registers(255) if rows > 1 else {}),
            **({"launch_pdl": True} if pdl else {}), **COMPILE,
        )  # fmt: skip
    return out
