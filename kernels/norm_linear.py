"""act(LN(x) @ weight.T + bias) + residual by the kernel that fits the number of rows.

A few rows: kernels.gemv, one launch. Up to 64 in 16 bits: kernels.matmul, one launch, or two where more than 16
rows are normalised first. More: the table decides between kernels.matmul and cuBLAS, with LayerNorm before and
one fused epilogue after, where a residual is not all there is to add. What each rounds: kernels.gemv nothing
before the result; the others round the normalised row to the weight's dtype, and cuBLAS its product too, before
bias, GELU and residual, which are fp32, but for a residual that it adds itself.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bark_fast.kernels import gemv, matmul
from bark_fast.kernels.layer_norm import epilogue_, layer_norm
from bark_fast.kernels.target import Target, cdiv, on_its_device, power_of_2, target_of

Plan: TypeAlias = gemv.Tile | matmul.Tile | None
"""The kernel that multiplies and its tile; None is cuBLAS."""

Key: TypeAlias = tuple[int, torch.dtype, int, int, int]
"""Architecture, dtype, bucket of rows, n, k."""

TUNED: dict[Key, Plan] = {}
"""Winners as `benchmarks/bench_norm_linear.py --tune` prints them. None was measured yet."""

GEMV_ROWS = {torch.float32: 8, torch.float16: 4, torch.bfloat16: 4}
"""Rows up to which multiply-adds in registers keep up with memory (unmeasured: from instruction counts)."""

MATMUL_ROWS = {torch.float32: 0, torch.float16: 64, torch.bfloat16: 64}
"""Rows up to which kernels.matmul is taken instead of cuBLAS (unmeasured)."""


def bucket(rows: int) -> int:
    """Rows rounded up to a power of two: tables have one entry for all of them."""
    return power_of_2(rows)


def plan(target: Target, dtype: torch.dtype, rows: int, n: int, k: int) -> Plan:
    """What the table says; otherwise gemv, then matmul, then cuBLAS as rows grow, which is unmeasured.

    Without tensor cores that Triton uses, cuBLAS, which may have others, multiplies in matmul's place.
    """
    key = (target.arch, dtype, bucket(rows), n, k)
    if key in TUNED:
        return TUNED[key]
    if rows <= GEMV_ROWS[dtype]:
        tile = gemv.tile(target, dtype, rows, n, k)
        if gemv.fits(rows, k, tile):
            return tile
    if not target.tensor_cores:
        return None
    return matmul.tile(target, dtype, rows, n, k) if rows <= MATMUL_ROWS[dtype] else None


@on_its_device
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor | None] | None = None,
    residual: Tensor | None = None,
    gelu: bool = False,
    scratch: tuple[Tensor, Tensor] | None = None,
    pdl: bool = False,
) -> Tensor:
    """act(LN(x) @ weight.T + bias) + residual: (rows, n) in x's dtype, by the plan for this GPU and shape.

    x: (rows, k). weight: (n, k). norm: LayerNorm's weight and bias, None for no norm. residual: (rows, n). Rows
    of all three may be any stride apart. scratch: from `make_scratch`, shared by launches of one stream; None
    allocates where k is split. pdl: see kernels.gemv and kernels.matmul.
    """
    chosen = plan(target_of(x.device), x.dtype, len(x), *weight.shape)
    return planned(chosen, x, norm, weight, bias, residual, gelu, scratch, pdl)


def planned(
    chosen: Plan, x: Tensor, norm: tuple[Tensor, Tensor | None] | None, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, gelu: bool, scratch: tuple[Tensor, Tensor] | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """`linear` by a plan of the caller's choice."""
    if isinstance(chosen, gemv.Tile):
        return gemv.gemv(x, norm, weight, bias, residual, gelu, chosen, pdl)
    if norm is not None and (chosen is None or not matmul.normalises(x, chosen)):
        x, norm = layer_norm(x, *norm), None
    if chosen is not None:
        return matmul.matmul(x, norm, weight, bias, residual, gelu, chosen, scratch, pdl)
    if not gelu and residual is None:
        return F.linear(x, weight, bias)
    if not gelu and bias is None and residual is not None:
        return torch.addmm(residual, x, weight.t())  # a launch of Triton's less for the host, which is behind
    return epilogue_(F.linear(x, weight), bias, residual, gelu)


def make_scratch(rows: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums and zeroed counters for `linear` of up to so many rows and outputs, in blocks up to 128 x 128."""
    padded = bucket(max(rows, 16)) if rows <= 64 else cdiv(rows, 128) * 128
    sums = matmul.MAX_SPLITS * padded * cdiv(n, 128) * 128
    counters = cdiv(rows, 16) * cdiv(n, 16)
    return (
        torch.empty(sums, dtype=torch.float32, device=device),
        torch.zeros(counters, dtype=torch.int32, device=device),
    )
