"""The runner for GPUs: it decodes in bursts that need no host, and does the rest as the eager runner does."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from bark_fast.engine.decode_loop import Capture, DecodeLoop
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.sequence import Sequence
from bark_fast.modules.codec import Codec
from bark_fast.modules.fine import FineGPT
from bark_fast.modules.gpt import GPT


class GraphRunner(EagerRunner):
    """Decodes in bursts over fixed buffers, captured as CUDA graphs on a GPU.

    A sequence whose noise comes from a torch generator is stepped eagerly: the host draws it, one call a token.
    Nothing is captured on a CPU, nor with offloading; the steps are the same.
    """

    def __init__(
        self,
        semantic: GPT,
        coarse: GPT,
        fine: FineGPT,
        codec: Codec,
        max_sequences: int,
        cache_bytes: int | None = None,
        offload_to: torch.device | None = None,
    ) -> None:
        super().__init__(semantic, coarse, fine, codec, max_sequences, cache_bytes, offload_to)
        # a graph knows weights by their addresses, which offloading changes
        self.loops = {
            name: DecodeLoop(name, gpt, self.pools[name], capture=offload_to is None)
            for name, gpt in self.models.items()
        }

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
        return [drawn[sequence] for sequence in sequences]
