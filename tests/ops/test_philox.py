"""Philox in Triton: the published words, the reference's variates, and tokens as frequent as they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bark_fast.ops.noise import PhiloxNoise, philox4x32
from bark_fast.ops.rule_rows import pack_rules, place_row
from bark_fast.sampling import SamplingRule

triton = pytest.importorskip("triton")
philox = pytest.importorskip("bark_fast.kernels.philox")
kernels = pytest.importorskip("bark_fast.kernels.sampling")
tl = triton.language


@pytest.fixture(autouse=True)
def interpreted(request: pytest.FixtureRequest) -> None:
    """Triton runs on CPU tensors only interpreted, where there is no GPU."""
    if torch.cuda.is_available() and not request.node.get_closest_marker("gpu"):
        pytest.skip("Triton runs on CPU tensors only interpreted, where there is no GPU")


@triton.jit
def _words_kernel(counters, out, key0, key1, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    words = philox.philox_words(
        tl.load(counters + at).to(tl.uint32), tl.load(counters + COUNT + at).to(tl.uint32),
        tl.load(counters + 2 * COUNT + at).to(tl.uint32), tl.load(counters + 3 * COUNT + at).to(tl.uint32),
        key0.to(tl.uint32), key1.to(tl.uint32),
    )  # fmt: skip
    for index in tl.static_range(4):
        tl.store(out + index * COUNT + at, words[index].to(tl.int64))


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 12345, 2**64 - 1])
def test_words_equal_the_reference_bit_for_bit(seed: int) -> None:
    counters = torch.randint(0, 2**32, (4, 64), generator=torch.Generator().manual_seed(1))
    counters[:, 0], counters[:, 1] = 0, 2**32 - 1
    out = torch.zeros_like(counters)
    _words_kernel[(1,)](counters, out, seed & 0xFFFFFFFF, seed >> 32, COUNT=64)
    assert torch.equal(out, torch.stack(philox4x32(tuple(counters), seed)))


CLOSE = {"cpu": 5, "cuda": 2}
"""Bound on `ulps` between two logarithms: over every u that can be drawn NumPy's, which the interpreter takes,
is up to 3.84 ulps off (AVX2) and torch's 0.89."""


def ulps(got: Tensor, expected: Tensor) -> int:
    """Largest distance in units of the last place."""
    bits = (t.contiguous().view(torch.int32).long() for t in (got, expected))
    return int((next(bits) - next(bits)).abs().max())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("width", [1, 3, 4, 5, 1024, 2051])
def test_exponentials_are_those_of_philox_noise(device: str, width: int) -> None:
    seed, rows = 2**63 + 9, 5
    expected = PhiloxNoise(seed, torch.device(device)).codes(3, 17, 100, rows, width)
    places = torch.tensor([place_row(seed, 100 + row, 17, 3) for row in range(rows)], device=device)
    for rows_a_program in (1, 4):
        got = philox.exponential(places, width, rows_a_program)
        assert ulps(got, expected) <= CLOSE[device]
    if width > 4:
        swapped = expected.clone()
        swapped[:, [0, 1]] = expected[:, [1, 0]]
        assert ulps(got, swapped) > CLOSE[device], "lanes in another order would pass"


def chi_squared_bound(degrees: int) -> float:
    """Upper 0.1 % point (Wilson-Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.0902 * (2 / (9 * degrees)) ** 0.5) ** 3


def draws(p: Tensor, count: int, rows_a_program: int) -> Tensor:
    """`count` tokens from probabilities p, one a step."""
    places = torch.tensor([place_row(2026, 0, 1, 0)]).repeat(count, 1)
    places[:, 1] = torch.arange(count)
    rules = pack_rules([SamplingRule("suno", ((0, len(p)),), len(p), temperature=1.0)]).expand(count)
    tokens, flag = kernels.sample(
        p.log().expand(count, -1), None, rules.integers, rules.numbers, places, len(p),
        filters=False, rows_a_program=rows_a_program,
    )  # fmt: skip
    assert flag.item() == 0
    return tokens  # type: ignore[no-any-return]


def test_a_million_tokens_are_as_frequent_as_their_probabilities() -> None:
    p = torch.tensor(np.random.default_rng(0).dirichlet(np.full(16, 0.7)) + 1e-3)
    p = p / p.sum()
    counts = torch.bincount(draws(p.float(), 1_000_000, 2**16), minlength=16).double()
    bound = chi_squared_bound(15)
    assert ((counts - 1e6 * p) ** 2 / (1e6 * p)).sum() < bound
    biased = p * torch.where(torch.arange(16) == p.argmax(), 1.02, 1.0)
    biased /= biased.sum()
    assert ((counts - 1e6 * biased) ** 2 / (1e6 * biased)).sum() > bound, "a bias of 2 % would pass"


def test_tokens_of_the_semantic_alphabet_fall_evenly_into_bins() -> None:
    p = torch.softmax(torch.randn(10_001, generator=torch.Generator().manual_seed(0)).double() * 2, -1)
    tokens = draws(p.float(), 1000, 64)
    bins = torch.arange(10_001) % 20
    expected = torch.zeros(20, dtype=torch.float64).index_add(0, bins, p) * 1000
    counts = torch.bincount(bins[tokens], minlength=20)
    assert ((counts - expected) ** 2 / expected).sum() < chi_squared_bound(19)
