"""A decode step's book-keeping against a plain Python model, on every backend at hand."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from bark_fast.ops.decode_state import DecodeState, advance, find_slots
from bark_fast.ops.dispatch import prefer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PAGE_SIZE, PAGES, RING = 16, 5, 4


@dataclass
class Row:
    """What one row should hold."""

    table: list[int]
    position: int
    step: int
    remaining: int
    eos: int
    token: int = 0
    length: int = 0
    slot: int = -1
    drawn: list[int] = field(default_factory=lambda: [-1] * RING)

    def take(self, token: int) -> None:
        """One step."""
        if self.remaining == 0:
            return
        self.drawn[self.step % RING] = token
        self.step += 1
        self.remaining = 0 if token < 0 or token == self.eos else self.remaining - 1
        self.length, self.slot = 0, -1
        if self.remaining:
            self.token = token
            self.position += 1
            self.length = self.position + 1
            column = self.position // PAGE_SIZE
            page = self.table[column] if column < PAGES else -1
            self.slot = page * PAGE_SIZE + self.position % PAGE_SIZE if page >= 0 else -1


def random_rows(rng: random.Random, count: int) -> list[Row]:
    """Rows near page boundaries and limits, some idle, some with missing pages."""
    rows = []
    for _ in range(count):
        table = rng.sample(range(1000), PAGES)
        if rng.random() < 0.2:
            table[rng.randrange(PAGES)] = -1
        position = rng.choice([0, PAGE_SIZE - 2, PAGE_SIZE - 1, PAGE_SIZE, PAGES * PAGE_SIZE - 2])
        rows.append(Row(table, position, rng.randrange(100), rng.choice([0, 1, 2, 50]), rng.choice([-1, 3])))
    return rows


def state_of(rows: list[Row], device: str) -> DecodeState:
    """The rows as tensors."""
    state = DecodeState.empty(len(rows), PAGES, RING, device)
    for name, values in {
        "ids": [r.token for r in rows], "positions": [r.position for r in rows],
        "lengths": [r.length for r in rows], "slots": [r.slot for r in rows],
        "places": [[7, r.step, 8, 9] for r in rows],
        "remaining": [r.remaining for r in rows], "eos": [r.eos for r in rows],
        "block_tables": [r.table for r in rows], "drawn": [r.drawn for r in rows],
    }.items():  # fmt: skip
        getattr(state, name).copy_(torch.tensor(values))
    return state


def differing(rows: list[Row], state: DecodeState) -> list[str]:
    """Fields in which the tensors differ from the rows."""
    expected = state_of(rows, "cpu")
    names = state.__dataclass_fields__
    return [n for n in names if not torch.equal(getattr(expected, n), getattr(state, n).cpu())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("count", [1, 127, 128, 129])
def test_steps_follow_the_model(backend: str, device: str, count: int) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if device == "cpu" and torch.cuda.is_available():
            pytest.skip("beside a GPU nothing is interpreted")
    rng = random.Random(count)
    rows = random_rows(rng, count)
    state = state_of(rows, device)
    addresses = [t.data_ptr() for t in state.tensors()]
    for _ in range(PAGE_SIZE + 4):
        tokens = [rng.choice([-1, 3, *range(4, 40)]) for _ in rows]
        with prefer(backend):
            advance(state, torch.tensor(tokens, device=device), PAGE_SIZE)
        for row, token in zip(rows, tokens, strict=True):
            row.take(token)
        assert differing(rows, state) == []
    assert [t.data_ptr() for t in state.tensors()] == addresses


def test_the_comparison_notices_a_row_that_stepped_twice() -> None:
    rows = random_rows(random.Random(0), 8)
    state = state_of(rows, "cpu")
    tokens = torch.full((8,), 7)
    advance(state, tokens, PAGE_SIZE)
    advance(state, tokens, PAGE_SIZE)
    for row in rows:
        row.take(7)
    assert {"positions", "places", "remaining"} <= set(differing(rows, state))


def test_operator_passes_opcheck() -> None:
    state = state_of(random_rows(random.Random(1), 3), "cpu")
    torch.library.opcheck(torch.ops.bark_fast.advance, (torch.tensor([5, 3, -1]), *state.tensors(), PAGE_SIZE))


def test_slots_are_found_again_where_pages_were_replaced() -> None:
    """Idle rows, rows on a missing page and rows past their table have none."""
    rng = random.Random(4)
    rows = random_rows(rng, 200)
    for row in rows:
        row.slot = 5
    rows[0].position = PAGES * PAGE_SIZE
    state = state_of(rows, "cpu")
    for row in rows:
        row.table = [page + 1000 if page >= 0 else page for page in row.table]
        page = row.table[row.position // PAGE_SIZE] if row.position < PAGES * PAGE_SIZE else -1
        there = row.remaining > 0 and page >= 0
        row.slot = page * PAGE_SIZE + row.position % PAGE_SIZE if there else -1
    state.block_tables.copy_(torch.tensor([row.table for row in rows]))
    find_slots(state, PAGE_SIZE)
    assert differing(rows, state) == []
    assert {-1} < {row.slot for row in rows if row.remaining}
