"""Progress of a generation: events for a caller, or one bar on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from bark_fast.bars import make_bar
from bark_fast.config import Layout
from bark_fast.work import Await, Decode, FinePass, Fork, Join, Work


@dataclass(frozen=True)
class Progress:
    """Where utterance `index` stands: `done` of at most `total` units (tokens, passes) of a chunk's `stage`."""

    index: int
    chunk: int
    stage: str
    done: int
    total: int


ProgressCallback: TypeAlias = Callable[[Progress], None]

# rough shares of the time an utterance takes; they only steer the bar
_SHARES = {"semantic": (0.0, 0.15), "coarse": (0.15, 0.65), "fine": (0.8, 0.18), "codec": (0.98, 0.02)}


def progress_of(index: int, work: Work, done: int) -> Progress | None:
    """The event for `done` units of `work`, None for work that is not progress."""
    if isinstance(work, (Join, Fork, Await)):
        return None
    if isinstance(work, Decode):
        return Progress(index, work.chunk, work.model, work.first_step + done, work.total_steps)
    if isinstance(work, FinePass):
        return Progress(index, work.chunk, "fine", work.done_passes + done, work.total_passes)
    return Progress(index, work.chunk, "codec", done, 1)


class ProgressBar:
    """One bar for all utterances: stage, tokens a second, and real-time factor of the stage.

    The real-time factor is wall seconds per second of speech: below 1 is faster than real time.
    chunks: number of chunks of each utterance.
    """

    def __init__(self, layout: Layout, chunks: list[int]) -> None:
        self.layout, self.chunks = layout, chunks
        self.fractions: dict[tuple[int, int], float] = {}  # of each chunk; several of a text may be under way
        self.done, self.total = 0.0, sum(chunks)
        self.latest: dict[tuple[int, int], Progress] = {}
        self.stage, self.drawn = "", 0
        self.started = self.now = time.perf_counter()
        self.bar: Any = make_bar(
            total=100 * self.total,
            unit="%",
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            dynamic_ncols=True,
        )

    def __call__(self, event: Progress) -> None:
        """Show `event`."""
        place = (event.index, event.chunk)
        before = self.latest.get(place)
        same = before is not None and before.stage == event.stage
        start, share = _SHARES[event.stage]
        fraction = start + share * event.done / max(1, event.total)
        begins = event.stage != self.stage
        if begins:  # where the last event ended
            self.stage, self.drawn, self.started = event.stage, 0, self.now
        self.now = time.perf_counter()
        self.drawn += event.done - before.done if same and before is not None else event.done
        self.latest[place] = event
        self.bar.set_postfix_str(self._describe(event), refresh=False)
        reached = self.fractions.get(place, 0.0)
        if fraction > reached:
            self.done += fraction - reached
            self.fractions[place] = fraction
        # rounding must not carry the bar beyond its end, which tqdm warns of
        self.bar.update(min(100 * self.done, self.bar.total) - self.bar.n)
        if begins:  # tqdm leaves out what comes too soon; on a fast machine that would be whole stages
            self.bar.refresh()

    def _describe(self, event: Progress) -> str:
        text = f"{event.stage} {event.done}/{event.total}"
        if len(self.chunks) > 1:
            text = f"text {event.index + 1}/{len(self.chunks)}, {text}"
        if self.total > len(self.chunks):
            text = f"chunk {event.chunk + 1}/{self.chunks[event.index]}, {text}"
        seconds = self.now - self.started
        rates = {
            "semantic": self.layout.semantic_rate_hz,
            "coarse": self.layout.coarse_rate_hz * self.layout.n_coarse_codebooks,
        }
        if event.stage in rates and seconds > 0 and self.drawn:
            speech = self.drawn / rates[event.stage]
            text += f", {self.drawn / seconds:.0f} tokens/s, real-time factor {seconds / speech:.2f}"
        return text

    def close(self, finished: bool) -> None:
        """End the bar; fill it when everything was done (speech often ends before the longest possible)."""
        if finished:
            self.bar.update(self.bar.total - self.bar.n)
        self.bar.close()
