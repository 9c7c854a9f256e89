"""A thread that works on utterances handed over from any other, for callers that must not block."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from threading import Lock, Thread
from typing import Generic, TypeVar

from bark_fast.engine.scheduler import Observer, Outcome, Scheduler, Session, Utterance
from bark_fast.errors import GenerationError
from bark_fast.work import Work

T = TypeVar("T")


class Worker(Generic[T]):
    """Its thread starts with the first utterance and ends with the last, so that nothing has to be closed."""

    def __init__(self, scheduler: Scheduler[T]) -> None:
        self._scheduler = scheduler
        self._lock = Lock()
        self._thread: Thread | None = None
        self._numbers = count()
        self._orders: list[Callable[[Session[T]], None]] = []
        self._callers: dict[int, tuple[Callable[[Outcome[T]], None], Observer | None]] = {}

    def submit(
        self, utterance: Utterance[T], ended: Callable[[Outcome[T]], None], observer: Observer | None = None
    ) -> int:
        """Begin with an utterance as soon as there is a place; returns its number, for `cancel`.

        ended, observer: called in the worker's thread; they must not raise.
        """
        number = next(self._numbers)
        with self._lock:
            self._callers[number] = (ended, observer)
            self._orders.append(lambda session: session.add([(number, utterance)]))
            if self._thread is None:
                self._thread = Thread(target=self._serve, name="bark-fast")
                self._thread.start()
        return number

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

        number = self.submit(utterance, in_loop(settle), None if observer is None else in_loop(observe))
        try:
            return await ended
        finally:
            self.cancel(number)

    def cancel(self, number: int) -> None:
        """Give up an utterance; nothing happens if it has ended. Its `ended` is not called any more."""
        with self._lock:
            if self._callers.pop(number, None) is not None:
                self._orders.append(lambda session: session.cancel(number))

    def _serve(self) -> None:
        try:
            with Session(self._scheduler, self._saw) as session:
                while self._go_on(session):
                    for outcome in session.wait():
                        self._report(outcome)
        except BaseException as error:
            with self._lock:
                left, self._thread, self._orders = list(self._callers), None, []
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
        for order in orders:
            order(session)
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
