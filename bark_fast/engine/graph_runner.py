"""The runner for GPUs: it decodes in bursts that need no host, and does the rest as the eager runner does."""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import cached_property

from bark_fast.engine.decode_loop import Capture, DecodeLoop
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.sequence import Sequence


class GraphRunner(EagerRunner):
    """Decodes in bursts over fixed buffers, captured as CUDA graphs on a GPU.

    A sequence whose noise comes from a torch generator is stepped eagerly: the host draws it, one call a token.
    Nothing is captured on a CPU, nor with offloading; the steps are the same.
    """

    @cached_property
    def loops(self) -> dict[str, DecodeLoop]:
        """One for each model that decodes. A graph knows weights by address, which offloading changes."""
        capture = self.offloader is None
        return {name: DecodeLoop(name, gpt, self.pools[name], capture) for name, gpt in self.models.items()}

    @property
    def captures(self) -> list[Capture]:
        """The graphs captured so far, with the seconds and bytes they took."""
        return [capture for loop in self.loops.values() for capture in loop.captures]

    def _step(self, model: str, sequences: Items[Sequence]) -> list[list[int]]:
        looping = [sequence for sequence in sequences if DecodeLoop.takes(sequence)]
        others = [sequence for sequence in sequences if not DecodeLoop.takes(sequence)]
        drawn: dict[Sequence, list[int]] = {}
        if others:
            drawn.update(zip(others, super()._step(model, others), strict=True))
        if looping:
            drawn.update(zip(looping, self.loops[model].run(looping), strict=True))
            short = [sequence for sequence in looping if not drawn[sequence]]  # of pages for a burst
            if short:
                drawn.update(zip(short, super()._step(model, short), strict=True))
        return [drawn[sequence] for sequence in sequences]
