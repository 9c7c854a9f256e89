"""What a decode loop keeps of its rows: as the host sees them, and the buffers steps work on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bark_fast.engine.kv_pool import KVPool
from bark_fast.engine.sequence import Sequence
from bark_fast.ops.decode_state import DecodeState
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.ops.norm_linear import linear_scratch
from bark_fast.ops.rule_rows import place_row
from bark_fast.ops.sampling import INVALID_TOKEN
from bark_fast.rule_layout import RuleFloat, RuleInt

BURST = 10
"""Steps between two looks of the host. A coarse window is 60 steps long."""


@dataclass(frozen=True)
class Shape:
    """What a captured step is fixed to: rows, rows [low, high) of the head, widest window, any filters."""

    rows: int
    low: int
    high: int
    window: int
    filters: bool


@dataclass(frozen=True)
class Row:
    """A sequence as a burst begins: tokens cached, index of its next draw, tokens it may still draw.

    lease: the sequence's, as the burst begins. reserved: tokens beyond the cached ones that its pages have room
    for.
    """

    sequence: Sequence
    lease: int
    cached: int
    step: int
    left: int
    reserved: int = 0

    def after(self, steps: int) -> Row:
        """The same, `steps` draws later, if none of them ends it."""
        took = min(steps, self.left)
        return replace(
            self,
            cached=self.cached + took,
            step=self.step + took,
            left=self.left - took,
            reserved=self.reserved - took,
        )

    def is_up_to_date(self, unread: int = 0) -> bool:
        """Whether the sequence is where the burst began, once it takes so many tokens that were read."""
        return self.lease == self.sequence.lease and self.cached == len(self.sequence.cached) + unread

    def wants(self, steps: int) -> int:
        """Tokens to make room for: those of so many steps, and the next, whose place the last step looks up."""
        return min(steps + 1, self.left) - self.reserved


class Buffers:
    """What the steps of so many rows read and write, on the device, at addresses that never change."""

    def __init__(self, rows: int, pool: KVPool) -> None:
        device = pool.device
        self.state = DecodeState.empty(rows, pool.max_pages, BURST, device)
        self.scratch = linear_scratch(rows, 4 * pool.config.n_embd, device)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.integers = torch.zeros(rows, len(RuleInt), dtype=torch.int32, device=device)
        self.numbers = torch.zeros(rows, len(RuleFloat), dtype=torch.float32, device=device)
        self.tokens = torch.empty(rows, dtype=torch.int64, device=device)
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.order = torch.arange(rows, device=device)
        self._noise: dict[int, Tensor] = {}

    def noise(self, window: int) -> Tensor:
        """Noise from the host (rows, BURST, window): that of step i at place i % BURST."""
        if window not in self._noise:
            shape = (len(self.order), BURST, window)
            self._noise[window] = torch.ones(shape, dtype=torch.float32, device=self.order.device)
        return self._noise[window]


@dataclass(frozen=True)
class Burst:
    """A burst on its way: its rows in order, its steps, and where their tokens lie once `event` is reached."""

    rows: list[Row]
    steps: int
    drawn: Tensor
    event: torch.cuda.Event | None


def place_of(row: Row) -> list[int]:
    """Where the row's next draw lies in its noise; a greedy row may have any other noise, and uses none."""
    noise, sequence = row.sequence.noise, row.sequence
    seed = noise.seed if isinstance(noise, PhiloxNoise) else 0
    return place_row(seed, row.step, sequence.stream, sequence.work.chunk)


def row_of(sequence: Sequence, tokens: list[int]) -> Row:
    """The sequence as it is once `tokens` are taken: where it goes on, and how far it may."""
    work = sequence.work
    ended = bool(tokens) and tokens[-1] in (INVALID_TOKEN, work.rule.eos_token)
    left = 0 if ended else work.max_new_tokens - len(sequence.drawn) - len(tokens)
    taken = len(tokens)
    return Row(sequence, sequence.lease, len(sequence.cached) + taken, sequence.step + taken, left)
