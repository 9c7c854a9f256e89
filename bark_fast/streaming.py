"""A long text chunk by chunk: each is handed out as soon as it is spoken, while the next one is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from bark_fast.audio import Audio, Tokens
from bark_fast.chunks import Spoken
from bark_fast.engine.replicas import Replicas
from bark_fast.engine.scheduler import Outcome, Utterance, leads
from bark_fast.engine.worker import Worker
from bark_fast.ops.noise import NoiseSource
from bark_fast.progress import ProgressCallback, progress_of
from bark_fast.stages.request import Options
from bark_fast.stages.utterance import Speech, heard, long_form
from bark_fast.work import FloatArray, IntArray, Work

News: TypeAlias = "Outcome[Spoken] | tuple[Work, int]"
"""What a worker tells of a chunk: how it ended, or its current work and how far that is."""


class Reading:
    """A long text that workers speak for one caller, a chunk at a time: one ahead of what was handed out.

    voice: of all chunks; None carries each one's to the next. pause: silence (n,) that all pieces but the first
    begin with.
    """

    def __init__(
        self,
        workers: Worker[Spoken] | Replicas[Spoken],
        chunks: Sequence[IntArray],
        voice: Tokens | None,
        options: Options,
        noise: NoiseSource,
        sample_rate: int,
        pause: FloatArray,
        report: ProgressCallback | None,
    ) -> None:
        self._workers, self._chunks, self._voice, self._options = workers, chunks, voice, options
        self._noise, self._rate, self._pause, self._report = noise, sample_rate, pause, report
        self._spoken: Spoken = []  # without samples
        self._last: Tokens | None = None
        self._under_way: tuple[Worker[Spoken], int] | None = None

    @property
    def done(self) -> bool:
        """Whether all chunks are spoken."""
        return len(self._spoken) == len(self._chunks)

    def go_on(self, tell: Callable[[News], None]) -> None:
        """Begin with the next chunk, if there is one. tell: takes the news of it, in a worker's thread."""
        if self.done:
            return
        place = len(self._spoken)
        voice = self._last if self._voice is None else self._voice
        stage = long_form([self._chunks[place]], voice, self._options, place)
        utterance: Utterance[Spoken] = Utterance(stage, self._noise)
        worker = self._workers.worker_for([utterance])
        (number,) = worker.numbers(1)
        self._under_way = worker, number
        worker.submit({number: utterance}, tell, lambda _, work, done: tell((work, done)))

    def piece(self, news: News, tell: Callable[[News], None]) -> Audio | None:
        """The audio of a chunk, if one has ended and says something; the next one has been begun then.

        Raises what the chunk met; after the last one, EndedTooEarly if none said anything.
        """
        if not isinstance(news, Outcome):
            event = progress_of(0, *news)
            if self._report is not None and event is not None:
                self._report(event)
            return None
        if news.error is not None:
            raise news.error
        (speech,) = news.result or []
        first = self._last is None
        if isinstance(speech, Speech):
            self._last = speech.tokens
            self._spoken.append(Speech(speech.samples[:0].copy(), speech.tokens, speech.timings))
        else:
            self._spoken.append(speech)
        self.go_on(tell)
        if self.done:
            heard(self._spoken)  # says which were left out
        if not isinstance(speech, Speech):
            return None
        samples = speech.samples if first else np.concatenate([self._pause, speech.samples])
        return Audio(samples, self._rate, speech.tokens, speech.timings)

    def give_up(self, wait: bool) -> None:
        """End what is under way. wait: until it holds nothing, unless that would be to wait for oneself."""
        if self._under_way is None:
            return
        worker, number = self._under_way
        worker.cancel([number])
        if wait and not leads() and not worker.runs_here():
            worker.settle()
