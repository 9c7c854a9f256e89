"""Decode steps that follow one another on the device: captured once, replayed, and read a burst at a time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bark_fast.engine.kv_pool import PAGE_SIZE, KVPool, StepBatch
from bark_fast.engine.sequence import Sequence
from bark_fast.modules.gpt import GPT
from bark_fast.ops.decode_state import DecodeState, advance
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.ops.norm_linear import linear_scratch
from bark_fast.ops.rule_rows import RuleRows, pack_rules, place_row
from bark_fast.ops.sampling import INVALID_TOKEN, sample_rows
from bark_fast.rule_layout import RuleFloat, RuleInt

ONE_CAPTURE = Lock()
"""torch captures one graph at a time in a process; replicas have threads of their own."""
BURST = 10
"""Steps between two looks of the host. A coarse window is 60 steps long."""


@dataclass(frozen=True)
class Capture:
    """A step captured as a CUDA graph: for how many rows, and the seconds and bytes that took."""

    model: str
    rows: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class _Shape:
    """What a captured step is fixed to: rows, rows [low, high) of the head, widest window, any filters."""

    rows: int
    low: int
    high: int
    window: int
    filters: bool


@dataclass(frozen=True)
class _Row:
    """A sequence as a burst begins: tokens cached, index of its next draw, tokens it may still draw.

    reserved: tokens beyond the cached ones that its pages have room for.
    """

    sequence: Sequence
    work: object
    cached: int
    step: int
    left: int
    reserved: int = 0

    def after(self, steps: int) -> _Row:
        """The same, `steps` draws later, if none of them ends it."""
        took = min(steps, self.left)
        return replace(
            self,
            cached=self.cached + took,
            step=self.step + took,
            left=self.left - took,
            reserved=self.reserved - took,
        )

    def wants(self, steps: int) -> int:
        """Tokens to make room for: those of so many steps, and the next, whose place the last step looks up."""
        return min(steps + 1, self.left) - self.reserved


class _Buffers:
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


@dataclass(frozen=True)
class _Burst:
    """A burst on its way: its rows in order, its steps, and where their tokens lie once `event` is reached."""

    rows: list[_Row]
    steps: int
    drawn: Tensor
    event: torch.cuda.Event | None


class DecodeLoop:
    """Carries sequences of one model forward, `BURST` steps at a time, without the host in between.

    The next burst is launched before the last one is read, as long as the same sequences go on; what it draws
    for one that ended meanwhile, or lost its pages, is dropped. Where `capture` is False, or on a CPU, or CUDA
    cannot capture, the same steps run operation by operation. The caller makes the model's GPU the current one.
    """

    def __init__(self, model: str, gpt: GPT, pool: KVPool, capture: bool) -> None:
        self.model, self.gpt, self.pool = model, gpt, pool
        self.capture = capture and pool.device.type == "cuda"
        self.memory = torch.cuda.graph_pool_handle() if self.capture else None
        self.side: torch.cuda.Stream | None = None
        if self.capture:  # on a stream of this device: torch's own for captures is on one device, the first
            self.side = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self.buffers: dict[int, _Buffers] = {}
        self.shape: _Shape | None = None
        self.graphs: dict[_Shape, torch.cuda.CUDAGraph] = {}
        self.captures: list[Capture] = []
        self.burst: _Burst | None = None

    @staticmethod
    def takes(sequence: Sequence) -> bool:
        """Whether the sequence's next step is a plain decode step whose noise needs no host."""
        plain = sequence.steps > 0 and len(sequence.feed) == 1 and sequence.draws
        return plain and (sequence.work.rule.greedy or isinstance(sequence.noise, PhiloxNoise))

    def run(self, sequences: Items[Sequence]) -> list[list[int]]:
        """The tokens each sequence drew: a burst's, or two bursts' when the batch has changed.

        None where there is no page for the token after next: a burst wants room for it, a plain step does not.
        """
        got: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
        burst = self.burst
        if burst is not None and not self._carries(burst, sequences):
            self._read(burst, got)
            burst = None
        if burst is None:
            burst = self._begin([_row(sequence, got[sequence]) for sequence in sequences], got)
        self.burst = None
        if burst is not None:
            self.burst = self._follow(burst)
            self._read(burst, got)
        return [got[sequence] for sequence in sequences]

    @staticmethod
    def _carries(burst: _Burst, sequences: Items[Sequence]) -> bool:
        """Whether the burst is of these sequences, as they are now."""
        return [row.sequence for row in burst.rows] == list(sequences) and all(
            row.work is row.sequence.work and row.cached == len(row.sequence.cached) for row in burst.rows
        )

    def _begin(self, rows: list[_Row], got: dict[Sequence, list[int]]) -> _Burst | None:
        """Write the state of those who go on into the buffers, and launch a burst, if there are pages."""
        rows = [row for row in rows if row.left > 0]
        if not rows:
            return None
        for row in rows:
            self.pool.pool.truncate(row.sequence.handle, row.cached)  # pages of a burst that was dropped
        steps = min(BURST, max(row.left for row in rows))
        if not self._fits(rows, steps):
            steps = 1
        if not self._fits(rows, steps):
            return None
        rows, tables = self._extend(rows, steps)
        rules = [row.sequence.work.rule for row in rows]
        bucket = 1 << (len(rows) - 1).bit_length()
        packed = pack_rules(rules + rules[:1] * (bucket - len(rows)), self.pool.device)
        windows = [window for rule in rules for window in rule.windows]
        low, high = min(low for low, _ in windows), max(high for _, high in windows)
        self.shape = _Shape(bucket, low, high, packed.window, packed.filters)
        buffers = self._prepare(self.shape)
        buffers.integers.copy_(packed.integers)
        buffers.numbers.copy_(packed.numbers)
        host = DecodeState.empty(bucket, self.pool.max_pages, BURST, "cpu")
        count, cached = len(rows), np.array([row.cached for row in rows])
        pages = tables[np.arange(count), cached // PAGE_SIZE].astype(np.int64)
        host.block_tables[:count] = torch.from_numpy(tables)
        host.ids[:count] = torch.tensor([(got[row.sequence] or row.sequence.feed)[-1] for row in rows])
        host.positions[:count] = torch.from_numpy(cached)
        host.lengths[:count] = torch.from_numpy(cached + 1)
        host.slots[:count] = torch.from_numpy(pages * PAGE_SIZE + cached % PAGE_SIZE)
        host.places[:count] = torch.tensor([_place(row) for row in rows])
        host.remaining[:count] = torch.tensor([row.left for row in rows])
        host.eos[:count] = torch.tensor([-1 if rule.eos_token is None else rule.eos_token for rule in rules])
        for ours, theirs in zip(buffers.state.tensors(), host.tensors(), strict=True):
            ours.copy_(theirs)
        return self._launch(rows, steps)

    def _follow(self, burst: _Burst) -> _Burst | None:
        """Launch the burst after this one, for rows it does not end, if there are pages for it."""
        rows = [row.after(burst.steps) for row in burst.rows]
        steps = min(BURST, max(row.left for row in rows))
        if not steps or not self._fits(rows, steps):
            return None
        rows, tables = self._extend(rows, steps)
        self._buffers().state.block_tables[: len(rows)].copy_(torch.from_numpy(tables))
        return self._launch(rows, steps)

    def _fits(self, rows: list[_Row], steps: int) -> bool:
        return self.pool.fits([row.sequence.handle for row in rows], [row.wants(steps) for row in rows])

    def _extend(self, rows: list[_Row], steps: int) -> tuple[list[_Row], npt.NDArray[np.int32]]:
        """Make room for so many steps; the rows with what they have now, and their block tables."""
        counts = [row.wants(steps) for row in rows]
        tables, _, _ = self.pool.extend([row.sequence.handle for row in rows], counts)
        return [replace(row, reserved=row.reserved + n) for row, n in zip(rows, counts, strict=True)], tables

    def _launch(self, rows: list[_Row], steps: int) -> _Burst:
        assert self.shape is not None
        step = self.graphs[self.shape].replay if self.shape in self.graphs else self._step
        for _ in range(steps):
            step()
        drawn = self._buffers().state.drawn
        if self.pool.device.type != "cuda":
            return _Burst(rows, steps, drawn.clone(), None)
        arriving = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
        arriving.copy_(drawn, non_blocking=True)
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _Burst(rows, steps, arriving, event)

    def _read(self, burst: _Burst, got: dict[Sequence, list[int]]) -> None:
        """Add the tokens of the burst to those of each sequence that is still where the burst began."""
        if burst.event is not None:
            burst.event.synchronize()
        for row, drawn in zip(burst.rows, burst.drawn.tolist(), strict=False):
            tokens = got.get(row.sequence)
            if tokens is None or row.work is not row.sequence.work:
                continue
            if row.cached != len(row.sequence.cached) + len(tokens):
                continue
            for step in range(row.step, row.step + min(burst.steps, row.left)):
                tokens.append(drawn[step % BURST])
                if tokens[-1] in (INVALID_TOKEN, row.sequence.work.rule.eos_token):
                    break

    def _buffers(self) -> _Buffers:
        assert self.shape is not None
        return self.buffers[self.shape.rows]

    def _step(self) -> None:
        """One step of the rows of `shape`, from the tokens fed to the tokens drawn."""
        shape, buffers = self.shape, self._buffers()
        assert shape is not None
        state = buffers.state
        batch = StepBatch(
            counts=[1] * shape.rows, totals=[], slots=state.slots, block_tables=state.block_tables,
            lengths=state.lengths, query_starts=buffers.starts, prefill_starts=buffers.starts[:1],
            paged=shape.rows,
        )  # fmt: skip
        attend = partial(self.pool.attend, batch)
        hidden = self.gpt(state.ids, state.positions, attend, scratch=buffers.scratch)
        logits = self.gpt.logits(hidden, shape.low, shape.high)
        rules = RuleRows(buffers.integers, buffers.numbers, shape.window, shape.filters)
        tokens = sample_rows(
            logits, rules, state.places, logits_low=shape.low, tokens=buffers.tokens, flag=buffers.flag
        )
        advance(state, tokens, PAGE_SIZE)

    def _prepare(self, shape: _Shape) -> _Buffers:
        """The buffers for steps of this shape; the step is captured if that is still to be done."""
        if shape.rows not in self.buffers:
            self.buffers[shape.rows] = _Buffers(shape.rows, self.pool)
        buffers = self.buffers[shape.rows]
        if not self.capture or shape in self.graphs:
            return buffers
        for idle, tensor in (
            (0, buffers.state.remaining), (0, buffers.state.lengths), (-1, buffers.state.slots),
        ):  # fmt: skip
            tensor.fill_(idle)
        started, held = time.perf_counter(), torch.cuda.memory_reserved(self.pool.device)
        graph = torch.cuda.CUDAGraph()
        try:
            self._warm_up()
            # other threads, at work on other devices, are free to allocate meanwhile
            with ONE_CAPTURE, torch.cuda.graph(graph, self.memory, self.side, "thread_local"):
                self._step()
        except RuntimeError as error:
            self.capture = False
            warnings.warn(
                f"CUDA could not capture a decode step of {self.model} ({error}); its steps are launched one "
                f"operation at a time, which is slower",
                RuntimeWarning,
                stacklevel=2,
            )
            return buffers
        self.graphs[shape] = graph
        held = torch.cuda.memory_reserved(self.pool.device) - held
        self.captures.append(Capture(self.model, shape.rows, time.perf_counter() - started, held))
        return buffers

    def _warm_up(self) -> None:
        """Run the step on a side stream, so that what is allocated or compiled once is not captured."""
        assert self.side is not None
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self._step()
            self._step()
        torch.cuda.current_stream().wait_stream(self.side)


def _place(row: _Row) -> list[int]:
    """Where the row's next draw lies in its noise; a greedy row may have any other noise, and uses none."""
    noise, sequence = row.sequence.noise, row.sequence
    seed = noise.seed if isinstance(noise, PhiloxNoise) else 0
    return place_row(seed, row.step, sequence.stream, sequence.work.chunk)


def _row(sequence: Sequence, tokens: list[int]) -> _Row:
    """The sequence as it is once `tokens` are taken: where it goes on, and how far it may."""
    work = sequence.work
    ended = bool(tokens) and tokens[-1] in (INVALID_TOKEN, work.rule.eos_token)
    left = 0 if ended else work.max_new_tokens - len(sequence.drawn) - len(tokens)
    return _Row(sequence, work, len(sequence.cached) + len(tokens), sequence.step + len(tokens), left)
