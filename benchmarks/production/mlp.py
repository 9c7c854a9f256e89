"""The feed-forward half of a layer: decode of 1 to 64 rows, and what stands around cuBLAS above that."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bark_fast.kernels import matmul
from bark_fast.kernels import mlp as kernels
from bark_fast.kernels.norm_linear import planned
from bark_fast.kernels.target import target_of
from production import BIAS_ROWS, DTYPES, ROWS, WIDTHS, Launch
from production.norm_linear import operands


def launches(device: torch.device) -> Iterator[Launch]:
    """Both sizes of Bark in three dtypes, all rows of decode and a prompt; biases in 16 bits."""
    for size, (width, _) in WIDTHS.items():
        for dtype in DTYPES:
            _, fc, norm, _ = operands(1, 4 * width, width, dtype, device)
            proj = operands(1, width, 4 * width, dtype, device)[1]
            shift, *biases = (operands(1, 1, n, dtype, device)[2][0] for n in (width, 4 * width, width))
            for rows in (*ROWS, 1024):
                x = operands(rows, width, width, dtype, device)[0]
                call = partial(kernels.layernorm_gelu_mlp, x, norm, (fc, None), (proj, None))
                name = f"{size} {str(dtype).removeprefix('torch.')} rows {rows}"
                yield Launch(name, call)
                # checkpoints with biases; with more rows they take no more registers
                if dtype != torch.float32 and rows in BIAS_ROWS:
                    call = partial(
                        kernels.layernorm_gelu_mlp, x, (norm[0], shift), (fc, biases[0]), (proj, biases[1])
                    )
                    yield Launch(f"{name} norm bias", call)
    for dtype in (torch.float16, torch.bfloat16):
        x, fc, _, _ = operands(8192, 4096, 1024, dtype, device)
        tile = matmul.tile(target_of(device), dtype, 8192, 4096, 1024)
        call = partial(planned, tile, x, None, fc, None, None, True)
        yield Launch(f"triton fc {dtype} rows 8192", call)
