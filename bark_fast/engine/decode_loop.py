"""Decode steps that follow one another on the device: captured once, replayed, and read a burst at a time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from bark_fast.engine.burst import BURST, Buffers, Burst, Row, Shape, place_of, row_of
from bark_fast.engine.capture import Capture, CaptureFailed, GraphMemory
from bark_fast.engine.held_noise import DrawnAhead
from bark_fast.engine.kv_pool import PAGE_SIZE, KVPool, StepBatch
from bark_fast.engine.sequence import Sequence
from bark_fast.engine.transfers import overwrite
from bark_fast.modules.gpt import GPT
from bark_fast.ops.decode_state import STEP, DecodeState, advance, find_slots
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.ops.rule_rows import RuleRows, pack_rules
from bark_fast.ops.sampling import INVALID_TOKEN, sample_rows


class DecodeLoop:
    """Carries sequences of one model forward, `BURST` steps at a time, without the host in between.

    The next burst is launched before the last one is read, as long as the same sequences go on; what it draws
    for one that ended meanwhile, or lost its pages, is dropped. Without `memory` for graphs, or where CUDA
    cannot capture, the same steps run operation by operation. The caller makes the model's GPU the current one,
    and the same stream at each call.

    given: the sequences' noise is that of torch generators, drawn by the host for a burst beforehand; otherwise
    it is computed in the step (`PhiloxNoise`), or not needed.
    """

    def __init__(
        self, model: str, gpt: GPT, pool: KVPool, memory: GraphMemory | None, given: bool = False
    ) -> None:
        self.model, self.gpt, self.pool, self.given, self.memory = model, gpt, pool, given, memory
        self.buffers: dict[int, Buffers] = {}
        self.shape: Shape | None = None
        self.graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self.captures: list[Capture] = []
        self.burst: Burst | None = None
        self.later: Items[Sequence] = ()

    def takes(self, sequence: Sequence) -> bool:
        """Whether the sequence's next step is a plain decode step with noise of this loop's kind.

        The last row of a prompt is one, too, unless an embedding is added to its own.
        """
        if not sequence.is_plain_step:
            return False
        if sequence.work.rule.greedy or isinstance(sequence.noise, PhiloxNoise):
            return not self.given
        return self.given and isinstance(sequence.noise, DrawnAhead)

    def run(self, sequences: Items[Sequence], later: Items[Sequence] = ()) -> list[list[int]]:
        """The tokens each sequence drew: a burst's, or two bursts' when the batch has changed.

        None where there is no page for the token after next: a burst wants room for it, a plain step does not.
        later: others of the model whose turn in this step is still to come; pages for their feed are left.
        """
        self.later = later
        got: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
        burst, self.burst = self.burst, None  # gone for good if anything fails
        if burst is not None and not self._carries(burst, sequences):
            self._read(burst, got)
            burst = None
        if burst is None:
            burst = self._begin([row_of(sequence, got[sequence]) for sequence in sequences], got)
        if burst is not None:
            self.burst = self._follow(burst)
            self._read(burst, got)
        return [got[sequence] for sequence in sequences]

    @staticmethod
    def _carries(burst: Burst, sequences: Items[Sequence]) -> bool:
        """Whether the burst is of these sequences, as they are now."""
        return [row.sequence for row in burst.rows] == list(sequences) and all(
            row.is_up_to_date() for row in burst.rows
        )

    def _begin(self, rows: list[Row], got: dict[Sequence, list[int]]) -> Burst | None:
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
        rows, tables, _ = self._extend(rows, steps)
        rules = [row.sequence.work.rule for row in rows]
        bucket = 1 << (len(rows) - 1).bit_length()
        packed = pack_rules(rules + rules[:1] * (bucket - len(rows)))
        windows = [window for rule in rules for window in rule.windows]
        low, high = min(low for low, _ in windows), max(high for _, high in windows)
        self.shape = Shape(bucket, low, high, packed.window, packed.filters)
        buffers = self._prepare(self.shape, packed)
        on_host = partial(torch.tensor, device="cpu")  # whatever torch's default device is
        host = DecodeState.empty(bucket, self.pool.max_pages, BURST, "cpu")
        count, cached = len(rows), np.array([row.cached for row in rows])
        pages = tables[np.arange(count), cached // PAGE_SIZE].astype(np.int64)
        host.block_tables[:count] = torch.from_numpy(tables)
        host.ids[:count] = on_host([(got[row.sequence] or row.sequence.feed)[-1] for row in rows])
        host.positions[:count] = torch.from_numpy(cached)
        host.lengths[:count] = torch.from_numpy(cached + 1)
        host.slots[:count] = torch.from_numpy(pages * PAGE_SIZE + cached % PAGE_SIZE)
        host.places[:count] = on_host([place_of(row) for row in rows])
        host.remaining[:count] = on_host([row.left for row in rows])
        host.eos[:count] = on_host([-1 if rule.eos_token is None else rule.eos_token for rule in rules])
        for ours, theirs in zip(buffers.state.tensors(), host.tensors(), strict=True):
            overwrite(ours, theirs)
        return self._launch(rows, steps)

    def _follow(self, burst: Burst) -> Burst | None:
        """Launch the burst after this one, for rows it does not end, if there are pages for it."""
        rows = [row.after(burst.steps) for row in burst.rows]
        steps = min(BURST, max(row.left for row in rows))
        if not steps or not self._fits(rows, steps):
            return None
        rows, tables, copied = self._extend(rows, steps)
        state = self._buffers().state
        overwrite(state.block_tables[: len(rows)], torch.from_numpy(tables))
        if copied:  # the last step looked up where the next key goes, perhaps on a page that is another's now
            find_slots(state, PAGE_SIZE)
        return self._launch(rows, steps)

    def _fits(self, rows: list[Row], steps: int) -> bool:
        handles = [row.sequence.handle for row in rows] + [one.handle for one in self.later]
        wanted = [row.wants(steps) for row in rows] + [max(0, len(one.feed) - one.room) for one in self.later]
        return self.pool.fits(handles, wanted)

    def _extend(self, rows: list[Row], steps: int) -> tuple[list[Row], npt.NDArray[np.int32], int]:
        """Make room for so many steps: the rows with what they have now, their block tables, pages copied."""
        counts = [row.wants(steps) for row in rows]
        handles = [row.sequence.handle for row in rows]
        tables, _, _, copied = self.pool.extend(handles, counts)
        rows = [replace(row, reserved=row.reserved + n) for row, n in zip(rows, counts, strict=True)]
        return rows, tables, copied

    def _launch(self, rows: list[Row], steps: int) -> Burst:
        assert self.shape is not None
        if self.given:
            self._draw_ahead(rows, steps)
        step = self.graphs[self.shape].replay if self.shape in self.graphs else self._step
        for _ in range(steps):
            step()
        drawn = self._buffers().state.drawn
        if self.pool.device.type != "cuda":
            return Burst(rows, steps, drawn.clone(), None)
        arriving = torch.empty(drawn.shape, dtype=drawn.dtype, device="cpu", pin_memory=True)
        arriving.copy_(drawn, non_blocking=True)
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Burst(rows, steps, arriving, event)

    def _draw_ahead(self, rows: list[Row], steps: int) -> None:
        """Put the noise of so many steps where they look for it, in the order of the steps."""
        assert self.shape is not None
        noise = self._buffers().noise(self.shape.window)
        for index, row in enumerate(rows):
            source, work = row.sequence.noise, row.sequence.work
            assert isinstance(source, DrawnAhead)
            for step in range(row.step, row.step + min(steps, row.left)):
                drawn = source.ahead(work.rule, work.chunk, row.sequence.stream, step)
                overwrite(noise[index, step % BURST, : len(drawn)], drawn)

    def _read(self, burst: Burst, got: dict[Sequence, list[int]]) -> None:
        """Add the tokens of the burst to those of each sequence that is still where the burst began."""
        if burst.event is not None:
            burst.event.synchronize()
        for row, drawn in zip(burst.rows, burst.drawn.tolist(), strict=False):
            tokens = got.get(row.sequence)
            if tokens is None or not row.is_up_to_date(len(tokens)):
                continue
            for step in range(row.step, row.step + min(burst.steps, row.left)):
                tokens.append(drawn[step % BURST])
                if tokens[-1] in (INVALID_TOKEN, row.sequence.work.rule.eos_token):
                    break

    def _buffers(self) -> Buffers:
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
        logits = self.gpt.logits(hidden, shape.low, shape.high, buffers.scratch)
        rules = RuleRows(buffers.integers, buffers.numbers, shape.window, shape.filters)
        noise = None
        if self.given:
            noise = buffers.noise(shape.window)[buffers.order, state.places[:, STEP] % BURST]
        tokens = sample_rows(
            logits, rules, state.places, noise, shape.low, tokens=buffers.tokens, flag=buffers.flag
        )
        advance(state, tokens, PAGE_SIZE)

    def _prepare(self, shape: Shape, rules: RuleRows) -> Buffers:
        """The buffers for steps of this shape and rules; the step is captured if that is still to be done."""
        if shape.rows not in self.buffers:
            self.buffers[shape.rows] = Buffers(shape.rows, self.pool)
        buffers = self.buffers[shape.rows]
        overwrite(buffers.integers, rules.integers)
        overwrite(buffers.numbers, rules.numbers)
        if self.memory is None or self.memory.failed or shape in self.graphs:
            return buffers
        for idle, tensor in (
            (0, buffers.state.remaining), (0, buffers.state.lengths), (-1, buffers.state.slots),
        ):  # fmt: skip
            tensor.fill_(idle)
        started = time.perf_counter()
        try:
            graph, taken = self.memory.capture(self._step)
        except CaptureFailed as error:
            warnings.warn(
                f"CUDA could not capture a decode step of {self.model} ({error}); its steps are launched one "
                f"operation at a time, which is slower",
                RuntimeWarning,
                stacklevel=2,
            )
            return buffers
        self.graphs[shape] = graph
        self.captures.append(Capture(self.model, shape.rows, time.perf_counter() - started, taken))
        return buffers
