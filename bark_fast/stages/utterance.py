"""One utterance from text ids to speech: semantic, coarse, fine, codec, joined by `yield from`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from bark_fast.audio import Tokens
from bark_fast.errors import EndedTooEarly
from bark_fast.stages.coarse import coarse, frames_for
from bark_fast.stages.fine import fine
from bark_fast.stages.request import Options
from bark_fast.stages.semantic import semantic
from bark_fast.work import Await, Drawn, FloatArray, Fork, IntArray, Stage, Vocode


@dataclass(frozen=True)
class Speech:
    """Samples (n,), the tokens they were made from, and wall seconds by stage (waiting for others included)."""

    samples: FloatArray
    tokens: Tokens
    timings: dict[str, float]


def utterance(text: IntArray, history: Tokens | None, options: Options, chunk: int = 0) -> Stage[Speech]:
    """Speak text ids (t,), t <= 256, in the voice of `history`."""
    timings: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        timings[stage], clock = now - clock, now

    def first() -> Stage[IntArray]:
        tokens = yield from semantic(text, history, options.sampling.semantic, options, chunk)
        lap("semantic")
        return tokens

    if options.overlap:
        branch = yield Fork(first())
        coarse_codes = yield from coarse(text[:0], history, options.sampling.coarse, options, chunk, branch)
        drawn: Drawn = yield Await(branch, None)
        semantic_tokens, frames = drawn.tokens, _frames(drawn.tokens, options)
    else:
        semantic_tokens = yield from first()
        frames = _frames(semantic_tokens, options)
        coarse_codes = yield from coarse(semantic_tokens, history, options.sampling.coarse, options, chunk)
    lap("coarse")
    fine_codes = yield from fine(coarse_codes, history, options.sampling.fine, options, chunk)
    lap("fine")
    # in a joined batch all rows run to the longest one's length: keep this row's own frames
    tokens = Tokens(semantic_tokens, coarse_codes[:, :frames].copy(), fine_codes[:, :frames].copy())
    samples: FloatArray = yield Vocode(tokens.fine, chunk)
    lap("codec")
    return Speech(samples, tokens, timings)


def _frames(semantic_tokens: IntArray, options: Options) -> int:
    frames = frames_for(len(semantic_tokens), options.layout, options.dialect)
    if frames == 0:
        raise EndedTooEarly(
            f"the model ended after {len(semantic_tokens)} semantic tokens, too few for one frame of audio; "
            f"try another seed, a higher min_eos_p or more max_seconds"
        )
    return frames


def long_form(
    chunks: Sequence[IntArray], voice: Tokens | None, options: Options, first: int = 0
) -> Stage[list[Speech | EndedTooEarly]]:
    """Speak chunk after chunk in one voice: the given one, else each chunk carries its own to the next.

    Where the model ends a chunk at once, the reason stands in its place. first: the first one's number within
    its text.
    """
    spoken: list[Speech | EndedTooEarly] = []
    last: Tokens | None = None
    for index, text in enumerate(chunks, first):
        try:
            speech = yield from utterance(text, last if voice is None else voice, options, index)
        except EndedTooEarly as error:
            spoken.append(error)
        else:
            spoken.append(speech)
            last = speech.tokens
    return spoken


def heard(spoken: Sequence[Speech | EndedTooEarly], which: str = "") -> list[Speech]:
    """The chunks of a text that say something; a warning says which do not. Raises EndedTooEarly if none does.

    which: the text's name among others, for that.
    """
    kept = [one for one in spoken if isinstance(one, Speech)]
    for index, reason in enumerate(spoken):
        if isinstance(reason, Speech):
            continue
        if not kept:
            raise reason
        said = f"{which}{': ' if which else ''}chunk {index + 1} of {len(spoken)} was left out: {reason}"
        # with a registry of its own, or Python would not say the same of another text, or another time
        warnings.warn_explicit(said, RuntimeWarning, __file__, 0, __name__, registry={})
    return kept
