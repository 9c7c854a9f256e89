"""LayerNorm, linear layers and their epilogues against their definition in fp64, by every kernel there is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import BACKENDS, DEVICES, MUTATIONS, Case, case, error, interpreted
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bark_fast.errors import InvalidInput
from bark_fast.ops import norm_linear as ops
from bark_fast.ops.dispatch import prefer

pytest.importorskip("triton")

gemv: Any
matmul: Any
from bark_fast.kernels import gemv, matmul, norm_linear  # noqa: E402
from bark_fast.kernels.target import KNOWN, assume  # noqa: E402

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
BARK = [(3 * c, c) for c in (768, 1024)] + [(c, c) for c in (768, 1024)] + [(4 * c, c) for c in (768, 1024)]
BARK += [(c, 4 * c) for c in (768, 1024)] + [(n, c) for n in (1024, 10_001) for c in (768, 1024)]

GEMV = {
    "one warp": gemv.Tile(4, 256, 1),
    "two warps, one line": gemv.Tile(1, 64, 2),
    "eight chunks": gemv.Tile(2, 16, 1),
}
MATMUL = {
    "whole": matmul.Tile(16, 16, 32, 1, 2, 3),
    "split": matmul.Tile(16, 32, 32, 2, 4, 3),
    "split, one part empty": matmul.Tile(32, 16, 32, 4, 4, 2),
    "square": matmul.Tile(64, 64, 64, 1, 4, 3),
    "norm apart": matmul.Tile(16, 32, 64, 1, 4, 3, fused_norm=False),
}


@pytest.fixture(autouse=True)
def few_processors() -> Iterator[None]:
    """A small chip, so that small layers are not cut into programs of one line: the interpreter is slow."""
    with assume(replace(KNOWN[90], processors=4)):
        yield


def run(c: Case, plan: Any, **options: Any) -> Tensor:
    """The case by a plan of the test's choice."""
    return norm_linear.planned(plan, c.x, c.norm, c.weight, c.bias, c.residual, c.gelu, **options)


def assert_close(got: Tensor, c: Case) -> None:
    """Within twice what torch itself errs by in this dtype."""
    assert got.dtype == c.x.dtype
    assert error(got, c.expected()) <= c.bound()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("name", GEMV)
def test_gemv(device: str, dtype: torch.dtype, rows: int, name: str) -> None:
    c = case(rows, 5 if rows == 8 else 13, 100, dtype, device)
    assert_close(run(c, GEMV[name]), c)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 64, 65])
@pytest.mark.parametrize("name", MATMUL)
def test_matmul(device: str, dtype: torch.dtype, rows: int, name: str) -> None:
    c = case(rows, 37, 100, dtype, device)
    assert_close(run(c, MATMUL[name]), c)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [64, 96, 100, 128])
def test_normalised_rows_of_any_length_in_blocks_and_splits(device: str, k: int) -> None:
    """Whole blocks or not, as many in each split or not."""
    c = case(5, 37, k, torch.float16, device)
    plan = matmul.Tile(16, 32, 32, 2, 4, 3)
    assert matmul.normalises(c.x, plan)
    assert_close(run(c, plan), c)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_too_long_to_be_held_are_normalised_beforehand(device: str) -> None:
    c = case(5, 37, 300, torch.float32, device)
    plan = matmul.Tile(16, 32, 32, 1, 1, 2)
    assert not matmul.normalises(c.x, plan)
    assert_close(run(c, plan), c)


@pytest.mark.parametrize("device", DEVICES)
def test_more_blocks_of_rows_than_share_a_walk(device: str) -> None:
    """Groups of eight blocks go through all lines together; the last group is of two."""
    c = case(9 * 16 + 5, 70, 64, torch.float32, device)
    assert_close(run(c, matmul.Tile(16, 32, 32, 1, 4, 3)), c)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 17, 65])
def test_cublas_between_kernels(device: str, dtype: torch.dtype, rows: int) -> None:
    c = case(rows, 37, 100, dtype, device)
    assert_close(run(c, None), c)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", [gemv.Tile(2, 256, 1), matmul.Tile(16, 32, 64, 2, 4, 3), None], ids=str)
