"""Units of work a stage yields and the engine carries out. No device code, no Bark: sequences and arrays."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from bark_fast.sampling import SamplingRule

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Decode:
    """Draw up to `max_new_tokens` after `prompt` under `rule`. Answered with a `Decoded`.

    prompt: (time,) token ids. merged: (m,) ids whose embeddings are added to those of the first m positions
    (Bark's semantic prompt sums text and history). first_step: index of the first draw within the stage,
    which places it in the noise stream and in `rule.windows`.
    """

    model: Literal["semantic", "coarse"]
    prompt: IntArray
    rule: SamplingRule
    max_new_tokens: int
    chunk: int = 0
    first_step: int = 0
    merged: IntArray | None = None
    total_steps: int = 0


@dataclass(frozen=True)
class Decoded:
    """Tokens drawn (time,), EOS left out; `steps` counts the draws, EOS included."""

    tokens: IntArray
    steps: int


@dataclass(frozen=True)
class FinePass:
    """Predict codebook `codebook` of the window `codes` (time, codebooks) from position `start` on.

    Answered with (time - start,) codes. temperature 0.0 is argmax.
    """

    codes: IntArray
    codebook: int
    start: int
    temperature: float
    codebook_size: int
    chunk: int = 0
    first_step: int = 0
    done_passes: int = 0
    total_passes: int = 0


@dataclass(frozen=True)
class Vocode:
    """Turn `codes` (codebooks, time) into a waveform: answered with (time * hop_length,) float32."""

    codes: IntArray
    chunk: int = 0


@dataclass(frozen=True)
class Join:
    """Wait for every utterance of the group; answered with the list of their `value`s, in group order.

    `steps` draws under `rule` were taken since the last join; the engine moves a shared torch generator on
    by what the longest of the group took.
    """

    value: int
    steps: int
    rule: SamplingRule


@dataclass(frozen=True)
class Fork:
    """Begin with another coroutine of the same utterance. Answered at once, with a branch to wait for.

    Noise must not depend on the order of draws. The branch ends with the coroutine that forked it.
    """

    stage: Generator[Any, Any, IntArray]


@dataclass(frozen=True)
class Await:
    """Wait until `branch` has drawn `tokens` tokens, or until it has ended (None). Answered with `Drawn`."""

    branch: object
    tokens: int | None


@dataclass(frozen=True)
class Drawn:
    """The tokens (n,) a branch has drawn so far; its result, if it has `ended`."""

    tokens: IntArray
    ended: bool


Work: TypeAlias = Decode | FinePass | Vocode | Join | Fork | Await
T = TypeVar("T")
Stage: TypeAlias = Generator[Work, Any, T]
"""A coroutine that yields work, is sent each answer, and returns T."""
