"""Callers' utterances on one model: each caller waits for its own, and whoever waits works for all."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from threading import Condition, RLock, get_ident
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from bark_fast.engine.rounds import Limits, Rounds
from bark_fast.engine.runner import Runner
from bark_fast.engine.utterance import Group, Outcome, Utterance
from bark_fast.errors import GenerationError
from bark_fast.work import Work

__all__ = ["Group", "Limits", "Observer", "Outcome", "Scheduler", "Session", "Utterance", "parties"]

T = TypeVar("T")
Observer = Callable[[int, Work, int], None]
"""Called with (utterance index, its current work, tokens drawn or passes done within it)."""


WAKE_UP = 1.0
"""Seconds after which who waits looks for itself: an interrupt may come before others are notified."""


_LEADERS: set[int] = set()
"""Threads that carry out a round, of whichever scheduler."""


def leads() -> bool:
    """Whether this thread carries out a round: it must not wait for another's, whose thread may wait for it."""
    return get_ident() in _LEADERS


class Scheduler(Generic[T]):
    """Shares one runner among the callers of all threads; their utterances go on in the same batches.

    There is no thread of its own: of the callers that wait for results, one carries out the next round for
    everybody. An error of one utterance ends that one; a caller that leaves takes its own utterances along.
    """

    def __init__(self, runner: Runner, max_batch: int = 16, limits: Limits | None = None) -> None:
        self.rounds: Rounds[T] = Rounds(runner, limits or Limits.of(runner, max_batch))
        self._lock = RLock()  # entered in C: no interrupt comes between taking it and the body of its `with`
        self._turn = Condition(self._lock)
        self._leader: int | None = None
        self._letting_go = False
        self._leaving: deque[tuple[Session[T], frozenset[int] | None]] = deque()
        self._process = os.getpid()

    def run(
        self, utterances: Iterable[Utterance[T]], observer: Observer | None = None, limit: int | None = None
    ) -> Iterator[Outcome[T]]:
        """Yield each utterance's outcome as it ends; indices count the iterable.

        The iterable is asked for more as places become free: `limit` utterances (by default as many as can be
        under way) are in memory. observer: called from this thread, between rounds. Closing the iterator, or
        an exception from the iterable or the observer, gives back everything held.
        """
        limit = self.rounds.limits.utterances if limit is None else limit
        source = parties(enumerate(utterances))
        with Session(self, observer) as session:
            while True:
                while session.pending < limit:
                    party = next(source, None)
                    if party is None:
                        break
                    session.add(party)
                if not session.pending:
                    return
                yield from session.wait()

    def _work(self) -> None:
        """Carry out a round, or wait while another thread does."""
        leading = False
        try:
            with self._lock:
                if self._leader == get_ident():
                    raise GenerationError("a result was waited for from inside the work on it; wait outside")
                if self._leader is not None:
                    self._turn.wait(WAKE_UP)
                    return
                leading = True
                self._leader = get_ident()
                _LEADERS.add(self._leader)
            self.rounds.round()
        finally:
            if leading:
                with self._lock:
                    self._leader = None
                    try:
                        self._let_go()
                    finally:
                        _LEADERS.discard(get_ident())
                        self._turn.notify_all()

    def _enter(self, session: Session[T], party: list[tuple[int, Utterance[T]]]) -> None:
        if self._process != os.getpid() and torch.get_num_threads() > 1:
            raise GenerationError(
                f"the model was loaded by process {self._process}, and this is its fork {os.getpid()}, where "
                f"OpenMP's threads are missing and the first step would never end: load the model in each "
                f"process, or call torch.set_num_threads(1) in the fork first"
            )
        with self._lock:  # not while another session's are dropped from the queue
            self.rounds.enter(session, party)

    def _drop(self, session: Session[T], indices: frozenset[int] | None = None) -> None:
        """End a session's utterances, or these, and give back what they hold, before this returns."""
        leaving = (session, indices)
        with self._lock:
            self._leaving.append(leaving)
            while leaving in self._leaving:
                if self._letting_go:  # a forgotten iterator, collected in the midst of it
                    return
                if self._leader is None:
                    self._let_go()
                elif leads():  # collected in a round, of this model or another: ours are let go of all the same
                    return
                else:  # the one at work lets go of everybody who leaves before it begins another round
                    self._turn.wait(WAKE_UP)

    def _let_go(self) -> None:
        self._letting_go = True  # by this thread, which has the lock
        try:
            while self._leaving:
                self.rounds.drop(*self._leaving[0])
                self._leaving.popleft()  # after it: an interrupt may come at any time, and twice does no harm
        finally:
            self._letting_go = False


class Session(Generic[T]):
    """One caller's utterances. Used by one thread at a time; a context manager that ends them all on exit."""

    def __init__(self, scheduler: Scheduler[T], observer: Observer | None = None) -> None:
        self._scheduler, self._observer = scheduler, observer
        self._events: deque[tuple[int, Work, int]] = deque()
        self._outcomes: deque[Outcome[T]] = deque()
        self._under_way: set[int] = set()

    @property
    def pending(self) -> int:
        """Utterances added whose outcome was not yet returned."""
        return len(self._under_way)

    def add(self, party: list[tuple[int, Utterance[T]]]) -> None:
        """Queue one utterance, or all members of a group, each under an index of the caller's choice."""
        self._under_way.update(index for index, _ in party)
        self._scheduler._enter(self, party)

    def wait(self) -> list[Outcome[T]]:
        """Work for a round, or wait while another caller does; report progress; return who ended."""
        if not self._outcomes and self._under_way:
            self._scheduler._work()
        count = len(self._outcomes)  # whose events are all there; another thread may add to both now
        while self._events and self._observer is not None:
            self._observer(*self._events.popleft())
        ended = [self._outcomes.popleft() for _ in range(count)]
        self._under_way.difference_update(outcome.index for outcome in ended)
        return ended

    def cancel(self, indices: Collection[int]) -> None:
        """End utterances, without an outcome."""
        self._scheduler._drop(self, frozenset(indices))
        self._under_way.difference_update(indices)

    def saw(self, index: int, work: Work, done: int) -> None:
        """Of `Owner`."""
        if self._observer is not None:
            self._events.append((index, work, done))

    def ended(self, outcome: Outcome[Any]) -> None:
        """Of `Owner`."""
        self._outcomes.append(outcome)

    def __enter__(self) -> Session[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scheduler._drop(self)


def parties(utterances: Iterable[tuple[int, Utterance[T]]]) -> Iterator[list[tuple[int, Utterance[T]]]]:
    """One utterance after the other; members of a group, which follow each other, at once."""
    party: list[tuple[int, Utterance[T]]] = []
    for index, one in utterances:
        if party and party[0][1].group is not one.group:
            yield party
            party = []
        party.append((index, one))
        if one.group is None:
            yield party
            party = []
    if party:
        yield party
