"""What the benchmarks of linear layers do besides timing: shapes, plans, entries. Clocks are replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_cases import interpreted
from torch import Tensor

pytest.importorskip("triton")

import bench_mlp
import bench_norm_linear as bench

from bark_fast.kernels import gemv, matmul, norm_linear


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every call runs once and takes a microsecond; torch.compile hands the function back."""
    calls: list[object] = []

    def once(call: Callable[[], object]) -> list[float]:
        calls.append(call())
        return [1e-6]

    monkeypatch.setattr(bench, "replay_times", once)
    monkeypatch.setattr(bench_mlp, "replay_times", once)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(bench, "target_of", lambda device: norm_linear_target())
    monkeypatch.setattr(bench_mlp, "target_of", lambda device: norm_linear_target())
    return calls


def norm_linear_target() -> Any:
    """A chip without dependent launches, which the interpreter does not know."""
    from bark_fast.kernels.target import KNOWN

    return KNOWN[80]


@interpreted
@pytest.mark.parametrize("name", ["qkv", "out", "fc", "proj"])
@pytest.mark.parametrize("rows", [1, 5, 65])
def test_ours_and_torch_compute_the_same_layer(name: str, rows: int) -> None:
    layer = next(layer for layer in bench.layers(8) if layer.name == name)
    o = bench.operands(layer, rows, torch.float32, "cpu", cold_bytes=1)
    weight: Tensor = o.weights[1]
    assert torch.allclose(bench.ours(layer, o)(weight), bench.by_torch(layer, o)(weight), atol=1e-5)


@interpreted
def test_figures_have_one_row_a_backend() -> None:
    layer = replace(bench.layers(8)[0], n=8)
    rows = list(bench.figures(layer, 1, torch.float32, "cpu", copy=1e12, rate=1e12, cold_bytes=1))
    peers = ["torch eager", "cublas alone", "torch.compile (default)"]
    assert [row["backend"] for row in rows] == ["bark_fast", *peers]
    assert rows[0]["share_of_copy_bandwidth"] == pytest.approx(4 * (8 * 8 + 8 + 8) / 0.5e-6 / 1e12)
    assert rows[0]["met"] is False and rows[1]["met"] == ""
    whole = list(bench_mlp.figures(8, 1, torch.float32, "cpu", copy=1e12, rate=1e12, cold_bytes=1))
    assert [row["backend"] for row in whole] == [row["backend"] for row in rows]
    assert whole[0]["met"] is True  # half a microsecond a call, and 3 are granted


@interpreted
def test_who_fails_leaves_the_others_their_rows(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such\nkernel")

    monkeypatch.setattr(bench.kernels, "linear", refuse)
    monkeypatch.setattr(bench_mlp, "layernorm_gelu_mlp", refuse)
    options = {"copy": 1e12, "rate": 1e12, "cold_bytes": 1, "compiles": False}
    linear = list(bench.figures(bench.layers(8)[0], 1, torch.float32, "cpu", **options))
    whole = list(bench_mlp.figures(8, 1, torch.float32, "cpu", **options))
    for rows in (linear, whole):
        assert [row["error"] for row in rows] == ["ValueError: no such kernel", "", ""]
        assert (rows[0]["p50"], rows[0]["met"], rows[1]["p50"]) == ("", False, 0.5e-6)
        assert len({tuple(row) for row in rows}) == 1  # all fit into one file
        bench.show("shape", rows[0], "anything")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["FAILED bark_fast"] * 2


def test_cold_weights_exceed_the_bytes_asked_for() -> None:
    o = bench.operands(bench.layers(8)[0], 1, torch.float16, "cpu", cold_bytes=10_000)
    assert o.weights.nbytes >= 10_000


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layer", bench.layers(768) + bench.layers(1024), ids=lambda layer: layer.name)
def test_candidates_fit_and_have_the_tables_choice(layer: bench.Layer, dtype: torch.dtype, rows: int) -> None:
    plans = list(bench.candidates(layer, rows, dtype))
    assert len(set(plans)) == len(plans)
    scratch = norm_linear.make_scratch(rows, layer.n, torch.device("meta"))
    for plan in plans:
        if isinstance(plan, matmul.Tile):
            sums, counters = plan.partials(rows, layer.n)
            assert sums <= scratch[0].numel() and counters <= scratch[1].numel()
    table = norm_linear.plan(norm_linear_target(), dtype, rows, layer.n, layer.k)
    assert table in plans


@interpreted
def test_the_best_plan_becomes_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = replace(bench.layers(8)[0], n=8)
    plans = [gemv.Tile(4, 32, 1), matmul.Tile(16, 16, 16, 2, 2, 3), None]
    times = iter([3e-6, 1e-6, 2e-6])
    monkeypatch.setattr(
        bench, "seconds", lambda call, weights: [next(times)] if call(weights[0]) is not None else []
    )
    plan, time = bench.best(layer, 3, torch.float32, "cpu", cold_bytes=1, plans=iter(plans))
    assert (plan, time) == (plans[1], 1e-6)
    line = bench.entry(90, layer, 3, torch.float32, plan, time)
    namespace = {"torch": torch, "matmul": matmul, "gemv": gemv}
    assert eval("{" + line + "\n}", namespace) == {(90, torch.float32, 4, 8, 8): plan}
    assert "None," in bench.entry(90, layer, 3, torch.float32, None, time)
