"""The paged cache as the engine uses it: decode steps of small and large batches, moves, prefills."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from bark_fast.kernels import paged_kv as kernels
from bark_fast.kernels import paged_prefill as prefill
from bark_fast.ops.paged_kv import attention_scratch
from production import DTYPES, WIDTHS, Launch, tf32

COLUMNS, PAGES = 64, 4_096
PROMPTS = ((257, 1), (887, 1), (8 * 257, 8))
"""Rows and sequences of a prefill."""
OTHERS = ((32, 32), (128, 64))
"""Head and page sizes the operations take beside Bark's 64 and 16."""


def launches(device: torch.device) -> Iterator[Launch]:
    """Both sizes of Bark in three dtypes, tables as wide as the context; then one width of other heads."""
    for dtype in DTYPES:
        for size, (_, heads) in WIDTHS.items():
            yield from _launches(f"{size} {str(dtype).removeprefix('torch.')}", heads, 64, 16, dtype, device)
        for head_dim, page_size in OTHERS:
            name = f"head size {head_dim} {str(dtype).removeprefix('torch.')}"
            yield from _launches(name, 768 // head_dim, head_dim, page_size, dtype, device, (1,), PROMPTS[:1])
    for launch in _launches("small tf32", 12, 64, 16, torch.float32, device):
        if "prefill" in launch.name:  # nothing else multiplies on tensor cores
            yield replace(launch, call=partial(tf32, launch.call))


def _launches(
    name: str, heads: int, head_dim: int, page_size: int, dtype: torch.dtype, device: torch.device,
    batches: tuple[int, ...] = (1, 64), prompts: tuple[tuple[int, int], ...] = PROMPTS,
) -> Iterator[Launch]:  # fmt: skip
    """Decode, moves and prefill of one model's pages."""
    width, scale = heads * head_dim, head_dim**-0.5
    at_once = 8 if head_dim == 64 else 0  # what `paged_attention` is written for
    k, v = (torch.empty(PAGES, heads, page_size, head_dim, dtype=dtype, device=device) for _ in range(2))

    def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    for batch in batches:
        qkv = torch.empty(batch, 3 * width, dtype=dtype, device=device)
        query = qkv[:, :width].view(batch, heads, head_dim)
        tables = integers(batch, COLUMNS), integers(batch), integers(batch + 1)
        out = torch.empty(batch, width, dtype=dtype, device=device)
        scratch = attention_scratch(batch, heads, head_dim, device)
        slots = integers(batch, dtype=torch.int64)
        call = partial(kernels.paged_attention, query, k, v, *tables, out, scale, *scratch)
        yield Launch(f"{name} decode {batch}", partial(call, slots), loads_at_once=at_once)
        if batch == 1 and len(batches) > 1:
            yield Launch(f"{name} attend {batch}", call, loads_at_once=at_once)
    yield Launch(f"{name} append", partial(kernels.append_kv, qkv, k, v, slots))
    yield Launch(f"{name} copy", partial(kernels.copy_pages, k, v, integers(4, 2)))
    whole = torch.empty(heads, 887, head_dim, dtype=dtype, device=device)
    table = integers(COLUMNS)
    yield Launch(f"{name} gather", partial(kernels.gather_kv, k, table, 887, whole))
    for rows, seqs in prompts:
        qkv = torch.empty(rows, 3 * width, dtype=dtype, device=device)
        out = torch.empty(rows, width, dtype=dtype, device=device)
        tables = integers(seqs, COLUMNS), integers(seqs), integers(seqs + 1)
        slots = integers(rows, dtype=torch.int64)
        call = partial(prefill.paged_prefill, qkv, k, v, *tables, slots, out, scale, rows // seqs)
        yield Launch(f"{name} prefill {seqs} x {rows // seqs}", call)
