"""The paged cache as the engine uses it: decode steps of small and large batches, moves, prefills."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bark_fast.kernels import paged_kv as kernels
from bark_fast.kernels import paged_prefill as prefill
from bark_fast.ops.paged_kv import attention_scratch
from production import DTYPES, WIDTHS, Launch

HEAD_DIM, PAGE_SIZE, COLUMNS, PAGES = 64, 16, 64, 4_096


def launches(device: torch.device) -> Iterator[Launch]:
    """Both sizes of Bark in three dtypes, tables as wide as the context."""
    for size, (width, heads) in WIDTHS.items():
        for dtype in DTYPES:
            name = f"{size} {str(dtype).removeprefix('torch.')}"
            k, v = (
                torch.empty(PAGES, heads, PAGE_SIZE, HEAD_DIM, dtype=dtype, device=device) for _ in range(2)
            )

            def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
                return torch.zeros(*shape, dtype=dtype, device=device)

            for batch in (1, 64):
                qkv = torch.empty(batch, 3 * width, dtype=dtype, device=device)
                query = qkv[:, :width].view(batch, heads, HEAD_DIM)
                tables = integers(batch, COLUMNS), integers(batch), integers(batch + 1)
                out = torch.empty(batch, width, dtype=dtype, device=device)
                scratch = attention_scratch(batch, heads, HEAD_DIM, device)
                slots = integers(batch, dtype=torch.int64)
                call = partial(kernels.paged_attention, query, k, v, *tables, out, HEAD_DIM**-0.5, *scratch)
                yield Launch(f"{name} decode {batch}", partial(call, slots), streaming=True, loads_at_once=8)
                if batch == 1:
                    yield Launch(f"{name} attend {batch}", call, streaming=True, loads_at_once=8)
            yield Launch(f"{name} append", partial(kernels.append_kv, qkv, k, v, slots), streaming=True)
            yield Launch(f"{name} copy", partial(kernels.copy_pages, k, v, integers(4, 2)), streaming=True)
            whole = torch.empty(heads, 887, HEAD_DIM, dtype=dtype, device=device)
            table = integers(COLUMNS)
            yield Launch(f"{name} gather", partial(kernels.gather_kv, k, table, 887, whole), streaming=True)
            for rows, seqs in ((257, 1), (887, 1), (8 * 257, 8)):
                qkv = torch.empty(rows, 3 * width, dtype=dtype, device=device)
                out = torch.empty(rows, width, dtype=dtype, device=device)
                tables = integers(seqs, COLUMNS), integers(seqs), integers(seqs + 1)
                slots = integers(rows, dtype=torch.int64)
                call = partial(
                    prefill.paged_prefill, qkv, k, v, *tables, slots, out, HEAD_DIM**-0.5, rows // seqs
                )
                tensor_cores = dtype != torch.float32
                yield Launch(f"{name} prefill {seqs} x {rows // seqs}", call, tensor_cores, streaming=True)
