"""An utterance as the engine sees it: a coroutine of work, somebody who waits for it, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, cast

from bark_fast.engine.held_noise import HeldNoise
from bark_fast.engine.sequence import Sequence
from bark_fast.ops.noise import NoiseSource
from bark_fast.work import Drawn, IntArray, Stage, Work

T = TypeVar("T")


class Group:
    """Identity of a set of utterances that wait for each other at every `Join`."""


@dataclass
class Utterance(Generic[T]):
    """A coroutine of work, its noise, and its group when it has one."""

    stage: Stage[T]
    noise: NoiseSource
    group: Group | None = None


@dataclass
class Outcome(Generic[T]):
    """How utterance `index` ended: with a result, or with the error it alone met."""

    index: int
    result: T | None = None
    error: Exception | None = None


class Owner(Protocol):
    """Who wants to know how an utterance fares. Called in the midst of a round: must not raise."""

    def saw(self, index: int, work: Work, done: int) -> None:
        """`done` tokens or passes of its current work are there."""
        ...

    def ended(self, outcome: Outcome[Any]) -> None:
        """It ended."""
        ...


@dataclass(eq=False)
class Active(Generic[T]):
    """An utterance under way, or waiting to be: its owner's number for it, its work, its pages.

    answer: what the stage is sent next, an exception included. alone: it was in a batch that failed, and runs
    by itself until it has shown that it was not the reason. branches: what it forked off, which ends with it.
    """

    owner: Owner
    index: int
    stage: Stage[T]
    noise: NoiseSource
    group: Group | None
    work: Work | None = None
    sequence: Sequence | None = None
    answer: Any = None
    alone: bool = False
    branches: list[Branch] = field(default_factory=list)

    @property
    def admitted(self) -> bool:
        """Whether it may hold pages."""
        return self.sequence is not None and self.sequence.admitted

    def settle(self) -> None:
        """Take back noise that was drawn ahead and not used."""
        if isinstance(self.noise, HeldNoise):
            self.noise.settle()

    def saw(self, done: int) -> None:
        """Report `done` units of the current work."""
        if self.work is not None:
            self.owner.saw(self.index, self.work, done)


class Branch:
    """What an utterance forked off: carried forward like one, and known to the utterance alone.

    Its progress is the utterance's; how it ended is what the utterance is sent when it waits for it.
    """

    def __init__(self, parent: Active[Any], stage: Stage[Any], noise: NoiseSource) -> None:
        self.parent = parent
        self.active: Active[Any] = Active(self, parent.index, stage, noise, None)
        self.outcome: Outcome[Any] | None = None

    def saw(self, index: int, work: Work, done: int) -> None:
        """Of `Owner`."""
        self.parent.owner.saw(index, work, done)

    def ended(self, outcome: Outcome[Any]) -> None:
        """Of `Owner`."""
        self.outcome = outcome

    def answer(self, tokens: int | None) -> Drawn | Exception | None:
        """What is sent to who waits for so many tokens, None as long as there are fewer."""
        if self.outcome is not None:
            error = self.outcome.error
            return error if error is not None else Drawn(cast("IntArray", self.outcome.result), ended=True)
        sequence = self.active.sequence
        if tokens is None or sequence is None or len(sequence.drawn) < tokens:
            return None
        return Drawn(sequence.result().tokens, ended=False)
