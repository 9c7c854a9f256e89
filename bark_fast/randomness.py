"""From the caller's `seed` and `rng` to one noise source per text."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterator, Sequence
from typing import Literal, SupportsIndex, TypeAlias

import numpy as np
import torch

from bark_fast.errors import InvalidInput
from bark_fast.ops.noise import SEED_BOUND, NoiseSource, PhiloxNoise, TorchNoise
from bark_fast.sampling import Dialect
from bark_fast.work import IntArray

Rng: TypeAlias = Literal["philox", "torch"]


def check_rng(rng: object) -> None:
    """Raise InvalidInput for an unknown source of randomness."""
    if rng not in ("philox", "torch"):
        raise InvalidInput(f"rng is {rng!r}; choose 'philox' or 'torch'")


def check_seeds(
    seed: SupportsIndex | Sequence[SupportsIndex] | IntArray | None, count: int
) -> int | list[int] | None:
    """`seed` as plain integers, checked: one, a list with one per text, or None."""
    if seed is None:
        return None
    if isinstance(seed, np.ndarray) and seed.ndim:
        seed = seed.tolist()
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        if len(seed) != count:
            raise InvalidInput(f"{len(seed)} seeds for {count} texts; give one for all, or one per text")
        return [_seed(one) for one in seed]
    return _seed(seed)


def make_noise(
    seeds: int | list[int] | None,
    rng: Rng,
    device: torch.device,
    dialect: Dialect,
    count: int,
    joined: bool,
) -> Iterator[NoiseSource]:
    """A noise source for each of `count` texts, made when its turn comes: each soon holds some noise.

    joined: the texts are rows of one Hugging Face batch on one generator.
    """
    each = seeds if isinstance(seeds, list) else [seeds] * count
    for row, one in enumerate(each):
        if rng == "philox":
            yield PhiloxNoise(secrets.randbits(64) if one is None else one, device)
        else:
            # without a seed, go on with torch's global generator
            generator = None if one is None else torch.Generator(device).manual_seed(one)
            yield TorchNoise(generator, device, dialect, *((count, row) if joined else ()))


def _seed(seed: object) -> int:
    try:
        value = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        value = -1
    if isinstance(seed, bool) or not 0 <= value < SEED_BOUND:
        raise InvalidInput(f"seed is {seed!r}; it must be an integer from 0 to 2**64 - 1")
    return value