@pytest.mark.parametrize("options", [(), ("norm",), ("norm", "norm_bias"), ("bias",), ("gelu",), ("residual",)])
def test_options_at_barks_width(device: str, plan: Any, options: tuple[str, ...]) -> None:
    names = ("norm", "norm_bias", "bias", "residual", "gelu")
    c = case(2, 20, 768, torch.float16, device, **{name: name in options for name in names})
    assert_close(run(c, plan), c)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", [gemv.Tile(2, 256, 1), matmul.Tile(16, 32, 64, 1, 4, 3), None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_hard_to_normalise(device: str, plan: Any, dtype: torch.dtype) -> None:
    c = case(5, 24, 300, dtype, device, bias=False, residual=False, gelu=False)
    spread = c.x.float()
    hard = torch.stack(
        [100 + spread[0] / 8, spread[1] / 512, torch.full_like(spread[2], 0.1), 0 * spread[3], 30 * spread[4]]
    )
    hard[4, 7] = 500.0  # one value far from all others
    c = replace(c, x=hard.to(dtype))
    for row in range(5):  # each against its own bound
        one = replace(c, x=c.x[row : row + 1])
        assert error(run(one, plan), one.expected()) <= one.bound() + cost_of_the_mean(one)


def cost_of_the_mean(c: Case) -> float:
    """What log2(k) roundings of the mean move the result by: a row without spread multiplies them by 316."""
    assert c.norm is not None
    x, gains = c.x.double(), c.norm[0].double()
    roundings = torch.finfo(torch.float32).eps / 2 * math.log2(x.shape[1])
    moved = roundings * x.mean().abs() / (x.var(correction=0) + 1e-5).sqrt()
    return (moved * (c.weight.double() @ gains).abs().max()).item()


BITES = [(name, dtype) for dtype in DTYPES for name in MUTATIONS]
BITES = [b for b in BITES if b[1] == torch.float32 or b[0] not in ("no eps", "tanh GELU")]
"""What each dtype's bound must notice: all, but for what is less than a rounding of 16 bits."""


@interpreted
@pytest.mark.parametrize(("name", "dtype"), BITES, ids=str)
def test_tolerance_bites(name: str, dtype: torch.dtype) -> None:
    c = case(3, 37, 100, dtype)
    c = replace(c, x=c.x / 16)  # a variance eps can be seen beside
    assert_close(run(c, GEMV["one warp"]), c)
    assert error(MUTATIONS[name](c), c.expected()) > c.bound()


