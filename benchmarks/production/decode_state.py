"""Book-keeping of one decode step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bark_fast.ops.decode_state import DecodeState
from production import Launch


def launches(device: torch.device) -> Iterator[Launch]:
    """A batch of 1 and of 64."""
    from bark_fast.kernels import decode_state as kernels

    for rows in (1, 64):
        state = DecodeState.empty(rows, 64, 16, device)
        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        yield Launch(f"rows {rows}", partial(kernels.advance, tokens, *state.tensors(), 16))
