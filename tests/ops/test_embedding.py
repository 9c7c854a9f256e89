"""Embedding sums against their definition in fp64, on every backend at hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from linear_cases import interpreted
from torch import Tensor

from bark_fast.ops import embedding as ops
from bark_fast.ops.dispatch import prefer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["torch", "triton"]
OUTSIDE = [(10, 0, -1), (-1, 0, -1), (0, 7, -1), (0, -1, -1), (0, 0, 10), (0, 0, -2)]


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference."""
    return (got.double() - expected).abs().max().item()


def rounding(dtype: torch.dtype, additions: int, magnitude: float) -> float:
    """What rounding after every addition may cost at most."""
    return additions * magnitude * torch.finfo(dtype).eps


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Torch, and Triton (interpreted on a CPU)."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available() and request.node.callspec.params.get("device", "cpu") == "cpu":
            pytest.skip("beside a GPU nothing is interpreted")
    return str(request.param)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 63, 64, 65, 768, 1025])
@pytest.mark.parametrize("merged", [False, True])
def test_embed(backend: str, device: str, dtype: torch.dtype, width: int, merged: bool) -> None:
    torch.manual_seed(width)
    # a table that is a slice of a wider one: rows are strided
    tokens = torch.randn(20, width + 3, device=device).to(dtype)[:, :width]
    places = torch.randn(9, width, device=device).to(dtype)
    ids = torch.randint(0, 20, (7,), device=device)
    positions = torch.randint(0, 9, (7,), device=device)
    extra = torch.tensor([3, -1, 0, -1, 19, 5, -1], device=device) if merged else None
    expected = tokens.double()[ids] + places.double()[positions]
    if extra is not None:
        expected += tokens.double()[extra.clamp(min=0)] * (extra >= 0)[:, None]
    with prefer(backend):
        got = ops.embed(ids, positions, tokens, places, extra)
    assert got.dtype == dtype
    bound = rounding(dtype, 2, expected.abs().max().item())
    assert error(got, expected) <= bound
    shifted = tokens.double()[ids] + places.double()[(positions + 1) % 9]
    assert error(got, shifted) > bound, "the tolerance would let a wrong position through"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_embed_codes(backend: str, device: str, dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(count)
    tables = [torch.randn(11, 70, device=device).to(dtype) for _ in range(8)]
    places = torch.randn(6, 70, device=device).to(dtype)
    codes = torch.randint(0, 11, (2, 8, 5), device=device).transpose(1, 2)  # as the fine stage keeps them
    expected = places[:5].double() + sum(tables[i].double()[codes[..., i]] for i in range(count))
    with prefer(backend):
        got = ops.embed_codes(codes, tables[:count], places)
    bound = rounding(dtype, count, expected.abs().max().item())
    assert error(got, expected) <= bound
    assert error(got, expected - tables[0].double()[codes[..., 0]]) > bound


@interpreted
@pytest.mark.parametrize("count", [1, 8])
def test_backends_agree_to_the_bit_in_fp32(count: int) -> None:
    pytest.importorskip("triton")
    tables = [torch.randn(11, 70) for _ in range(count)]
    places = torch.randn(6, 70)
    codes = torch.randint(0, 11, (2, 5, 8))
    ids, positions = codes[0, :, 0], torch.arange(5)
    results = []
    for backend in BACKENDS:
        with prefer(backend):
            sums = ops.embed_codes(codes, tables, places)
            results.append((sums, ops.embed(ids, positions, tables[0], places, ids.flip(0))))
    for ours, reference in zip(*results, strict=True):
        assert torch.equal(ours, reference)


@interpreted
@pytest.mark.parametrize("outside", OUTSIDE)
def test_ids_outside_a_table_become_nan_in_that_row_alone(outside: tuple[int, int, int]) -> None:
    pytest.importorskip("triton")
    ids, positions, extra = (torch.tensor([0, value, 1]) for value in outside)
    with prefer("triton"):
        got = ops.embed(ids, positions, torch.ones(10, 4), torch.ones(7, 4), extra.where(extra < 0, extra))
    assert got[1].isnan().all()
    assert got[0].isfinite().all() and got[2].isfinite().all()


@pytest.mark.parametrize("outside", [*OUTSIDE, (1, 1, -2)])
def test_ids_outside_a_table_are_errors_of_torch(outside: tuple[int, int, int]) -> None:
    ids, positions, extra = (torch.tensor([0, value, 1]) for value in outside)
    with prefer("torch"), pytest.raises(IndexError):
        ops.embed(ids, positions, torch.ones(10, 4), torch.ones(7, 4), extra)


@interpreted
def test_no_rows() -> None:
    pytest.importorskip("triton")
    none = torch.zeros(0, dtype=torch.int64)
    with prefer("triton"):
        assert ops.embed(none, none, torch.ones(3, 4), torch.ones(3, 4)).shape == (0, 4)
        assert ops.embed_codes(none.view(0, 5, 1), [torch.ones(3, 4)], torch.ones(6, 4)).shape == (0, 5, 4)


def test_operators_pass_opcheck_and_trace() -> None:
    ids, extra = torch.tensor([1, 2]), torch.tensor([0, -1])
    tokens, places = torch.randn(5, 8), torch.randn(4, 8)
    codes = torch.randint(0, 5, (1, 3, 2))
    for merged in (extra, None):
        torch.library.opcheck(torch.ops.bark_fast.embed, (ids, ids, tokens, places, merged))
    torch.library.opcheck(torch.ops.bark_fast.embed_codes, (codes, [tokens, tokens], places))
    for call in (
        partial(ops.embed, ids, ids, tokens, places, extra),
        partial(ops.embed_codes, codes, [tokens, tokens], places),
    ):
        traced = torch.compile(call, backend="aot_eager", fullgraph=True)
        assert torch.equal(traced(), call())
