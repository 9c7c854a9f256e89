"""The extension's linear layers on the CPU: against fp64, on every instruction set this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import MUTATIONS, case, error
from linear_cases import by_extension as run

from bark_fast import extension
from bark_fast.ops import mlp, norm_linear
from bark_fast.ops.dispatch import prefer

C = extension.load()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
SIZES = [(1, 1), (3, 31), (37, 100), (5, 768), (67, 33), (130, 512), (13, 513), (9, 3072)]
"""Outputs and inputs: single elements, odd ends of vectors, blocks, pieces and shares of a thread."""

pytestmark = pytest.mark.skipif(C is None, reason=f"bark_fast._C is missing: {extension.why_not()}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(1, 17))
def test_every_number_of_rows(isa: str, dtype: torch.dtype, rows: int) -> None:
    for n, k in SIZES:
        c = case(rows, n, k, dtype)
        assert error(run(c), c.expected()) <= c.bound(), (n, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [(), ("norm",), ("norm", "norm_bias"), ("bias",), ("gelu",), ("residual",)])
def test_options(isa: str, dtype: torch.dtype, options: tuple[str, ...]) -> None:
    names = ("norm", "norm_bias", "bias", "residual", "gelu")
    for rows in (1, 5):
        c = case(rows, 37, 100, dtype, **{name: name in options for name in names})
        assert error(run(c), c.expected()) <= c.bound()


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_tolerance_bites(name: str) -> None:
    c = case(3, 37, 100)
    c = replace(c, x=c.x / 16)  # a variance eps can be seen beside
    assert error(run(c), c.expected()) <= c.bound()
    assert error(MUTATIONS[name](c), c.expected()) > c.bound()


@pytest.mark.parametrize("name", ["bias missing", "wrong row", "weight off by a line"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_tolerance_bites_in_16_bits(dtype: torch.dtype, name: str) -> None:
    c = case(3, 37, 100, dtype)
    assert error(MUTATIONS[name](c), c.expected()) > c.bound()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(37, 100), (96, 768), (41, 1337), (24, 3072)])
def test_a_row_is_the_same_to_the_bit_whoever_runs_beside_it(
    isa: str, dtype: torch.dtype, n: int, k: int
) -> None:
    c = case(16, n, k, dtype)
    assert c.residual is not None
    whole = run(c, 2)
    for rows in range(1, 17):
        for first in (0, 16 - rows):
            part = slice(first, first + rows)
            some = run(replace(c, x=c.x[part], residual=c.residual[part]))
            assert torch.equal(some, whole[part]), (rows, first)
    moved = run(
        replace(c, weight=c.weight[5:], bias=None if c.bias is None else c.bias[5:], residual=c.residual[:, 5:])
    )
    assert torch.equal(moved, whole[:, 5:])  # nor does it matter which outputs are asked for


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_memory_is_read_changes_no_bit(isa: str, dtype: torch.dtype, cpu_kinds: Iterator[str]) -> None:
    cases = [case(rows, n, k, dtype, norm=True) for rows in range(1, 17) for n, k in SIZES]
    results = {kind: [run(c) for c in cases] for kind in cpu_kinds}
    others = results.pop("others")
    if isa == "avx512bf16" and dtype == torch.bfloat16:  # Intel's multiply no pairs: other roundings
        for c, got in zip(cases, results.pop("intel"), strict=True):
            assert error(got, c.expected()) <= c.bound()
    for got in results.values():
        assert all(torch.equal(one, other) for one, other in zip(got, others, strict=True))


def test_rows_of_torch_do_depend_on_their_number() -> None:
    """Else the test above would say little: by torch the same comparison fails for some number of rows."""
    c = case(16, 96, 768)
    with prefer("torch"):
        whole = norm_linear.linear(c.x, c.weight)
        assert any(not torch.equal(norm_linear.linear(c.x[:r], c.weight), whole[:r]) for r in range(1, 16))


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("own_threads", [False, True])
@pytest.mark.parametrize("shape", [(3, 900, 300), (300, 500, 70)], ids=["few rows", "many rows"])
def test_threads_change_nothing(threads: int, own_threads: bool, shape: tuple[int, int, int]) -> None:
    c = case(*shape)
    expected = run(c)
    C.avoid_openmp(own_threads)
    try:
        for _ in range(10):
            assert torch.equal(run(c, threads), expected)
    finally:
        C.avoid_openmp(False)


def test_calls_from_several_python_threads_do_not_disturb_one_another() -> None:
    cases = [case(1 + seed, 700, 300, dtype) for seed in range(3) for dtype in DTYPES]
    expected = [run(c) for c in cases]

    def often(which: int) -> bool:
        return all(torch.equal(run(cases[which % 9], 3), expected[which % 9]) for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(often, range(18)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [100, 768])
def test_rows_that_are_hard_to_normalise(isa: str, dtype: torch.dtype, k: int) -> None:
    c = case(5, 24, k, dtype, bias=False, residual=False, gelu=False)
    spread = c.x.float()
    hard = torch.stack([100 + spread[0] / 8, spread[1] / 512, 0 * spread[2], spread[3], 30 * spread[4]])
    hard[3, 7] = 500.0  # one value far from all others
    c = replace(c, x=hard.to(dtype))
    for row in range(5):  # each against its own bound; a mean of 100 costs its rounding over a spread of 1 / 8
        one = replace(c, x=c.x[row : row + 1])
        cost = 100 * 8 * torch.finfo(torch.float32).eps if row == 0 else 0.0
        assert error(run(one), one.expected()) <= one.bound() + cost


def test_gelu_is_exact_to_fp32(isa: str) -> None:
    x = torch.cat(
        [torch.linspace(-12, 12, 100_001), torch.logspace(-45, 4, 5000), -torch.logspace(-45, 4, 5000)]
    )
    x = x[: len(x) // 16 * 16].view(16, -1)
    got = torch.empty_like(x)
    for first in range(0, x.shape[1], 1000):  # GELU alone: the bias of an empty product
        for row in range(16):
            bias, out = x[row, first : first + 1000], got[row : row + 1, first : first + 1000]
            C.linear(torch.zeros(1, 1), None, None, torch.zeros(len(bias), 1), bias, None, out, True, 1)
    scale = x.double().abs().clamp(min=1)
    assert ((got.double() - F.gelu(x.double())).abs() / scale).max() < 1.5e-7
    tanh = F.gelu(x.double(), approximate="tanh")
    assert ((tanh - F.gelu(x.double())).abs() / scale).max() > 1.5e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_reach_the_result(isa: str, dtype: torch.dtype) -> None:
    c = case(3, 21, 35, dtype, norm=False, bias=False, residual=False, gelu=False)
    for value in (float("nan"), float("inf")):
        x = c.x.clone()
        x[1, 34] = value
        got = run(replace(c, x=x))
        assert not got[1].isfinite().any() and torch.equal(got[[0, 2]], run(c)[[0, 2]])
        normed = run(replace(c, x=x, norm=(torch.ones(35, dtype=dtype), None)))
        assert normed[1].isnan().all() and normed[[0, 2]].isfinite().all()
        weight = c.weight.clone()
        weight[20, 34] = value
        got = run(replace(c, weight=weight))
        assert not got[:, 20].isfinite().any() and got[:, :20].isfinite().all()
        for gelu in (False, True):
            got = run(replace(c, bias=torch.full((21,), value, dtype=dtype), gelu=gelu))
            assert torch.equal(got, torch.full_like(got, value)) or (value != value and got.isnan().all())


def test_nothing_beyond_the_operands_is_used(isa: str) -> None:
    for dtype in DTYPES:
        c = case(3, 21, 35, dtype)
        assert torch.equal(run(c.among_nan()), run(c))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_mlp_is_its_two_layers_to_the_bit(isa: str, dtype: torch.dtype, threads: int, rows: int) -> None:
    fc = case(rows, 300, 70, dtype, residual=False)
    hidden = run(fc)
    proj = replace(case(rows, 70, 300, dtype, norm=False, gelu=False), x=hidden, residual=fc.x)
    assert fc.norm is not None
    out = torch.empty(rows, 70, dtype=dtype)
    for _ in range(5):
        C.mlp(fc.x, *fc.norm, fc.weight, fc.bias, proj.weight, proj.bias, out.fill_(7), threads)
        assert torch.equal(out, run(proj))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operations_take_the_extension_for_few_rows_only(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert C.linear_rows == norm_linear.COMPILED_ROWS
    monkeypatch.setattr(norm_linear, "multiplies_faster", lambda module, dtype: False)
    for rows in (1, norm_linear.COMPILED_ROWS, norm_linear.COMPILED_ROWS + 1):
        c = case(rows, 40, 24, dtype, gelu=False)
        assert c.norm is not None and c.residual is not None
        normed, added = replace(c, residual=None), replace(c, norm=None)
        calls = [
            (normed, lambda c=c: norm_linear.norm_linear(c.x, *c.norm, c.weight, c.bias)),
            (added, lambda c=c: norm_linear.linear_residual(c.x, c.weight, c.residual, c.bias)),
        ]
        for wanted, call in calls:
            by_torch = wanted.by_torch()
            got = call()
            assert error(got, wanted.expected()) <= wanted.bound()
            with prefer("torch"):
                assert torch.equal(call(), by_torch)
            assert (norm_linear.extension_for(c.x, c.weight) is not None) == (rows <= norm_linear.COMPILED_ROWS)
            if rows <= norm_linear.COMPILED_ROWS:
                assert torch.equal(got, run(wanted))
            else:
                assert torch.equal(got, by_torch)
    monkeypatch.setattr(norm_linear.extension, "load", lambda: None)
    assert torch.equal(norm_linear.linear(c.x[:1], c.weight), F.linear(c.x[:1], c.weight))


def test_what_the_extension_cannot_take_runs_on_torch() -> None:
    c = case(2, 24, 16, residual=False)
    assert c.norm is not None
    assert norm_linear.extension_for(c.x, c.weight.T.contiguous().T) is None
    assert norm_linear.extension_for(c.x, c.weight.double()) is None
    assert norm_linear.extension_for(torch.empty(2, 16, device="meta"), c.weight) is None
    assert norm_linear.extension_for(c.x, c.weight.to("meta")) is None
    assert norm_linear.extension_for(c.x, c.weight.as_subclass(type("Quantised", (torch.Tensor,), {}))) is None
    assert norm_linear.norm_linear(c.x[:0], *c.norm, c.weight, c.bias).shape == (0, 24)
    assert norm_linear.linear(c.x, c.weight[:0]).shape == (2, 0)
    assert norm_linear.linear(c.x[:, :0], c.weight[:, :0]).eq(0).all()
    cube = c.x.expand(3, 2, 16)
    got = mlp.layernorm_gelu_mlp(cube, *c.norm, c.weight, c.bias, c.weight.T.contiguous(), None)
    assert got.shape == (3, 2, 16) and torch.equal(got[0], got[2])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "integers": ({"x": torch.zeros(2, 8, dtype=torch.int32)}, "x is int32"),
    "dtype": ({"weight": torch.zeros(3, 8, dtype=torch.float16)}, "weight is float16; expected float32"),
    "k": ({"weight": torch.zeros(3, 9)}, r"weight has shape \(3, 9\); expected \(any, 8\)"),
    "columns": ({"weight": torch.zeros(8, 3).T}, "weight has stride 3 in dimension 1"),
    "bias": ({"bias": torch.zeros(2)}, r"bias has shape \(2,\); expected \(3,\)"),
    "norm_weight": ({"norm_weight": torch.zeros(7)}, r"norm_weight has shape \(7,\)"),
    "norm_bias": ({"norm_weight": torch.ones(8), "norm_bias": torch.zeros(16)[::2]}, "norm_bias has stride 2"),
    "residual": ({"residual": torch.zeros(1, 3)}, r"residual has shape \(1, 3\); expected \(2, 3\)"),
    "out": ({"out": torch.zeros(2, 4)}, r"out has shape \(2, 4\); expected \(2, 3\)"),
    "out on itself": ({"out": torch.zeros(3).expand(2, 3)}, "out has row stride 0; expected at least 3"),
    "no tensor": ({"weight": [[0.0] * 8] * 3}, "weight is not a tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named_before_anything_is_written(name: str) -> None:
    change, message = WRONG[name]
    sound: dict[str, Any] = {
        "x": torch.ones(2, 8), "norm_weight": None, "norm_bias": None, "weight": torch.ones(3, 8), "bias": None,
        "residual": None, "out": torch.full((2, 3), 7.0), "gelu": False, "threads": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        C.linear(**{**sound, **change})
    assert (sound["out"] == 7).all()
    C.linear(**sound)
    assert (sound["out"] == 8).all()
