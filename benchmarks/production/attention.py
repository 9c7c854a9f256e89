"""Attention over contiguous keys as the models ask for it: fine windows, and prompts of a patched model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bark_fast.kernels import attention as kernels
from production import DTYPES, WIDTHS, Launch

HEAD_DIM, CONTEXT = 64, 1_024
SHAPES = (
    ("fine", 1, CONTEXT, False, False),
    ("fine", 8, CONTEXT, False, False),
    ("prompt", 1, 257, True, False),
    ("prompt", 8, 887, True, False),
    ("padded prompts", 8, 887, True, True),
)
"""(what, batch, time, causal, padded)."""


def launches(device: torch.device) -> Iterator[Launch]:
    """Both sizes of Bark in three dtypes, on the views of a packed projection."""
    for size, (width, heads) in WIDTHS.items():
        for dtype in DTYPES:
            for what, batch, time, causal, padded in SHAPES:
                qkv = torch.empty(batch, time, 3, heads, HEAD_DIM, dtype=dtype, device=device)
                query, key, value = qkv.permute(2, 0, 3, 1, 4)
                out = torch.empty(batch, time, width, dtype=dtype, device=device)
                mask: Tensor | None = None
                if padded:
                    mask = torch.ones(batch, time, dtype=torch.bool, device=device)
                call = partial(
                    kernels.attention, query, key, value, causal, mask, None, HEAD_DIM**-0.5,
                    out.view(batch, time, heads, HEAD_DIM).transpose(1, 2),
                )  # fmt: skip
                name = f"{size} {str(dtype).removeprefix('torch.')} {what} {batch} x {time}"
                yield Launch(name, call, tensor_cores=dtype != torch.float32)
