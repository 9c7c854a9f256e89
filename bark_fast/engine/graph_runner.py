"""The runner for GPUs: it decodes in bursts that need no host, and does the rest as the eager runner does."""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import cached_property

from bark_fast.engine.burst import Capture
from bark_fast.engine.decode_loop import DecodeLoop
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.sequence import Sequence


class GraphRunner(EagerRunner):
    """Decodes in bursts over fixed buffers, captured as CUDA graphs on a GPU.

    Sequences whose noise comes from torch generators have a loop of their own. Nothing is captured on a CPU,
    nor with offloading; the steps are the same.
    """

    @cached_property
    def loops(self) -> dict[str, tuple[DecodeLoop, DecodeLoop]]:
        """Of each model that decodes. A graph knows weights by address, which offloading changes."""
        capture = self.offloader is None
        return {
            name: (
                DecodeLoop(name, gpt, self.pools[name], capture, given=False),
                DecodeLoop(name, gpt, self.pools[name], capture, given=True),
            )
            for name, gpt in self.models.items()
        }

    @property
    def captures(self) -> list[Capture]:
        """The graphs captured so far, with the seconds and bytes they took."""
        return [capture for loops in self.loops.values() for loop in loops for capture in loop.captures]

    def _step(self, model: str, sequences: Items[Sequence]) -> list[list[int]]:
        groups = [(loop, [one for one in sequences if loop.takes(one)]) for loop in self.loops[model]]
        looping = {sequence for _, group in groups for sequence in group}
        others = [sequence for sequence in sequences if sequence not in looping]
        drawn: dict[Sequence, list[int]] = {}
        if others:
            drawn.update(zip(others, super()._step(model, others), strict=True))
        for loop, group in groups:
            if group:
                drawn.update(zip(group, loop.run(group), strict=True))
        short = [sequence for sequence in looping if not drawn[sequence]]  # of pages for a burst
        if short:
            drawn.update(zip(short, super()._step(model, short), strict=True))
        return [drawn[sequence] for sequence in sequences]
