"""What a batch of decoding sequences knows of itself on the device, and how one step moves it on.

With it a decode step needs nothing from the host: the token drawn is fed next, positions, page slots and
lengths advance, rows end at EOS or at their limit, and what was drawn is kept until the host looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bark_fast.ops.dispatch import define, is_eager, uses_triton, writes_in_place

STEP = 1
"""Column of `places` that holds the step."""


@dataclass(frozen=True)
class DecodeState:
    """One row a sequence, all on one device; the tensors' addresses never change.

    ids: (rows,) int64, the token each row feeds next. positions: (rows,) int64, where. lengths: (rows,) int32,
    keys it then sees, its own included; 0 where the row is idle. slots: (rows,) int64, where its key goes; -1
    where idle. places: (rows, 4) int64, where its next draw lies in its noise: seed, step, stream, chunk.
    remaining: (rows,) int32, tokens it may still draw; 0 is idle. eos: (rows,) int64, the token that ends it,
    -1 for none. block_tables: (rows, pages) int32. drawn: (rows, ring) int32, the token of step i at column
    i % ring.
    """

    ids: Tensor
    positions: Tensor
    lengths: Tensor
    slots: Tensor
    places: Tensor
    remaining: Tensor
    eos: Tensor
    block_tables: Tensor
    drawn: Tensor

    @classmethod
    def empty(cls, rows: int, pages: int, ring: int, device: torch.device | str) -> DecodeState:
        """`rows` idle rows with room for `pages` pages each and the last `ring` tokens drawn."""

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return cls(
            ids=full(0, rows),
            positions=full(0, rows),
            lengths=full(0, rows, dtype=torch.int32),
            slots=full(-1, rows),
            places=full(0, rows, 4),
            remaining=full(0, rows, dtype=torch.int32),
            eos=full(-1, rows),
            block_tables=full(-1, rows, pages, dtype=torch.int32),
            drawn=full(-1, rows, ring, dtype=torch.int32),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)


def advance(state: DecodeState, tokens: Tensor, page_size: int) -> None:
    """Take up the tokens just drawn, in place: every row with tokens remaining keeps its token and steps on.

    tokens: (rows,) int64; a negative one (`ops.sampling.INVALID_TOKEN`) ends its row as EOS does. A position
    beyond the block table, or on a page that is not there (-1), gets slot -1: its key is stored nowhere.
    """
    arguments: list[Any] = [tokens, *state.tensors(), page_size]
    if is_eager(tokens):
        _advance(*arguments)
    else:
        torch.ops.bark_fast.advance(*arguments)


def _advance(
    tokens: Tensor, ids: Tensor, positions: Tensor, lengths: Tensor, slots: Tensor, places: Tensor,
    remaining: Tensor, eos: Tensor, block_tables: Tensor, drawn: Tensor, page_size: int,
) -> None:  # fmt: skip
    if uses_triton(tokens):
        from bark_fast.kernels import decode_state as kernels

        kernels.advance(
            tokens, ids, positions, lengths, slots, places, remaining, eos, block_tables, drawn, page_size
        )
        return
    live = remaining > 0
    steps = places[:, STEP]
    column = (steps % drawn.shape[1])[:, None]
    kept = torch.where(live[:, None], tokens[:, None].to(torch.int32), drawn.gather(1, column))
    drawn.scatter_(1, column, kept)
    left = torch.where((tokens < 0) | (tokens == eos), 0, remaining - 1)
    goes_on = live & (left > 0)
    position = positions + 1
    slots.copy_(torch.where(live, _slots_at(position, block_tables, page_size, goes_on), slots))
    lengths.copy_(torch.where(live, torch.where(goes_on, position + 1, 0), lengths))
    ids.copy_(torch.where(goes_on, tokens, ids))
    positions.copy_(torch.where(goes_on, position, positions))
    steps.add_(live)
    remaining.copy_(torch.where(live, left, remaining))


def find_slots(state: DecodeState, page_size: int) -> None:
    """Look up again, in place, where the next keys go: after pages of rows in flight were replaced."""
    live = state.remaining > 0
    state.slots.copy_(_slots_at(state.positions, state.block_tables, page_size, live))


def _slots_at(positions: Tensor, block_tables: Tensor, page_size: int, live: Tensor) -> Tensor:
    place = positions // page_size
    pages = block_tables.gather(1, place.clamp(max=block_tables.shape[1] - 1)[:, None])[:, 0].long()
    found = live & (place < block_tables.shape[1]) & (pages >= 0)
    return torch.where(found, pages * page_size + positions % page_size, -1)


define(
    "advance(Tensor tokens, Tensor(a!) ids, Tensor(b!) positions, Tensor(c!) lengths, Tensor(d!) slots, "
    "Tensor(e!) places, Tensor(f!) remaining, Tensor eos, Tensor block_tables, Tensor(g!) drawn, "
    "SymInt page_size) -> ()",
    _advance,
    writes_in_place,
)
