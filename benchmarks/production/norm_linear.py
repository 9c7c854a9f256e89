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
from production import DTYPES, WIDTHS, Launch

SEMANTIC_OUTPUTS, CODES = 10_001, 1_024
HALF_ROWS = (4, 16, 64)


def launches(device: torch.device) -> Iterator[Launch]:
    """Both sizes of Bark; one row in three dtypes, more rows in one dtype each."""
    depends = target_of(device).arch >= 90
    for size, (width, _) in WIDTHS.items():
        layers = {
            "qkv": (3 * width, True, False),
            "out": (width, False, True),
            "semantic head": (SEMANTIC_OUTPUTS, True, False),
            "code head": (CODES, True, False),
        }
        for dtype in DTYPES:
            for layer, (n, normed, added) in layers.items():
                for rows in (1, *(HALF_ROWS if dtype == torch.float16 and layer in ("qkv", "out") else ())):
                    if size == "large" and rows == 64:
                        continue  # the very kernels of the small size
                    x, weight, norm, residual = operands(rows, n, width, dtype, device)
                    call = partial(
                        kernels.linear, x, weight, norm=norm if normed else None,
                        residual=residual if added else None, pdl=depends,
                    )  # fmt: skip
                    name = f"{size} {layer} {str(dtype).removeprefix('torch.')} rows {rows}"
                    alone = rows <= matmul.MAX_NORM_ROWS or not normed  # the LayerNorm is no launch of its own
                    yield Launch(name, call, tensor_cores=rows > 4 and alone, streaming=True)
    x, weight, norm, residual = operands(1024, 1024, 1024, torch.bfloat16, device)
    yield Launch("cublas out bfloat16", partial(kernels.linear, x, weight, residual=residual), streaming=True)
    for dtype in (torch.float16, torch.bfloat16):
        x, weight, norm, residual = operands(1024, 1024, 1024, dtype, device)
        tile = matmul.tile(target_of(device), dtype, 1024, 1024, 1024)
        call = partial(kernels.planned, tile, x, None, weight, None, residual, False)
        yield Launch(f"triton out {dtype} rows 1024", call, tensor_cores=True, streaming=True)


def operands(
    rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, None], torch.Tensor]:
    """x, weight, LayerNorm's weight (Bark has no biases) and residual."""
    empty = partial(torch.empty, dtype=dtype, device=device)
    return empty(rows, k), empty(n, k), (empty(k), None), empty(rows, n)
