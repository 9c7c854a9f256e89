"""A thread that works on utterances handed over from any other, for callers that must not block."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import count, groupby
from threading import Condition, RLock, Thread, current_thread
from typing import Generic, TypeVar

from bark_fast.engine.scheduler import Observer, Outcome, Scheduler, Session, Utterance
from bark_fast.errors import GenerationError
from bark_fast.work import Work

T = TypeVar("T")


class Worker(Generic[T]):
    """Its thread starts with the first utterance and ends with the last, so that nothing has to be closed.

    The interpreter waits for it at its end, whoever started it: a daemon would be ended in the midst of C++.
    """

    def __init__(self, scheduler: Scheduler[T]) -> None:
        self._scheduler = scheduler
        # reentrant: an iterator may be collected, and give up, anywhere; entered in C, as the scheduler's
        self._lock = RLock()
        self._changed = Condition(self._lock)
        self._thread: Thread | None = None
        self._numbers = count()
        self._orders: list[Mapping[int, Utterance[T]] | int] = []  # parties to begin with, numbers to give up
        self._ordered = self._carried_out = 0
        self._callers: dict[int, tuple[Callable[[Outcome[T]], None], Observer | None]] = {}

    @property
    def under_way(self) -> int:
        """Utterances handed over that have not ended."""
        return len(self._callers)

    def worker_for(self, party: Iterable[Utterance[T]]) -> Worker[T]:
        """Itself; of replicas, the one that is to speak them."""
        return self

    def numbers(self, how_many: int) -> list[int]:
        """Numbers for as many utterances, for `submit` and `cancel`; none is given twice."""
        return [next(self._numbers) for _ in range(how_many)]

    def submit(
        self,
        party: Mapping[int, Utterance[T]],
        ended: Callable[[Outcome[T]], None],
        observer: Observer | None = None,
    ) -> None:
        """Begin with an utterance, or all members of a group, by number, as soon as there is a place.

        ended, observer: called in the worker's thread; they must not raise.
        """
        with self._lock:
            self._callers.update(dict.fromkeys(party, (ended, observer)))
            self._order(party)
            if self._thread is None:
                self._thread = Thread(target=self._serve, name="bark-fast", daemon=False)
                try:
                    self._thread.start()
                except BaseException:  # the system has no more, or an interrupt came first
                    if not self._thread.is_alive():
                        self._thread = None
                    raise

    async def outcome(self, utterance: Utterance[T], observer: Observer | None = None) -> Outcome[T]:
        """How the utterance ended. Cancelling who awaits this gives it up.

        observer: called in the event loop; an exception of it ends the utterance.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Outcome[T]] = loop.create_future()

        def settle(outcome: Outcome[T]) -> None:
            if not ended.done():
                ended.set_result(outcome)

        def observe(number: int, work: Work, done: int) -> None:
            try:
                if observer is not None and not ended.done():
                    observer(0, work, done)
            except Exception as error:
                settle(Outcome(0, error=error))

        def in_loop(call: Callable[..., None]) -> Callable[..., None]:
            def later(*arguments: object) -> None:
                with suppress(RuntimeError):  # the loop may be closed by now
                    loop.call_soon_threadsafe(call, *arguments)

            return later

        (number,) = self.numbers(1)
        try:
            self.submit({number: utterance}, in_loop(settle), None if observer is None else in_loop(observe))
            return await ended
        finally:
            self.cancel([number])

    def cancel(self, numbers: Iterable[int]) -> None:
        """Give up utterances; nothing happens if they have ended. Their `ended` is not called any more."""
        with self._lock:
            for number in numbers:
                if self._callers.pop(number, None) is not None:
                    self._order(number)

    def settle(self) -> None:
        """Wait until what was given up before this call holds nothing any more."""
        with self._lock:
            ordered = self._ordered
            self._changed.wait_for(lambda: self._carried_out >= ordered or self._thread is None)

    def runs_here(self) -> bool:
        """Whether this is called from the worker's own thread."""
        return current_thread() is self._thread

    def _order(self, order: Mapping[int, Utterance[T]] | int) -> None:
        self._orders.append(order)
        self._ordered += 1

    def _serve(self) -> None:
        try:
            with Session(self._scheduler, self._saw) as session:
                while self._go_on(session):
                    for outcome in session.wait():
                        self._report(outcome)
        except BaseException as error:
            with self._lock:
                left, self._thread, self._orders = list(self._callers), None, []
                self._carried_out = self._ordered
                self._changed.notify_all()
            for number in left:
                self._report(Outcome(number, error=GenerationError(f"the engine failed: {error!r}")))
            raise

    def _go_on(self, session: Session[T]) -> bool:
        """Carry out the orders; say whether there is work. Who orders after a no starts a new thread."""
        with self._lock:
            orders, self._orders = self._orders, []
            if not orders and not session.pending:
                self._thread = None
                return False
        for giving_up, some in groupby(orders, lambda order: isinstance(order, int)):
            if giving_up:
                session.cancel([order for order in some if isinstance(order, int)])
            else:
                for party in some:
                    assert not isinstance(party, int)
                    session.add(list(party.items()))
        with self._lock:
            self._carried_out += len(orders)
            self._changed.notify_all()
        return True

    def _saw(self, number: int, work: Work, done: int) -> None:
        caller = self._callers.get(number)
        if caller is not None and caller[1] is not None:
            caller[1](number, work, done)

    def _report(self, outcome: Outcome[T]) -> None:
        with self._lock:
            caller = self._callers.pop(outcome.index, None)
        if caller is not None:
            caller[0](outcome)
