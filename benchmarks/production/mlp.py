"""The feed-forward half of a layer: decode of 1 to 64 rows, and what stands around cuBLAS above that."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bark_fast.kernels import matmul
from bark_fast.kernels import mlp as kernels
from bark_fast.kernels.norm_linear import planned
from bark_fast.kernels.target import target_of
from production import DTYPES, WIDTHS, Launch
from production.norm_linear import operands


def launches(device: torch.device) -> Iterator[Launch]:
    """Both sizes of Bark; one row in three dtypes, more rows and biases in one dtype each."""
    for size, (width, _) in WIDTHS.items():
        for dtype in DTYPES:
            x, fc, norm, _ = operands(1, 4 * width, width, dtype, device)
            proj = operands(1, width, 4 * width, dtype, device)[1]
            many = {torch.float32: (4,), torch.float16: (2, 3, 4, 64), torch.bfloat16: (16, 1024)}[dtype]
            for rows in (1, *many):
                x = operands(rows, width, width, dtype, device)[0]
                call = partial(kernels.layernorm_gelu_mlp, x, norm, (fc, None), (proj, None))
                name = f"{size} {str(dtype).removeprefix('torch.')} rows {rows}"
                yield Launch(name, call, tensor_cores=rows == 16, streaming=True)
                if dtype == torch.float16 and rows <= 4:  # the fine model, and checkpoints with biases
                    shift, *biases = (operands(1, 1, n, dtype, device)[2][0] for n in (width, 4 * width, width))
                    call = partial(
                        kernels.layernorm_gelu_mlp, x, (norm[0], shift), (fc, biases[0]), (proj, biases[1])
                    )
                    yield Launch(f"{name} norm bias", call, streaming=True)
    for dtype in (torch.float16, torch.bfloat16):
        x, fc, _, _ = operands(8192, 4096, 1024, dtype, device)
        tile = matmul.tile(target_of(device), dtype, 8192, 4096, 1024)
        call = partial(planned, tile, x, None, fc, None, None, True)
        yield Launch(f"triton fc {dtype} rows 8192", call, tensor_cores=True, streaming=True)