@pytest.mark.parametrize("device", DEVICES)
def test_splits_leave_counters_at_zero_and_repeat_to_the_bit(device: str) -> None:
    c = case(18, 70, 100, torch.float16, device)
    scratch = norm_linear.make_scratch(18, 70, c.x.device)
    scratch[0].fill_(float("nan"))  # sums of an earlier launch must not be seen
    first = run(c, MATMUL["split, one part empty"], scratch=scratch)
    assert not scratch[1].any()
    second = run(c, MATMUL["split, one part empty"], scratch=scratch)
    assert torch.equal(first, second) and torch.equal(first, run(c, MATMUL["split, one part empty"]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", [*GEMV.values(), *MATMUL.values(), None], ids=str)
def test_two_calls_agree_to_the_bit(device: str, plan: Any) -> None:
    c = case(3, 13, 100, torch.float16, device)
    assert torch.equal(run(c, plan), run(c, plan))


@interpreted
@pytest.mark.parametrize("plan", [*GEMV.values(), *MATMUL.values()], ids=str)
def test_a_row_does_not_see_its_neighbours_while_the_plan_stays(plan: Any) -> None:
    """By one plan, interpreted. Across plans (1 row, 5 rows, 65 rows) the last bits differ."""
    c = case(4, 13, 100, torch.float16)
    alone = replace(c, x=c.x[:1], residual=None if c.residual is None else c.residual[:1])
    assert torch.equal(run(alone, plan), run(c, plan)[:1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 64, 65])
def test_operations_choose_a_kernel(device: str, backend: str, dtype: torch.dtype, rows: int) -> None:
    c = case(rows, 24, 96, dtype, device)
    assert c.norm is not None and c.residual is not None
    normed = replace(c, residual=None)
    added = replace(c, norm=None, gelu=False)
    plain = replace(c, norm=None, residual=None)
    with prefer(backend):  # type: ignore[arg-type]
        assert_close(ops.norm_linear(c.x, *c.norm, c.weight, c.bias, gelu=True), normed)
        assert_close(ops.linear_residual(c.x, c.weight, c.residual, c.bias), added)
        assert_close(ops.linear(c.x, c.weight, c.bias, gelu=True), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides(backend: str) -> None:
    c = case(6, 24, 64, residual=False)
    assert c.norm is not None
    expected = c.expected()
    columns_apart = torch.randn(6, 128)[:, ::2].copy_(c.x)
    transposed = c.weight.T.contiguous().T
    with prefer(backend):  # type: ignore[arg-type]
        call = partial(ops.norm_linear, gelu=True)
        cube = call(c.x.unflatten(0, (2, 3)), *c.norm, c.weight, c.bias)
        assert cube.shape == (2, 3, 24) and error(cube.flatten(0, 1), expected) <= c.bound()
        assert error(call(c.x[2], *c.norm, c.weight, c.bias), expected[2]) <= c.bound()
        assert error(call(columns_apart, *c.norm, c.weight, c.bias), expected) <= c.bound()
        assert error(call(c.x, *c.norm, transposed, c.bias), expected) <= c.bound()
        some = call(c.x, *c.norm, c.weight[5:16], None if c.bias is None else c.bias[5:16])
        assert error(some, expected[:, 5:16]) <= c.bound()
        for rows in (0, 1):
            assert call(c.x[:rows], *c.norm, c.weight, c.bias).shape == (rows, 24)


def test_torch_keeps_the_bits_of_the_plain_modules() -> None:
    c = case(9, 64, 64)
    assert c.norm is not None and c.residual is not None
    y = F.linear(F.layer_norm(c.x, (64,), *c.norm, 1e-5), c.weight, c.bias)
    with prefer("torch"):
        assert torch.equal(ops.norm_linear(c.x, *c.norm, c.weight, c.bias), y)
        assert torch.equal(ops.norm_linear(c.x, *c.norm, c.weight, c.bias, gelu=True), F.gelu(y))
        plain = F.linear(c.x, c.weight, c.bias)
        assert torch.equal(ops.linear_residual(c.x, c.weight, c.residual, c.bias), c.residual + plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float16)}, "float16"),
        ({"x": torch.zeros(2, 8).int(), "weight": torch.zeros(3, 8).int()}, "x is torch.int32"),
        ({"x": torch.zeros(2, 9)}, r"\(2, 9\)"),
        ({"x": torch.zeros(())}, r"x is \(\)"),
        ({"weight": torch.zeros(3, 8, 1)}, r"\(3, 8, 1\)"),
        ({"bias": torch.zeros(8)}, "bias is"),
        ({"norm_weight": torch.zeros(3)}, "norm_weight is"),
        ({"norm_bias": torch.zeros(3)}, "norm_bias is"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], message: str) -> None:
    sound: dict[str, Any] = {
        "x": torch.zeros(2, 8), "norm_weight": torch.zeros(8), "norm_bias": None, "weight": torch.zeros(3, 8),
    }  # fmt: skip
    assert ops.norm_linear(**sound).shape == (2, 3)
    with pytest.raises(InvalidInput, match=message):
        ops.norm_linear(**{**sound, **change})


def test_residual_must_have_the_shape_and_dtype_of_the_product() -> None:
    with pytest.raises(InvalidInput, match=r"residual is \(1, 3\)"):
        ops.linear_residual(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(1, 3))
    with pytest.raises(
        InvalidInput, match=r"residual is \(2, 3\) torch.float16; it must be \(2, 3\) torch.float32"
    ):
        ops.linear_residual(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(2, 3).half())


