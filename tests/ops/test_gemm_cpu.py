"""The extension's linear layers of many rows: against fp64, on every instruction set this machine has."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from linear_cases import MUTATIONS, Case, case, error
from linear_cases import by_extension as run
from torch import Tensor

from bark_fast import extension
from bark_fast.ops import dispatch, mlp, norm_linear
from bark_fast.ops.decode_layers import LayerWeights, PagedRows, decode_layers
from bark_fast.ops.dispatch import prefer

C = extension.load()
SIZES = [(1, 1), (3, 31), (6, 128), (7, 129), (48, 64), (49, 257), (130, 96)]
"""Outputs and inputs: single elements, odd ends of vectors, tiles, ranges and chunks."""

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(C is None, reason=f"bark_fast._C is missing: {extension.why_not()}")


@pytest.mark.parametrize(
    "rows", [17, 31, 32, 33, 48, 49, 63, 64, 65, 80, 127, 128, 129, 193, 256, 257, 300, 513]
)
def test_numbers_of_rows(isa: str, rows: int) -> None:
    for n, k in SIZES:
        wide = case(
            rows, n + 64, k
        )  # of which torch's error is the bound: a few outputs may all happen to be exact
        c = outputs_of(wide, n)
        got = run(c)
        assert error(got, c.expected()) <= wide.bound(), (n, k)
        for dtype in DTYPES[1:]:
            wide = wide.to(dtype)
            c = outputs_of(wide, n)
            assert error(run(c), c.expected()) <= wide.bound(), (n, k, dtype)
            c = replace(c, norm=None)  # its sums are in another order
            # what is multiplied and summed between the operands and the result is fp32
            assert torch.equal(run(c), run(c.to(torch.float32)).to(dtype)), (n, k, dtype)


def outputs_of(c: Case, n: int) -> Case:
    """The first n outputs alone."""
    assert c.bias is not None and c.residual is not None
    return replace(c, weight=c.weight[:n], bias=c.bias[:n], residual=c.residual[:, :n])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_are_packed_at_a_time(isa: str, dtype: torch.dtype) -> None:
    c = case(1024 + 1024 + 17, 9, 40, dtype)
    assert error(run(c), c.expected()) <= c.bound()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [768, 3072])
def test_no_less_exact_than_torch_at_barks_widths(isa: str, k: int, dtype: torch.dtype) -> None:
    c = case(64, 96, k, dtype, gelu=False)
    assert error(run(c), c.expected()) <= 1.25 * error(c.by_torch(), c.expected())


@pytest.mark.parametrize("options", [(), ("norm",), ("norm", "norm_bias"), ("bias",), ("gelu",), ("residual",)])
def test_options(isa: str, options: tuple[str, ...]) -> None:
    names = ("norm", "norm_bias", "bias", "residual", "gelu")
    for rows in (17, 100):
        c = case(rows, 37, 100, **{name: name in options for name in names})
        assert error(run(c), c.expected()) <= c.bound()


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_tolerance_bites(name: str) -> None:
    c = case(70, 37, 300)
    c = replace(c, x=c.x / 16)  # a variance eps can be seen beside
    assert error(run(c), c.expected()) <= c.bound()
    assert error(MUTATIONS[name](c), c.expected()) > c.bound()


@pytest.mark.parametrize(("n", "k"), [(37, 100), (96, 768), (41, 1337)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_to_the_bit_whoever_runs_beside_it(
    isa: str, n: int, k: int, dtype: torch.dtype
) -> None:
    c = case(150, n, k, dtype)
    assert c.residual is not None and c.bias is not None
    whole = run(c, 2)
    for rows in (17, 32, 40, 64, 100, 149):
        for first in (0, 1, 150 - rows):
            part = slice(first, first + rows)
            some = run(replace(c, x=c.x[part], residual=c.residual[part]))
            assert torch.equal(some, whole[part]), (rows, first)
    moved = run(replace(c, weight=c.weight[5:], bias=c.bias[5:], residual=c.residual[:, 5:]))
    assert torch.equal(moved, whole[:, 5:])  # nor does it matter which outputs are asked for


@pytest.mark.parametrize("k", [100, 768])
def test_rows_that_are_hard_to_normalise(isa: str, k: int) -> None:
    c = case(20, 24, k, bias=False, residual=False, gelu=False)
    hard = c.x.clone()
    hard[0] = 100 + c.x[0] / 8
    hard[1] = c.x[1] / 512
    hard[2] = 0
    hard[3, 7] = 500.0
    hard[4] = 30 * c.x[4]
    c = replace(c, x=hard)
    got, expected = run(c), c.expected()
    assert error(got[1:], expected[1:]) <= replace(c, x=c.x[1:]).bound()
    cost = 100 * 8 * torch.finfo(torch.float32).eps  # of a mean of 100: its rounding over a spread of 1 / 8
    assert error(got[:1], expected[:1]) <= replace(c, x=c.x[:1]).bound() + cost


def test_nan_and_infinity_stay_in_their_row_and_column(isa: str) -> None:
    c = case(50, 21, 35, norm=False, bias=False, residual=False, gelu=False)
    others = [row for row in range(50) if row != 49]
    for value in (float("nan"), float("inf")):
        x = c.x.clone()
        x[49, 34] = value
        got = run(replace(c, x=x))
        assert not got[49].isfinite().any() and torch.equal(got[others], run(c)[others])
        normed = run(replace(c, x=x, norm=(torch.ones(35), None)))
        assert normed[49].isnan().all() and normed[others].isfinite().all()
        weight = c.weight.clone()
        weight[20, 34] = value
        got = run(replace(c, weight=weight))
        assert not got[:, 20].isfinite().any() and got[:, :20].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_the_operands_is_used(isa: str, dtype: torch.dtype) -> None:
    c = case(50, 21, 35, dtype)
    assert torch.equal(run(c.among_nan()), run(c))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operations_take_it_where_it_pays(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    rows = norm_linear.COMPILED_ROWS + 1
    c = case(rows, 40, 24, dtype, gelu=False)
    assert c.norm is not None and c.residual is not None
    normed, added = replace(c, residual=None), replace(c, norm=None)
    back = c.weight.T.contiguous()
    mlp_of = {True: c.x[:, :24], False: c.x[:, :24].repeat(2, 1)[:rows].view(1, rows, 24)}
    for pays in (True, False):
        monkeypatch.setattr(norm_linear, "multiplies_faster", lambda module, asked, pays=pays: pays)
        assert (norm_linear.extension_for(c.x, c.weight) is not None) == pays
        for wanted, call in (
            (normed, lambda: norm_linear.norm_linear(c.x, *c.norm, c.weight, c.bias)),  # type: ignore[misc]
            (added, lambda: norm_linear.linear_residual(c.x, c.weight, c.residual, c.bias)),
        ):
            assert torch.equal(call(), run(wanted) if pays else wanted.by_torch())
            with prefer("torch"):
                assert torch.equal(call(), wanted.by_torch())
        x = mlp_of[pays]
        got = mlp.layernorm_gelu_mlp(x, *c.norm, c.weight, c.bias, back, None)
        assert got.shape == x.shape
        flat = x.reshape(rows, 24)
        fc = replace(c, x=flat, residual=None, gelu=True)
        hidden = run(fc) if pays else fc.by_torch()
        proj = replace(c, x=hidden, weight=back, norm=None, bias=None, residual=flat)
        assert torch.equal(got.reshape(rows, 24), run(proj) if pays else proj.by_torch())


@pytest.mark.parametrize(
    ("isa", "intels", "of_torch", "ours"),
    [
        ("avx2", False, (), DTYPES),
        ("avx2", True, (), DTYPES[1:]),
        ("avx512", True, (torch.bfloat16,), [torch.float16]),
        ("avx512", False, (torch.bfloat16,), [torch.float32, torch.float16]),
        ("avx512bf16", False, (torch.bfloat16,), [torch.float32, torch.float16]),
        ("avx512bf16", True, (torch.bfloat16, torch.float16), []),
        ("portable", False, (), []),
    ],
)
def test_where_it_multiplies_faster(
    monkeypatch: pytest.MonkeyPatch, isa: str, intels: bool, of_torch: tuple[torch.dtype, ...], ours: list[Any]
) -> None:
    monkeypatch.setattr(dispatch, "torch_multiplies", lambda dtype: dtype in of_torch)
    module: Any = SimpleNamespace(isa=lambda: isa, cpu_is_intels=lambda: intels)
    assert [dtype for dtype in DTYPES if dispatch.multiplies_faster(module, dtype)] == ours


def test_torch_is_asked_what_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = dispatch.torch_multiplies.__wrapped__
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        for answer in (True, False):
            asked = SimpleNamespace(**{f"_is_mkldnn_{name}_supported": lambda answer=answer: answer})
            monkeypatch.setattr(torch.ops, "mkldnn", asked)
            assert ask(dtype) is answer
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
        assert ask(dtype)  # a torch that cannot be asked is left alone
    assert ask(torch.float64)


def test_layers_of_many_sequences_go_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_C.decode_layers` has few rows only; with more, the operations run, and may take `gemm` each."""
    monkeypatch.setattr(norm_linear, "multiplies_faster", lambda module, dtype: True)
    rows, width = 17, 64
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) / 8

    weights = LayerWeights(
        part for shape in [(), (3 * width,), (width,), (), (4 * width,)] for part in (draw(*shape, width), None)
    )
    weights += [draw(width, 4 * width), None]
    x = draw(rows, width)

    def cache() -> PagedRows:
        table = torch.arange(rows, dtype=torch.int32)[:, None]
        lengths = torch.ones(rows, dtype=torch.int32)
        pages = [torch.zeros(rows, 1, 16, width) for _ in range(2)]
        starts = torch.arange(rows + 1, dtype=torch.int32)
        return PagedRows(pages[:1], pages[1:], table, lengths, starts, torch.arange(rows) * 16)

    got = decode_layers(x, weights, cache())
    alone = torch.cat(
        [
            decode_layers(x[:9], weights, cache_of(cache(), 0, 9)),
            decode_layers(x[9:], weights, cache_of(cache(), 9, 17)),
        ]
    )
    assert (got - alone).abs().max() < 1e-5


def cache_of(cache: PagedRows, first: int, last: int) -> PagedRows:
    """Some of the sequences."""
    return PagedRows(
        cache.keys,
        cache.values,
        cache.block_table[first:last],
        cache.lengths[first:last],
        cache.query_starts[: last - first + 1],
        cache.slots[first:last],
    )
