"""The runner for GPUs: it decodes in bursts that need no host, and does the rest as the eager runner does."""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import cached_property

import torch

from bark_fast.engine.burst import BURST
from bark_fast.engine.capture import Capture, GraphMemory
from bark_fast.engine.decode_loop import DecodeLoop
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.sequence import Sequence
from bark_fast.ops.dispatch import preferred


class GraphRunner(EagerRunner):
    """Decodes in bursts over fixed buffers, captured as CUDA graphs on a GPU.

    Sequences whose noise comes from torch generators have a loop of their own. Nothing is captured on a CPU,
    nor with offloading; the steps are the same. Of models on different devices only those on GPUs burst.
    """

    steps_a_round = 2 * BURST

    @cached_property
    def loops(self) -> dict[str, tuple[DecodeLoop, DecodeLoop]]:
        """Of each model that decodes. A graph knows weights by address, which offloading changes."""
        memory: dict[torch.device, GraphMemory] = {}  # one for all graphs of a device
        if self.offloader is None:
            gpus = {pool.device for pool in self.pools.values() if pool.device.type == "cuda"}
            memory = {device: GraphMemory(device) for device in gpus}
        return {
            name: (
                DecodeLoop(name, gpt, pool, memory.get(pool.device), given=False),
                DecodeLoop(name, gpt, pool, memory.get(pool.device), given=True),
            )
            for (name, gpt), pool in zip(self.models.items(), self.pools.values(), strict=True)
            if not memory or pool.device in memory
        }

    @property
    def captures(self) -> list[Capture]:
        """The graphs captured so far, with the seconds and bytes they took."""
        return [capture for loops in self.loops.values() for loop in loops for capture in loop.captures]

    def fits(self, model: str, sequences: Items[Sequence], rows: Items[int]) -> bool:
        wanted = [max(0, count - one.room) for one, count in zip(sequences, rows, strict=True)]
        return super().fits(model, sequences, wanted)

    def _step(self, model: str, sequences: Items[Sequence]) -> list[list[int]]:
        # a captured graph is of Triton's kernels
        loops = () if preferred() == "torch" else self.loops.get(model, ())
        groups = [(loop, [one for one in sequences if loop.takes(one)]) for loop in loops]
        looping = {one for _, group in groups for one in group}
        drawn: dict[Sequence, list[int]] = {}
        self._plain_step(model, [one for one in sequences if one not in looping], drawn)
        for place, (loop, group) in enumerate(groups, 1):
            if group:
                later = [one for _, others in groups[place:] for one in others]
                drawn.update(zip(group, loop.run(group, later), strict=True))
                # those for whose burst there are no pages
                self._plain_step(model, [one for one in group if not drawn[one]], drawn)
        return [drawn[sequence] for sequence in sequences]

    def _plain_step(self, model: str, sequences: list[Sequence], drawn: dict[Sequence, list[int]]) -> None:
        """One step, operation by operation, which writes right behind what is cached."""
        for one in sequences:
            one.give_room_back()
        if sequences:
            drawn.update(zip(sequences, super()._step(model, sequences), strict=True))
