"""A long text chunk by chunk: each is handed out as soon as it is spoken, while the next one is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from bark_fast.audio import Audio
from bark_fast.chunks import Spoken
from bark_fast.engine.scheduler import Outcome, Utterance, leads
from bark_fast.engine.worker import Worker
from bark_fast.progress import ProgressCallback, progress_of
from bark_fast.stages.utterance import Speech, heard
from bark_fast.work import Emit, FloatArray, Work

News: TypeAlias = "Outcome[Spoken] | tuple[Work, int]"
"""What a worker tells: how the text ended, or its current work and how far that is."""


class Reading:
    """A text that a worker speaks chunk by chunk, for one caller. A context manager that gives it up on exit.

    tell: takes what there is to know, in the worker's thread.
    """

    def __init__(
        self, worker: Worker[Spoken], utterance: Utterance[Spoken], tell: Callable[[News], None]
    ) -> None:
        self._worker, self._utterance, self._tell = worker, utterance, tell
        (self._number,) = worker.numbers(1)

    def __enter__(self) -> None:
        def saw(number: int, work: Work, done: int) -> None:
            self._tell((work, done))

        try:
            self._worker.submit({self._number: self._utterance}, self._tell, saw)
        except BaseException:
            self._worker.cancel([self._number])
            raise

    def __exit__(self, *_: object) -> None:
        self._worker.cancel([self._number])


def settle(worker: Worker[Spoken]) -> None:
    """Wait until what was given up holds nothing, unless that would be to wait for oneself."""
    if not leads() and not worker.runs_here():
        worker.settle()


class Pieces:
    """Makes audio of the news of one text. pause: silence (n,) that all chunks but the first begin with."""

    def __init__(self, sample_rate: int, pause: FloatArray, report: ProgressCallback | None) -> None:
        self._rate, self._pause, self._report = sample_rate, pause, report
        self._first = True

    def of(self, news: News) -> Audio | None:
        """The next chunk's audio, if this is one; None for anything else. Raises what the text met."""
        if isinstance(news, Outcome):
            if news.error is not None:
                raise news.error
            heard(news.result or [])  # says which chunks were left out
            return None
        work, done = news
        if not isinstance(work, Emit):
            event = progress_of(0, work, done)
            if self._report is not None and event is not None:
                self._report(event)
            return None
        speech = work.value
        assert isinstance(speech, Speech)
        samples = speech.samples if self._first else np.concatenate([self._pause, speech.samples])
        self._first = False
        return Audio(samples, self._rate, speech.tokens, speech.timings)
