"""Linear layers as the models ask for them: QKV and heads behind a LayerNorm, the output projection.

At decode, 1 to 64 rows; the kernels that prefill and the fine model have beside cuBLAS; and the tiles that the
table leaves to cuBLAS until a GPU has measured them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bark_fast.kernels import matmul
from bark_fast.kernels import norm_linear as kernels
from bark_fast.kernels.target import target_of
from production import BIAS_ROWS, DTYPES, ROWS, WIDTHS, Launch, tf32

SEMANTIC_OUTPUTS, CODES = 10_001, 1_024


def launches(device: torch.device) -> Iterator[Launch]:
    """Both sizes of Bark in three dtypes, all rows of decode, without biases, and in 16 bits with them."""
    for size, (width, _) in WIDTHS.items():
        layers = {
            "qkv": (3 * width, True, False),
            "out": (width, False, True),
            "semantic head": (SEMANTIC_OUTPUTS, True, False),
            "coarse head": (2 * CODES, True, False),
            "code head": (CODES, True, False),
        }
        for dtype in DTYPES:
            for layer, (n, normed, added) in layers.items():
                for rows in ROWS:
                    x, weight, norm, residual = operands(rows, n, width, dtype, device)
                    if added and kernels.plan(target_of(device), dtype, rows, n, width) is None:
                        continue  # cuBLAS adds the residual itself
                    yield _launch(
                        f"{size} {layer} {str(dtype).removeprefix('torch.')}",
                        x, weight, norm if normed else None, residual=residual if added else None,
                    )  # fmt: skip
            # checkpoints with biases are somebody else's, and run in 16 bits
            for rows in BIAS_ROWS if dtype != torch.float32 else ():
                x, weight, (gain, _), _ = operands(rows, 3 * width, width, dtype, device)
                shift, bias = torch.empty_like(gain), torch.empty_like(weight[:, 0])
                name = f"{size} qkv {str(dtype).removeprefix('torch.')} norm bias"
                yield _launch(name, x, weight, (gain, shift), bias=bias)
        for rows in (1, 4, 16) if target_of(device).arch >= 90 else ():  # what the benchmarks compare
            x, weight, norm, _ = operands(rows, 3 * width, width, torch.float16, device)
            yield _launch(f"{size} qkv float16 pdl", x, weight, norm, pdl=True)
    x, weight, norm, residual = operands(1024, 1024, 1024, torch.bfloat16, device)
    call = partial(kernels.linear, x, weight, torch.empty_like(weight[:, 0]), residual=residual)
    yield Launch("cublas out bfloat16 bias", call)
    for dtype in (torch.float16, torch.bfloat16):
        x, weight, norm, residual = operands(1024, 1024, 1024, dtype, device)
        tile = matmul.tile(target_of(device), dtype, 1024, 1024, 1024)
        call = partial(kernels.planned, tile, x, None, weight, None, residual, False)
        yield Launch(f"triton out {dtype} rows 1024", call)
    for rows in (16, 64):  # the table leaves fp32 to cuBLAS, too
        x, weight, norm, _ = operands(rows, 3 * 768, 768, torch.float32, device)
        tile = matmul.tile(target_of(device), torch.float32, rows, 3 * 768, 768)
        call = partial(kernels.planned, tile, x, norm if rows == 16 else None, weight, None, None, False)
        yield Launch(f"triton small qkv float32 rows {rows}", call)
        yield Launch(f"triton small qkv tf32 rows {rows}", partial(tf32, call))


def _launch(
    name: str, x: torch.Tensor, weight: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor | None] | None,
    **options: object,
) -> Launch:  # fmt: skip
    """`linear` of these, and how many loads must be on their way at once."""
    rows = len(x)
    chosen = kernels.plan(target_of(x.device), x.dtype, rows, *weight.shape)
    # a LayerNorm within the product reads 12 to 32 times 16 bytes a thread
    fused = norm is not None and isinstance(chosen, matmul.Tile) and matmul.normalises(x, chosen)
    # of 16 in bf16 without the norm's bias ptxas issues 10 or 11 (sm_80 and sm_90, triton 3.9)
    at_once = 10 if x.dtype == torch.bfloat16 and norm is not None and norm[1] is None else 12
    call = partial(kernels.linear, x, weight, norm=norm, **options)
    return Launch(f"{name} rows {rows}", call, at_once if fused else 0)


def operands(
    rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, None], torch.Tensor]:
    """x, weight, LayerNorm's weight (Bark has no biases) and residual."""
    empty = partial(torch.empty, dtype=dtype, device=device)
    return empty(rows, k), empty(n, k), (empty(k), None), empty(rows, n)
