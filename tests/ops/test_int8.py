"""Matrices in int8 on the CPU: against fp64, on every instruction set this machine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bark_fast import extension
from bark_fast.ops import int8
from bark_fast.ops.decode_layers import WEIGHTS, LayerWeights, PagedRows, decode_layers
from bark_fast.ops.int8 import Int8Matrix, quantise

C = extension.load()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (3, 31), (37, 100), (5, 768), (67, 33), (130, 512), (13, 513), (9, 3072), (200, 1537)]

pytestmark = pytest.mark.skipif(C is None, reason=f"bark_fast._C is missing: {extension.why_not()}")


def test_the_nearest_of_255_numbers() -> None:
    weight = torch.randn(50, 300)
    weight[7] = 0
    weight[8] *= 1e-6
    matrix = quantise(weight)
    assert matrix.weight.dtype == torch.int8 and matrix.scales.dtype == torch.float32
    back = matrix.weight * matrix.scales[:, None]
    assert ((back - weight).abs() <= 0.5001 * matrix.scales[:, None]).all()
    assert (matrix.weight.abs().amax(1) == torch.where(weight.abs().amax(1) > 0, 127, 0)).all()
    assert int8.bytes_of(50, 50 * 300) == matrix.weight.nbytes + matrix.scales.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_in_16_bits(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 40).to(dtype)
    assert torch.equal(quantise(weight).weight, quantise(weight.float()).weight)


def case(rows: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    random = torch.Generator().manual_seed(rows * n + k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return {
        "x": draw(rows, k).to(dtype),
        "norm_weight": (1 + draw(k) / 4).to(dtype),
        "norm_bias": draw(k).to(dtype) / 4,
        "matrix": quantise(draw(n, k) * torch.logspace(-2, 1, n)[:, None]),
        "bias": draw(n).to(dtype),
        "residual": draw(rows, n).to(dtype),
    }


def run(x: Tensor, matrix: Int8Matrix, threads: int = 2, gelu: bool = False, **parts: Tensor | None) -> Tensor:
    out = torch.full((len(x), len(matrix.weight)), torch.nan, dtype=x.dtype)
    norm, shift, bias, residual = (parts.get(name) for name in ("norm_weight", "norm_bias", "bias", "residual"))
    C.linear(x, norm, shift, matrix.weight, bias, residual, out, gelu, threads, matrix.scales)
    return out


def expected(x: Tensor, matrix: Int8Matrix, gelu: bool = False, **parts: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64, and what rows in 16 bits, the largest 32,767, and one rounding may do to each output."""
    wide = {name: part.double() for name, part in parts.items()}
    weight = matrix.weight.double() * matrix.scales.double()[:, None]
    y = F.layer_norm(x.double(), x.shape[1:], wide["norm_weight"], wide["norm_bias"])
    out = y @ weight.T + wide["bias"]
    steps = y.abs().amax(1, keepdim=True) / 32767 * (weight**2).sum(1).sqrt()
    out = (F.gelu(out) if gelu else out) + wide["residual"]
    return out, 3 * steps + torch.finfo(x.dtype).eps * out.abs() + 1e-6 * (1 + out.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11, 16])
def test_products(isa: str, dtype: torch.dtype, rows: int) -> None:
    for n, k in SIZES:
        c = case(rows, n, k, dtype)
        for gelu in (False, True):
            wanted, bound = expected(**c, gelu=gelu)
            assert ((run(**c, gelu=gelu).double() - wanted).abs() <= bound).all(), (n, k, gelu)


def test_a_row_of_zeros_and_one_of_nothing_else_but_large_numbers(isa: str) -> None:
    matrix = Int8Matrix(torch.full((3, 3072), -127, dtype=torch.int8), torch.ones(3))
    x = torch.zeros(2, 3072)
    x[1] = -1e30
    assert torch.equal(run(x, matrix)[0], torch.zeros(3))
    assert torch.allclose(run(x, matrix)[1], torch.full((3,), 127 * 3072 * 1e30))


@pytest.mark.parametrize("wrong", ["scales", "a row's neighbour", "one column", "residual", "norm"])
def test_the_tolerance_bites(wrong: str) -> None:
    c = case(3, 37, 100, torch.float32)
    wanted, bound = expected(**c)
    if wrong == "scales":
        c["matrix"] = Int8Matrix(c["matrix"].weight, c["matrix"].scales.roll(1))
    elif wrong == "a row's neighbour":
        c["x"] = c["x"].roll(1, 0)
    elif wrong == "one column":
        c["matrix"].weight[:, 99] = 0
    elif wrong == "residual":
        c["residual"] = None
    else:
        c["norm_bias"] = None
    assert ((run(**c).double() - wanted).abs() > bound).any()


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_to_the_bit_whoever_runs_beside_it(
    isa: str, dtype: torch.dtype, threads: int
) -> None:
    c = case(16, 96, 768, dtype)
    whole = run(**c)
    for part in (slice(0, 1), slice(3, 8), slice(15, 16), slice(2, 14)):
        some = {**c, "x": c["x"][part], "residual": c["residual"][part]}
        assert torch.equal(run(**some, threads=threads), whole[part])


def test_more_rows_than_it_takes_are_refused() -> None:
    c = case(17, 5, 32, torch.float32)
    with pytest.raises(ValueError, match="x has 17 rows; at most 16"):
        run(**c)


def test_layers_are_near_those_they_are_made_of(isa: str) -> None:
    """Of the size of the int8's own rounding away; and each scale goes with its own matrix."""
    width, heads, count = 64, 2, 3
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    weights = LayerWeights(
        draw(n, k) / k**0.5 * 2**i if k else None if bias else 1 + draw(n) / 4
        for i in range(count)
        for n, k in (
            (width, 0),
            (3 * width, width),
            (width, width),
            (width, 0),
            (4 * width, width),
            (width, 4 * width),
        )
        for bias in (False, True)
        for k in (0 if bias else k,)
    )
    assert len(weights) == count * WEIGHTS
    x = draw(5, width)

    def cache() -> PagedRows:
        table, lengths = torch.arange(2, dtype=torch.int32)[:, None], torch.tensor([4, 1], dtype=torch.int32)
        pages = [torch.full((2, heads, 16, width // heads), torch.nan) for _ in range(2 * count)]
        starts = torch.tensor([0, 4, 5], dtype=torch.int32)
        return PagedRows(pages[:count], pages[count:], table, lengths, starts, torch.tensor([0, 1, 2, 3, 16]))

    layers = int8.Int8Layers(weights)
    whole = decode_layers(x, weights, cache())
    rounded = LayerWeights(weights)
    back = iter(quantise(weight) for weight in weights.matrices())
    for i, one in enumerate(weights):
        if one is not None and one.dim() == 2:
            matrix = next(back)
            rounded[i] = matrix.weight * matrix.scales[:, None]
    near = decode_layers(x, rounded, cache())
    got = int8.decode_layers(x, layers, cache())
    assert (got - near).abs().max() < 1e-3 * near.abs().max()
    assert (got - near).abs().max() < 0.1 * (got - whole).abs().max() < 0.01 * whole.abs().max()
