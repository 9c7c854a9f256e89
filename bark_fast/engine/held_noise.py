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
    """Consecutive draws of a torch generator, the last of which can be taken back.

    An interrupt may come at any call: a draw that was not held by then is made again, and is the same.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._draws: dict[int, tuple[Tensor, Tensor]] = {}  # of each step, and the generator's state after it
        self._state: Tensor | None = None  # before the first of these
        self._undo: Tensor | None = None  # before the one that is being drawn
        self._next: int | None = None

    def at(self, step: int, draw: Callable[[], Tensor]) -> Tensor:
        """The draw of `step`: one that is held, or the next one."""
        if step not in self._draws:
            if self._next is not None and step != self._next:
                raise GenerationError(
                    f"noise of step {step} was asked for where {self._next} comes next; report this"
                )
            if self._undo is not None:
                self.generator.set_state(self._undo)
            self._undo = self.generator.get_state()
            drawn = draw(), self.generator.get_state()
            if not self._draws:
                self._state = self._undo
            self._draws[step], self._next, self._undo = drawn, step + 1, None
        return self._draws[step][0]

    def used(self, step: int) -> None:
        """The draws up to `step` need not be taken back."""
        for one in [one for one in self._draws if one <= step]:
            self._state = self._draws[one][1]
            del self._draws[one]

    def settle(self) -> None:
        """Set the generator back to where it stood after the last draw used.

        Not where somebody else has drawn from it since: the same numbers would come again.
        """
        before = self._undo
        if self._draws:
            _, after = self._draws[max(self._draws)]
            cut_off = self._undo is not None  # in a draw, which may have moved it
            ours = cut_off or torch.equal(self.generator.get_state(), after)
            before = self._state if ours else None
        if before is not None:
            self.generator.set_state(before)
        self._undo = None
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
            if self._ahead is None:
                drawn = _own(self.source.token(rule, chunk, stream, step))
            else:
                if self._series != (chunk, stream) or not self._ahead.holds(step):
                    self.settle()
                drawn = self.ahead(rule, chunk, stream, step)
            self._held, self._place = drawn, place
        self.used(step)
        return self._held

    def ahead(self, rule: SamplingRule, chunk: int, stream: int, step: int) -> Tensor:
        """Of `DrawnAhead`."""
        if self._ahead is None:
            raise GenerationError(f"{type(self.source).__name__} cannot be drawn ahead; report this")
        if self._held is not None and self._place == (chunk, stream, step):
            return self._held  # of a step that was not taken
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
            self._series = None  # of no steps that could be drawn ahead

            def draw() -> Tensor:
                return _own(self.source.codes(chunk, stream, first_step, rows, width))

            drawn = draw() if self._ahead is None else self._ahead.at(first_step, draw)
            self._held, self._place = drawn, place
        self.used(first_step)
        return self._held

    def mark(self) -> Tensor | None:
        """Where it stands, for `rewind`."""
        self.settle()
        return None if self._ahead is None else self._ahead.generator.get_state()

    def rewind(self, mark: Tensor | None) -> None:
        """Go back to where it stood: what was skipped since is to be skipped again."""
        if self._ahead is not None and mark is not None:
            self._ahead.generator.set_state(mark)

    def skip(self, rule: SamplingRule, steps: int) -> None:
        """As `NoiseSource.skip`."""
        self.settle()
        self.source.skip(rule, steps)


def _own(drawn: Tensor) -> Tensor:
    """The draw without the rest of its storage: one row of a batch must not keep the noise of all."""
    return drawn if drawn.untyped_storage().nbytes() == drawn.nbytes else drawn.clone()
