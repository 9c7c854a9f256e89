"""Texts on their way through the engine: which utterances speak a text, and what of it has come back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import TypeAlias

from bark_fast.audio import Tokens
from bark_fast.engine.scheduler import Group, Outcome, Utterance
from bark_fast.errors import EndedTooEarly
from bark_fast.ops.noise import NoiseSource, PhiloxNoise
from bark_fast.stages.request import Options
from bark_fast.stages.utterance import Speech, long_form
from bark_fast.work import IntArray

Spoken: TypeAlias = "list[Speech | EndedTooEarly]"
"""What became of each of some chunks."""


def utterances_of(
    chunks: Sequence[IntArray], voice: Tokens | None, options: Options, noise: NoiseSource, group: Group | None
) -> list[Utterance[Spoken]]:
    """What speaks the chunks of a text: one utterance, or one each where no chunk has to wait for another.

    That is so in a given voice, with noise that depends on a chunk's number and not on what was drawn before.
    """
    if len(chunks) == 1 or voice is None or not isinstance(noise, PhiloxNoise):
        return [Utterance(long_form(chunks, voice, options), noise, group)]
    return [
        Utterance(long_form([chunk], voice, options, index), PhiloxNoise(noise.seed, noise.device), group)
        for index, chunk in enumerate(chunks)
    ]


class Texts:
    """Hands a scheduler the utterances of one text after the other, and puts together what they become."""

    def __init__(self, texts: Iterable[list[Utterance[Spoken]]]) -> None:
        self._texts = texts
        self._places: dict[int, tuple[int, int]] = {}  # of an utterance under way: its text, its place there
        self._spoken: dict[int, list[Spoken | None]] = {}  # of a text under way, by utterance

    def utterances(self) -> Iterator[Utterance[Spoken]]:
        """All utterances, numbered as the scheduler does; of a text that has failed, no more."""
        numbers = count()
        for text, parts in enumerate(self._texts):
            self._spoken[text] = [None] * len(parts)
            for place, one in enumerate(parts):
                if text not in self._spoken:
                    break
                self._places[next(numbers)] = (text, place)
                yield one

    def text_of(self, index: int) -> int:
        """Number of the text that an utterance under way is of."""
        return self._places[index][0]

    def take(self, outcome: Outcome[Spoken]) -> Outcome[Spoken] | None:
        """How a text ended, by its number, if it did with this utterance; its first error ends it."""
        text, place = self._places.pop(outcome.index)
        parts = self._spoken.get(text)
        if parts is None:
            return None
        if outcome.error is not None:
            del self._spoken[text]
            return Outcome(text, error=outcome.error)
        parts[place] = outcome.result
        if None in parts:
            return None
        del self._spoken[text]
        return Outcome(text, [one for part in parts for one in part or []])
