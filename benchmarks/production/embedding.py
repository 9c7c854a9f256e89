"""Embeddings as the models ask for them: one decode step, a prompt with merged halves, fine windows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bark_fast.kernels import embedding as kernels
from production import DTYPES, WIDTHS, Launch

SEMANTIC_VOCABULARY, FINE_CODES, CONTEXT = 129_600, 1_056, 1_024


def launches(device: torch.device) -> Iterator[Launch]:
    """Both sizes of Bark in three dtypes."""
    for size, (width, _) in WIDTHS.items():
        for dtype in DTYPES:
            tokens = torch.empty(SEMANTIC_VOCABULARY, width, dtype=dtype, device=device)
            places = torch.empty(CONTEXT, width, dtype=dtype, device=device)
            name = f"{size} {str(dtype).removeprefix('torch.')}"
            for rows, merged in ((1, False), (64, False), (257, True)):
                ids = torch.zeros(rows, dtype=torch.int64, device=device)
                call = partial(kernels.embed, ids, ids, tokens, places, ids if merged else None)
                yield Launch(f"{name} rows {rows}", call)
            tables = [torch.empty(FINE_CODES, width, dtype=dtype, device=device) for _ in range(8)]
            codes = torch.zeros(1, CONTEXT, 8, dtype=torch.int64, device=device)
            for count in range(3, 9):
                call = partial(kernels.embed_codes, codes, tables[:count], places)
                yield Launch(f"{name} {count} codebooks", call)
