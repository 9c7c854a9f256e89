"""Sampling parameters: what a caller may ask for, and the complete rule a stage hands to the engine.

Two dialects exist. suno's `bark` filters by top-p on untempered logits, then top-k, then divides by the
temperature, and ends at EOS when EOS is drawn or its probability reaches `min_eos_p`. Hugging Face
applies the EOS rule first (before the temperature), then temperature, top-k and top-p in that order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Literal

from bark_fast.errors import InvalidInput
from bark_fast.numeric import is_number, is_whole

Dialect = Literal["suno", "hf"]
DIALECTS: tuple[Dialect, ...] = ("suno", "hf")
HOTTEST = 1e38
"""Highest temperature. Logits are divided in fp32, where one beyond its range is infinite and gives NaN."""


class Inherit(Enum):
    """Marks a parameter that was not given: the checkpoint's own default stays in force."""

    CHECKPOINT = "checkpoint default"

    def __repr__(self) -> str:
        return "INHERIT"


INHERIT = Inherit.CHECKPOINT


def _number(name: str, value: object, bound: str) -> float:
    if not is_number(value):
        raise InvalidInput(f"{name} is {value!r}; it must be {bound}, or None")
    return float(value)


@dataclass(frozen=True)
class SamplingParams:
    """How one stage draws its tokens. A parameter left out keeps the checkpoint's default.

    temperature: > 0 (1e-6 to 1e38) divides the logits; None or 0 is greedy (argmax).
    top_k: keep the k highest logits (ties kept); None keeps all.
    top_p: keep the smallest set whose probability reaches top_p, 0 < top_p <= 1; None keeps all.
    min_eos_p: semantic stage only, 0 < min_eos_p <= 1: end once EOS is at least this likely; None never forces.
    """

    temperature: float | Inherit | None = INHERIT
    top_k: int | Inherit | None = INHERIT
    top_p: float | Inherit | None = INHERIT
    min_eos_p: float | Inherit | None = INHERIT

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Inherit) and self.temperature is not None:
            if _number("temperature", self.temperature, "a number of at least 0 (0 is greedy)") < 0:
                raise InvalidInput(f"temperature is {self.temperature!r}; it must be at least 0 (0 is greedy)")
            if 0 < self.temperature < 1e-6:
                raise InvalidInput(f"temperature is {self.temperature!r}; below 1e-6 use 0, which is greedy")
            if self.temperature > HOTTEST:
                raise InvalidInput(f"temperature is {self.temperature!r}; it must be at most {HOTTEST:g}")
        if not isinstance(self.top_k, Inherit) and self.top_k is not None:
            if not is_whole(self.top_k) or self.top_k < 1:
                raise InvalidInput(f"top_k is {self.top_k!r}; it must be an integer of at least 1, or None")
        for name in ("top_p", "min_eos_p"):
            value = getattr(self, name)
            if not isinstance(value, Inherit) and value is not None:
                if not 0 < _number(name, value, "a number above 0 and at most 1") <= 1:
                    raise InvalidInput(f"{name} is {value!r}; it must be above 0 and at most 1, or None")

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """These parameters, with those left out taken from `defaults`."""
        chosen: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            chosen[f.name] = getattr(defaults, f.name) if isinstance(value, Inherit) else value
        return SamplingParams(**chosen)


@dataclass(frozen=True)
class StageDefaults:
    """The three stages' parameters when the caller gives none."""

    semantic: SamplingParams
    coarse: SamplingParams
    fine: SamplingParams


def suno_defaults() -> StageDefaults:
    """Defaults of `bark.generate_audio` (suno `api.py`)."""
    return StageDefaults(
        semantic=SamplingParams(temperature=0.7, top_k=None, top_p=None, min_eos_p=0.2),
        coarse=SamplingParams(temperature=0.7, top_k=None, top_p=None, min_eos_p=None),
        fine=SamplingParams(temperature=0.5, top_k=None, top_p=None, min_eos_p=None),
    )


@dataclass(frozen=True)
class SamplingRule:
    """Everything the engine needs to draw one token after another.

    windows: half-open ranges of output rows; step i draws from `windows[i % len(windows)]`.
    vocab_size: width of the full head, over which Hugging Face draws its noise.
    eos_token: drawing this token ends the sequence; it must be the last row of its window.
    temperature: 0.0 is greedy.
    """

    dialect: Dialect
    windows: tuple[tuple[int, int], ...]
    vocab_size: int
    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    min_eos_p: float | None = None
    eos_token: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def window(self, step: int) -> tuple[int, int]:
        """Rows (low, high) of the head that may be drawn at `step`."""
        return self.windows[step % len(self.windows)]


def make_rule(
    params: SamplingParams,
    dialect: Dialect,
    windows: tuple[tuple[int, int], ...],
    vocab_size: int,
    eos_token: int | None = None,
) -> SamplingRule:
    """The rule for fully given `params` (nothing left to inherit)."""
    values = {f.name: getattr(params, f.name) for f in fields(params)}
    missing = [name for name, value in values.items() if isinstance(value, Inherit)]
    if missing:
        raise InvalidInput(
            f"sampling parameters {', '.join(missing)} have no value; call .over(defaults) first"
        )
    return SamplingRule(
        dialect=dialect,
        windows=windows,
        vocab_size=vocab_size,
        temperature=float(values["temperature"] or 0.0),
        top_k=None if values["top_k"] is None else int(values["top_k"]),
        top_p=values["top_p"],
        min_eos_p=values["min_eos_p"] if eos_token is not None else None,
        eos_token=eos_token,
    )
