"""Book-keeping of a decode step on the device, in one launch, so that step follows step without the host.

A lane is a row. A row with nothing remaining is left as it is, its slot -1 and its length 0, so that it stores
no keys and attends to none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bark_fast.kernels.target import COMPILE, cdiv, on_its_device

BLOCK = 128
STEP = tl.constexpr(1)
"""Column of a draw's place that holds its step."""


@triton.jit(do_not_specialize=["rows"])
def _advance_kernel(
    tokens, ids, positions, lengths, slots, places, remaining, eos, block_tables, drawn,
    rows, page_size, columns, ring, token_stride, place_stride, table_stride, drawn_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(remaining + row, row < rows, 0)
    live = left > 0
    token = tl.load(tokens + row * token_stride, live, 0).to(tl.int64)
    place = places + row * place_stride + STEP
    step = tl.load(place, live, 0)
    tl.store(drawn + row * drawn_stride + step % ring, token.to(tl.int32), live)
    # a token below 0 reports logits that were not finite: the row ends there, as it does at EOS
    ended = (token < 0) | (token == tl.load(eos + row, live, -1))
    left = tl.where(ended, 0, left - 1)
    position = tl.load(positions + row, live, 0) + 1
    column = position // page_size
    goes_on = live & (left > 0)
    page = tl.load(block_tables + row * table_stride + column, goes_on & (column < columns), -1).to(tl.int64)
    slot = tl.where(page >= 0, page * page_size + position % page_size, -1)
    tl.store(ids + row, token, goes_on)
    tl.store(positions + row, position, goes_on)
    tl.store(place, step + 1, live)
    tl.store(remaining + row, left, live)
    tl.store(lengths + row, tl.where(goes_on, position + 1, 0).to(tl.int32), live)
    tl.store(slots + row, tl.where(goes_on, slot, -1), live)


@on_its_device
def advance(
    tokens: Tensor, ids: Tensor, positions: Tensor, lengths: Tensor, slots: Tensor, places: Tensor,
    remaining: Tensor, eos: Tensor, block_tables: Tensor, drawn: Tensor, page_size: int,
) -> None:  # fmt: skip
    """Take up the tokens just drawn. Contract: `ops.decode_state.advance`."""
    rows = len(ids)
    vectors = (ids, positions, lengths, slots, remaining, eos)
    assert all(v.shape == (rows,) and v.is_contiguous() for v in vectors) and tokens.shape == (rows,)
    assert places.shape == (rows, 4) and places.stride(1) == block_tables.stride(1) == drawn.stride(1) == 1
    _advance_kernel[(cdiv(rows, BLOCK),)](
        tokens, ids, positions, lengths, slots, places, remaining, eos, block_tables, drawn,
        rows, page_size, block_tables.shape[1], drawn.shape[1],
        tokens.stride(0), places.stride(0), block_tables.stride(0), drawn.stride(0),
        BLOCK=BLOCK, num_warps=4, **COMPILE,
    )  # fmt: skip
