"""Noise of a torch generator that can be asked for twice, or before it is known to be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bark_fast.errors import GenerationError
from bark_fast.ops.noise import NoiseSource, TorchNoise
from bark_fast.sampling import SamplingRule


@runtime_checkable
class DrawnAhead(Protocol):
    """Noise whose draws can be made ahead, by a runner that does not yet know how many will be used."""

    def ahead(self, rule: SamplingRule, chunk: int, stream: int, step: int) -> Tensor:
        """As `NoiseSource.token`, in the order of steps."""
        ...

    def used(self, step: int) -> None:
        """The draws up to `step` made tokens."""
        ...


class Rewindable:
    """Consecutive draws of a torch generator, the last of which can be taken back."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._draws: dict[int, tuple[Tensor, Tensor]] = {}  # of each step, and the generator's state after it
        self._state: Tensor | None = None  # before the first of these
        self._next: int | None = None

    def at(self, step: int, draw: Callable[[], Tensor]) -> Tensor:
        """The draw of `step`: one that is held, or the next one."""
        if step not in self._draws:
            if self._next is not None and step != self._next:
                raise GenerationError(
                    f"noise of step {step} was asked for where {self._next} comes next; report this"
                )
            if not self._draws:
                self._state = self.generator.get_state()
            self._draws[step] = draw(), self.generator.get_state()
            self._next = step + 1
        return self._draws[step][0]

    def used(self, step: int) -> None:
        """The draws up to `step` need not be taken back."""
        for one in [one for one in self._draws if one <= step]:
            self._state = self._draws.pop(one)[1]

    def settle(self) -> None:
        """Set the generator back to where it stood after the last draw used."""
        if self._draws and self._state is not None:
            self.generator.set_state(self._state)
        self._draws.clear()
        self._next = None

    def holds(self, step: int) -> bool:
        """Whether the draw of `step` was made ahead."""
        return step in self._draws


class HeldNoise:
    """Keeps the last draw of a `TorchNoise`, which moves on with every draw, and gives it again.

    So work that failed or was interrupted can be done again. What was drawn ahead is taken back by `settle`,
    and before anything else is drawn.
    """

    def __init__(self, source: NoiseSource) -> None:
        self.source = source
        self._place: tuple[int, ...] = ()
        self._held: Tensor | None = None
        self._series: tuple[int, int] | None = None
        self._ahead = Rewindable(source.source_generator) if isinstance(source, TorchNoise) else None

    def token(self, rule: SamplingRule, chunk: int, stream: int, step: int) -> Tensor:
        """As `NoiseSource.token`."""
        place = (chunk, stream, step)
        if self._held is None or place != self._place:
            if self._ahead is not None and self._series == (chunk, stream) and self._ahead.holds(step):
                self._held = self.ahead(rule, chunk, stream, step)
                self._ahead.used(step)
            else:
                self.settle()
                self._held = _own(self.source.token(rule, chunk, stream, step))
            self._place = place
        return self._held

    def ahead(self, rule: SamplingRule, chunk: int, stream: int, step: int) -> Tensor:
        """Of `DrawnAhead`."""
        if self._ahead is None:
            raise GenerationError(f"{type(self.source).__name__} cannot be drawn ahead; report this")
        if self._series != (chunk, stream):
            self.settle()
            self._series = (chunk, stream)
        return self._ahead.at(step, lambda: _own(self.source.token(rule, chunk, stream, step)))

    def used(self, step: int) -> None:
        """Of `DrawnAhead`."""
        if self._ahead is not None:
            self._ahead.used(step)

    def settle(self) -> None:
        """Take back what was drawn ahead and not used."""
        if self._ahead is not None:
            self._ahead.settle()

    def codes(self, chunk: int, stream: int, first_step: int, rows: int, width: int) -> Tensor:
        """As `NoiseSource.codes`."""
        place = (chunk, stream, first_step, rows)
        if self._held is None or place != self._place:
            self.settle()
            self._held = _own(self.source.codes(chunk, stream, first_step, rows, width))
            self._place = place
        return self._held

    def skip(self, rule: SamplingRule, steps: int) -> None:
        """As `NoiseSource.skip`."""
        self.settle()
        self.source.skip(rule, steps)


def _own(drawn: Tensor) -> Tensor:
    """The draw without the rest of its storage: one row of a batch must not keep the noise of all."""
    return drawn if drawn.untyped_storage().nbytes() == drawn.nbytes else drawn.clone()
