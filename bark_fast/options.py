"""What a caller may ask of `Bark.generate` and its kin, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias, TypedDict

import numpy as np

from bark_fast.audio import Audio
from bark_fast.config import BarkConfig
from bark_fast.errors import InvalidInput
from bark_fast.numeric import is_number, is_whole
from bark_fast.ops.noise import SEED_BOUND
from bark_fast.progress import ProgressCallback
from bark_fast.randomness import Rng, check_seeds
from bark_fast.sampling import Dialect, SamplingParams, StageDefaults
from bark_fast.stages.request import Options
from bark_fast.voices import Voice
from bark_fast.work import IntArray

VoiceLike: TypeAlias = "str | Path | Mapping[str, Any] | Voice | Audio | None"

MAX_SAMPLES = 1024
"""Samples of one text that one call may ask for."""


class SpeechOptions(TypedDict, total=False):
    """Keyword arguments of one text, as `Bark.agenerate` and the items of `Bark.stream_results` take them."""

    voice: VoiceLike
    seed: SupportsIndex | None
    rng: Rng
    semantic: SamplingParams | None
    coarse: SamplingParams | None
    fine: SamplingParams | None
    max_seconds: float | None
    long_form: bool


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `Bark.generate`, for type checkers."""

    voice: VoiceLike | Sequence[VoiceLike]
    seed: SupportsIndex | Sequence[SupportsIndex] | IntArray | None
    rng: Rng
    semantic: SamplingParams | None
    coarse: SamplingParams | None
    fine: SamplingParams | None
    max_seconds: float | None
    long_form: bool
    progress: bool | ProgressCallback


def stage_options(
    config: BarkConfig,
    dialect: Dialect,
    defaults: StageDefaults,
    given: Mapping[str, SamplingParams | None],
    max_seconds: float | None,
    joined: bool,
    overlap: bool,
) -> Options:
    """What the stages need. given: parameters by stage; what they leave out is taken from `defaults`."""
    for name, params in given.items():
        if params is not None and not isinstance(params, SamplingParams):
            raise InvalidInput(f"{name} is {params!r}; pass a bark_fast.SamplingParams")
    sampling = StageDefaults(
        **{name: (params or SamplingParams()).over(getattr(defaults, name)) for name, params in given.items()}
    )
    for name in ("top_k", "top_p", "min_eos_p"):
        if getattr(sampling.fine, name) is not None:
            raise InvalidInput(
                f"fine.{name} is {getattr(sampling.fine, name)!r}; Bark's fine stage samples by "
                f"temperature alone, leave it None"
            )
    if sampling.coarse.min_eos_p is not None:
        raise InvalidInput(
            f"coarse.min_eos_p is {sampling.coarse.min_eos_p!r}; only the semantic stage has an end token, "
            f"leave it None"
        )
    return Options(
        layout=config.layout,
        dialect=dialect,
        sampling=sampling,
        semantic_vocab_size=config.semantic.output_vocab_size,
        coarse_vocab_size=config.coarse.output_vocab_size,
        max_seconds=check_max_seconds(max_seconds),
        joined=joined,
        overlap=overlap,
    )


def check_flag(name: str, value: object) -> bool:
    """True or False, Python's or numpy's: the string "false" would count as true."""
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidInput(f"{name} is {value!r}; it must be True or False")
    return bool(value)


def check_max_seconds(value: object) -> float | None:
    """A length above 0, or None for as long as it takes."""
    if value is None:
        return None
    if not is_number(value) or value <= 0:
        raise InvalidInput(f"max_seconds is {value!r}; it must be a number above 0, or None")
    return float(value)


def checked_texts(texts: object) -> list[str]:
    """A list of what is each to be a string: whoever encodes one says so of it."""
    if not isinstance(texts, (list, tuple)):
        raise InvalidInput(f"text is a {type(texts).__name__}; pass a string or a list of strings")
    return list(texts)


def samples_of(texts: list[str], n: int, seed: Any) -> tuple[list[str], list[int] | None]:
    """One text n times, with a seed of its own each."""
    if not is_whole(n) or not 1 <= n <= MAX_SAMPLES:
        raise InvalidInput(f"n is {n!r}; it must be an integer from 1 to {MAX_SAMPLES}")
    if len(texts) != 1:
        raise InvalidInput(f"n={n} samples of {len(texts)} texts; give one text, or repeat it in the list")
    first = check_seeds(seed, n)
    return texts * n, [(first + i) % SEED_BOUND for i in range(n)] if isinstance(first, int) else first


def one_each(voice: VoiceLike | Sequence[VoiceLike], count: int) -> list[VoiceLike]:
    """The voice of each of `count` texts."""
    if isinstance(voice, (list, tuple)):
        if len(voice) != count:
            raise InvalidInput(f"{len(voice)} voices for {count} texts; give one for all, or one per text")
        return list(voice)
    return [voice] * count  # type: ignore[list-item]


def check_names(options: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword that no text has, as Python does where it can."""
    unknown = options.keys() - SpeechOptions.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"unexpected {', '.join(sorted(unknown))}; choose {', '.join(SpeechOptions.__annotations__)}"
        )


def check_callback(progress: object) -> None:
    """A function, or None."""
    if progress is not None and not callable(progress):
        raise InvalidInput(f"progress is {progress!r}; pass a function, or None")


def speech_request(request: object, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Text and options of an item of a stream: a string, or a mapping with "text" and options of its own."""
    own = dict(request) if isinstance(request, Mapping) else {"text": request}
    unknown = own.keys() - SpeechOptions.__annotations__.keys() - {"text"}
    if unknown or "text" not in own:
        raise InvalidInput(
            f"a request has the keys {sorted(map(str, own))}; it must have 'text', and may have "
            f"{', '.join(SpeechOptions.__annotations__)}"
        )
    return own.pop("text"), {**options, **own}
