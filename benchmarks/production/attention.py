"""Attention over contiguous keys as the models ask for it: fine windows, and prompts of a patched model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from bark_fast.kernels import attention as kernels
from production import DTYPES, WIDTHS, Launch, tf32

CONTEXT = 1_024
SHAPES = (
    ("fine", 1, CONTEXT, False, ""),
    ("fine", 8, CONTEXT, False, ""),
    ("prompt", 1, 257, True, ""),
    ("prompt", 8, 887, True, ""),
    ("padded prompts", 8, 887, True, "mask"),
)
"""(what, batch, time, causal, what ends or hides keys)."""
OTHERS = (
    *((head_dim, *SHAPES[case]) for head_dim in (32, 128) for case in (1, 4)),
    (64, "prompts of lengths", 8, 887, True, "lengths"),
)
"""What the operation takes beside Bark's own calls: other head sizes by either tile, a length for each
sequence."""


def launches(device: torch.device) -> Iterator[Launch]:
    """Both sizes of Bark in three dtypes, and one width of everything else the operation takes."""
    for size, (_, heads) in WIDTHS.items():
        for dtype in DTYPES:
            name = f"{size} {str(dtype).removeprefix('torch.')}"
            for shape in SHAPES:
                yield _launch(name, heads, dtype, device, 64, *shape)
    for dtype in DTYPES:
        for head_dim, *rest in OTHERS:
            name = f"head size {head_dim} {str(dtype).removeprefix('torch.')}"
            yield _launch(name, 768 // head_dim, dtype, device, head_dim, *rest)
    for shape in SHAPES:
        launch = _launch("small tf32", 12, torch.float32, device, 64, *shape)
        yield replace(launch, call=partial(tf32, launch.call))


def _launch(
    name: str, heads: int, dtype: torch.dtype, device: torch.device, head_dim: int, what: str, batch: int,
    time: int, causal: bool, ends: str,
) -> Launch:  # fmt: skip
    """Attention on the views of a packed projection."""
    qkv = torch.empty(batch, time, 3, heads, head_dim, dtype=dtype, device=device)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    out = torch.empty(batch, time, heads, head_dim, dtype=dtype, device=device).transpose(1, 2)
    mask = torch.ones(batch, time, dtype=torch.bool, device=device) if ends == "mask" else None
    lengths = torch.ones(batch, dtype=torch.int32, device=device) if ends == "lengths" else None
    call = partial(kernels.attention, query, key, value, causal, mask, lengths, head_dim**-0.5, out)
    return Launch(f"{name} {what} {batch} x {time}", call)
