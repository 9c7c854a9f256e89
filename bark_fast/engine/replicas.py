"""Several copies of one model, a scheduler and a thread each, that share the utterances of all callers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from queue import SimpleQueue
from typing import Generic, TypeAlias, TypeVar

from bark_fast.engine.scheduler import Observer, Outcome, Scheduler, Utterance, leads, parties
from bark_fast.engine.worker import Worker
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.work import Work

T = TypeVar("T")
News: TypeAlias = "tuple[Worker[T], Outcome[T] | tuple[int, Work, int]]"


class Replicas(Generic[T]):
    """Does what a `Scheduler` and its `Worker` do, on whichever replica has the fewest utterances under way.

    Members of a group stay together. The replicas work while there is something to do, also while a caller
    does not wait for results; whoever has ended is told in the caller's own thread.
    """

    def __init__(self, schedulers: Items[Scheduler[T]]) -> None:
        self.schedulers = list(schedulers)
        self.workers = [Worker(one) for one in self.schedulers]

    def run(
        self, utterances: Iterable[Utterance[T]], observer: Observer | None = None, limit: int | None = None
    ) -> Iterator[Outcome[T]]:
        """As `Scheduler.run`. limit: of all replicas together."""
        if limit is None:
            limit = sum(one.rounds.limits.utterances for one in self.schedulers)
        source = parties(enumerate(utterances))
        news: SimpleQueue[News[T]] = SimpleQueue()
        under_way: dict[tuple[Worker[T], int], int] = {}
        try:
            while True:
                while len(under_way) < limit and (party := next(source, None)):
                    worker = self.worker_for([one for _, one in party])
                    numbers = worker.numbers(len(party))
                    # noted before anything begins: an interrupt in between leaves nothing behind
                    under_way.update(((worker, n), index) for n, (index, _) in zip(numbers, party, strict=True))
                    _submit(worker, dict(zip(numbers, (one for _, one in party), strict=True)), news, observer)
                if not under_way:
                    return
                worker, what = news.get()
                if isinstance(what, Outcome):
                    yield replace(what, index=under_way.pop((worker, what.index)))
                elif observer is not None:
                    number, work, done = what
                    observer(under_way[worker, number], work, done)
        finally:
            for worker in self.workers:
                worker.cancel([number for one, number in under_way if one is worker])
            # an iterator that was forgotten may be collected in a worker's thread, which cannot wait for itself
            if not leads() and not any(worker.runs_here() for worker in self.workers):
                for worker in self.workers:
                    worker.settle()

    async def outcome(self, utterance: Utterance[T], observer: Observer | None = None) -> Outcome[T]:
        """As `Worker.outcome`."""
        return await self.worker_for([utterance]).outcome(utterance, observer)

    def worker_for(self, party: Items[Utterance[T]]) -> Worker[T]:
        """The least busy, the first of several; noise that any device can draw is drawn on its own."""
        place = min(range(len(self.workers)), key=lambda place: self.workers[place].under_way)
        for one in party:
            if isinstance(one.noise, PhiloxNoise):
                one.noise.device = self.schedulers[place].rounds.runner.device
        return self.workers[place]


def _submit(
    worker: Worker[T], party: dict[int, Utterance[T]], news: SimpleQueue[News[T]], observer: Observer | None
) -> None:
    def saw(number: int, work: Work, done: int) -> None:
        news.put((worker, (number, work, done)))

    def ended(outcome: Outcome[T]) -> None:
        news.put((worker, outcome))

    worker.submit(party, ended, None if observer is None else saw)