@pytest.mark.parametrize("target", KNOWN.values(), ids=lambda t: str(t.arch))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), BARK)
def test_plans_for_barks_shapes(target: Any, dtype: torch.dtype, n: int, k: int) -> None:
    tile = norm_linear.plan(target, dtype, 1, n, k)
    assert isinstance(tile, gemv.Tile) and gemv.fits(1, k, tile)
    assert k % tile.block_k == 0  # no lane idle, no mask
    assert -(-n // tile.block_n) >= target.processors
    for rows in (65, 257, 8192):
        assert norm_linear.plan(target, dtype, rows, n, k) is None


def test_a_measured_entry_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    target = KNOWN[90]
    entry = matmul.Tile(64, 64, 64, 1, 4, 3)
    monkeypatch.setitem(norm_linear.TUNED, (90, torch.float16, 512, 768, 768), entry)
    assert norm_linear.plan(target, torch.float16, 257, 768, 768) == entry
    assert norm_linear.plan(target, torch.float16, 256, 768, 768) is None


@pytest.mark.parametrize("tracer", ["jit", "make_fx"])
def test_tracers_record_the_operation(tracer: str) -> None:
    """And not the memory that it was about to write into."""
    x, weight = torch.randn(3, 8), torch.randn(5, 8)

    def call(x: Tensor) -> Tensor:
        return ops.linear(x, weight)

    traced = torch.jit.trace(call, x) if tracer == "jit" else make_fx(call, tracing_mode="real")(x)
    other = torch.randn(3, 8)
    assert (traced(other) - other @ weight.T).abs().max() < 1e-5


def test_operators_hold_what_torch_asks_of_them() -> None:
    c = case(2, 24, 32)
    assert c.norm is not None
    checked = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    checked(torch.ops.bark_fast.norm_linear.default, (c.x, *c.norm, c.weight, c.bias, True))
    checked(torch.ops.bark_fast.linear.default, (c.x, c.weight, c.bias, c.residual))
    for call in (
        partial(ops.norm_linear, c.x, *c.norm, c.weight, c.bias, gelu=True),
        partial(ops.linear_residual, c.x, c.weight, c.residual, c.bias),
        partial(ops.linear, c.x, c.weight),
        partial(ops.linear, c.x, c.weight, scratch=(torch.zeros(8), torch.zeros(8, dtype=torch.int32))),
    ):
        assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(), call())


def barks_shapes() -> Iterator[tuple[torch.dtype, int, int, tuple[int, ...]]]:
    """Rows of each kernel and tile. Most are compiled for, so fewer in the other dtypes, at width 768."""
    for n, k in BARK:
        yield torch.bfloat16, n, k, (1, 2, 4, 8, 16, 32, 64, 257, 1024)
    for dtype, (n, k) in product((torch.float16, torch.float32), BARK[::2]):
        yield dtype, n, k, (1, 8, 32, 64, 1024)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "n", "k", "row_counts"), list(barks_shapes()), ids=str)
def test_barks_shapes(dtype: torch.dtype, n: int, k: int, row_counts: tuple[int, ...]) -> None:
    for rows in row_counts:
        c = case(rows, n, k, dtype, "cuda", bias=False)
        with prefer("triton"):
            got = norm_linear.linear(c.x, c.weight, norm=c.norm, residual=c.residual, gelu=True)
        assert_close(got, c)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_dependent_launches_and_replays_change_nothing(rows: int) -> None:
    """A chain of layers, each reading what the one before wrote, so that a read before the wait would show."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9")
    c = case(rows, 1024, 1024, torch.float16, "cuda", bias=False, gelu=False)
    weights = [c.weight.roll(shift, 0) for shift in range(16)]
    scratch = norm_linear.make_scratch(rows, 1024, c.x.device)

    def chain(pdl: bool) -> Tensor:
        y = c.x.contiguous()
        for weight in weights:
            y = norm_linear.linear(y, weight, norm=c.norm, residual=c.residual, scratch=scratch, pdl=pdl)
        return y

    in_turn, overlapping = chain(False), chain(True)
    assert error(overlapping, in_turn.double()) <= 0.01 * in_turn.abs().max().item()
    for pdl, expected in ((False, in_turn), (True, overlapping)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = chain(pdl)
        for _ in range(3):
            replayed.zero_()
            graph.replay()
            assert torch.equal(replayed, expected)
