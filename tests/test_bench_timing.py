"""What is timed on a GPU, without one: the order of events, what a call is given, and how cold it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import bench_attention
import bench_paged_kv
import bench_paged_kv_cuda
import bench_sampling
import gpu_timing
import harness
import pytest
import torch
from bench_paged_kv_cuda import sdpa_name

from bark_fast import extension
from bark_fast.ops.rule_rows import pack_rules
from bark_fast.sampling import SamplingRule


def test_the_host_launches_before_the_clock_of_the_gpu_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Anything:
        """A stream, an event, a graph, or the block in which one is captured."""

        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...
        def wait_stream(self, _: object) -> None: ...
        def synchronize(self) -> None: ...

        def record(self) -> None:
            said.append("record")

        def replay(self) -> None:
            said.append("replay")

        def elapsed_time(self, _: object) -> float:
            return 2.0

    names = ("Stream", "current_stream", "stream", "CUDAGraph", "graph", "Event")
    cuda = SimpleNamespace(**dict.fromkeys(names, Anything), _sleep=lambda cycles: said.append("sleep"))
    monkeypatch.setattr(gpu_timing, "torch", SimpleNamespace(cuda=cuda))
    calls: list[int] = []
    assert gpu_timing.replay_times(lambda: calls.append(1), repeats=7) == [2e-3] * 2
    assert said == ["sleep", "record", "replay", "record"] * 7 and len(calls) == 4


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["the program's"]

    @contextmanager
    def stream(of: str) -> Iterator[None]:
        before, current[0] = current[0], of
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def graph(graph: object, stream: str = "torch's for captures") -> Iterator[None]:
        current[0] = stream
        yield
        raise RuntimeError("capture failed")  # as torch's does before it sets the stream back

    side = SimpleNamespace(wait_stream=lambda _: None, synchronize=lambda: None)
    cuda = SimpleNamespace(
        Stream=lambda: side, current_stream=lambda: None, stream=stream, CUDAGraph=object, graph=graph
    )
    monkeypatch.setattr(gpu_timing, "torch", SimpleNamespace(cuda=cuda))
    with pytest.raises(RuntimeError, match="capture failed"):
        gpu_timing.replay_times(lambda: None)
    assert current == ["the program's"]


def test_an_error_that_stays_ends_the_program_after_the_row_that_says_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken: list[str] = []

    def synchronize() -> None:
        if broken:
            raise RuntimeError(broken[0])

    def times() -> list[float]:
        broken.append("an illegal memory access was encountered")
        raise RuntimeError(broken[0])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert gpu_timing.try_quantiles("one", lambda: [1.0])["error"] == ""
    row = gpu_timing.try_quantiles("another", times)
    assert (row["p50"], row["error"]) == ("", f"RuntimeError: {broken[0]}")
    with pytest.raises(RuntimeError, match="illegal"):
        gpu_timing.try_quantiles("a third", lambda: [1.0])


@pytest.mark.parametrize("fails", [False, True])
def test_sampling_has_a_row_a_contender(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    def timed(call: Callable[[], object]) -> list[float]:
        if fails and call.func is bench_sampling.kernel_calls:
            raise ValueError("no such kernel")
        return [20 * 7e-6]

    measure = partial(bench_sampling.measure, copy=1e12, timed=timed, compiles=False, device="cpu")
    ours, theirs = measure(2, bench_sampling.SEMANTIC, "suno", "top-k and top-p")
    assert (ours["contender"], ours["target"], ours["met"]) == ("ours", 8e-6, not fails)
    assert theirs["p50"] == pytest.approx(7e-6) and theirs["met"] == ""
    assert theirs["share_of_copy_bandwidth"] == pytest.approx(2 * 10_048 * 4 / 7e6)
    assert bool(ours["error"]) is fails and list(ours) == list(theirs)


@pytest.mark.parametrize("fails", ["SDPA flash", "ours", "none"])
def test_attention_is_held_against_the_best_backend_that_runs(
    monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    takes = dict(zip(bench_attention.BACKENDS, (1e-6, 2e-6, 3e-6, 4e-6), strict=True))
    takes |= {"ours": 1.9e-6, "formula, eager": 5e-6}

    def contenders(causal: bool, compiles: bool) -> Iterator[tuple[str, str]]:
        yield from zip(takes, takes, strict=True)

    def seconds(name: str, projections: list[torch.Tensor]) -> list[float]:
        if name == fails:
            raise RuntimeError("no kernel")
        return [takes[name]]

    monkeypatch.setattr(bench_attention, "contenders", contenders)
    monkeypatch.setattr(bench_attention, "layers", lambda *_: [])
    monkeypatch.setattr(bench_attention, "seconds", seconds)
    rows = {row["contender"]: row for row in bench_attention.measure((16, 1, True), torch.float32, 1e12, False)}
    assert list(rows) == list(takes) and len({tuple(row) for row in rows.values()}) == 1
    best = "SDPA cuDNN" if fails == "SDPA flash" else "SDPA flash"
    assert rows["ours"]["met"] is (fails == "SDPA flash")  # 2.0 of 1.9, or 1.0 of 1.9
    assert fails == "ours" or rows["ours"]["best_sdpa"] == best
    assert rows["formula, eager"]["speed_of_best_sdpa"] == pytest.approx(takes[best] / 5e-6)


def test_decode_attention_without_a_cuda_part_says_so_in_a_row(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def timed(step: Callable[[], None]) -> list[float]:
        if step is steps["cuda"]:
            step()
        return [2 * 5e-6]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(bench_paged_kv_cuda.paged_kv, "compiled", lambda gpu: None)
    monkeypatch.setattr(bench_paged_kv_cuda.extension, "cuda_fault", lambda gpu: "built without CUDA")
    monkeypatch.setattr(bench_paged_kv_cuda, "layers_for", lambda *_: 2)
    monkeypatch.setattr(bench_paged_kv_cuda, "replay_times", timed)
    steps = bench_paged_kv_cuda.decode_steps(1, 20, 2, torch.float32, "cpu")
    rows = {row["contender"]: row for row in bench_paged_kv_cuda.rows_of(1e-6, steps, 2, batch=1, keys=20)}
    assert list(rows)[1:] == ["cuda", "triton", "triton, storing", "triton, storing apart"]
    assert (rows["cuda"]["error"], rows["cuda"]["met"]) == ("RuntimeError: built without CUDA", False)
    assert "FAILED cuda: batch 1, keys 20: RuntimeError: built without CUDA" in capsys.readouterr().out
    assert rows["triton"]["met"] is rows["triton, storing"]["met"] is True
    assert rows["triton, storing apart"]["met"] == "" and len({tuple(row) for row in rows.values()}) == 1


def test_targets_of_decode_attention() -> None:
    target = bench_paged_kv_cuda.target
    assert target("cuda", {"batch": 64, "keys": 1024}, 1.0, 0.79) == {"target": 0.8, "met": False}
    assert target("cuda, storing", {"batch": 64, "keys": 1024}, 1.0, 0.8) == {"target": 0.8, "met": True}
    assert target("triton", {"batch": 1, "keys": 257}, 7e-6, 0.9) == {"target": 6e-6, "met": False}
    for other in ("sdpa (math)", "cuda, storing apart"):
        assert target(other, {"batch": 1, "keys": 257}, 1e-6, 0.9)["target"] == ""
    assert target("triton", {"tokens": 887}, 1e-6, 0.9)["target"] == ""  # a prefill


@pytest.mark.parametrize(("peer", "batch", "wanted"), [("sdpa", 1, 1.0), ("sdpa", 16, 1.5), ("read", 488, 0.7)])
def test_targets_of_paged_attention_on_a_cpu(peer: str, batch: int, wanted: float) -> None:
    for ratio in (0.99 * wanted, 1.01 * wanted):
        seconds = {"paged": [1.0] * 3, peer: [ratio] * 3}
        (row,) = bench_paged_kv.rows_of({"batch": batch}, seconds, live_bytes=1)
        assert (row["target"], row["met"]) == (wanted, ratio > wanted)


def test_draws_write_where_a_decode_step_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, places = bench_sampling.inputs(3, 50, "cpu")
    rows = pack_rules([SamplingRule("suno", ((0, 50),), 50, temperature=0.7)], "cpu").expand(3)
    out = bench_sampling.outputs(3, "cpu")
    out["tokens"].fill_(99)
    monkeypatch.setattr(torch, "zeros", None)  # nothing is made anew
    monkeypatch.setattr(torch, "empty", None)
    given = []
    real = bench_sampling.ops.sample_rows
    monkeypatch.setattr(bench_sampling.ops, "sample_rows", lambda *a, **k: given.append(k) or real(*a, **k))
    monkeypatch.setattr(bench_sampling.ops, "_sample_rows", lambda *a: None)
    bench_sampling.kernel_calls(logits, rows, places, out)
    assert len(given) == bench_sampling.CALLS
    assert all(one["tokens"] is out["tokens"] and one["flag"] is out["flag"] for one in given)


@pytest.mark.parametrize(("window", "width"), [(10_001, 768), (1_024, 1_024)])
def test_heads_are_cold(window: int, width: int) -> None:
    count = bench_sampling.heads_for(window, width)
    assert (count - 1) * window * width * 2 < gpu_timing.COLD_BYTES <= count * window * width * 2


def test_the_backend_of_sdpa_is_named() -> None:
    q, k, v = torch.randn(3, 1, 2, 8, 16)
    assert sdpa_name(q, k, v) in ("sdpa (flash_attention)", "sdpa (math)")


def test_a_cpu_is_named_with_its_instruction_set_even_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU {device}")
    assert harness.machine() == "the GPU cuda" and harness.machine("cuda:1") == "the GPU cuda:1"
    compiled = extension.load()
    assert "cores" in harness.machine("cpu")
    assert compiled is None or harness.machine("cpu").endswith(f"GiB, {compiled.isas()[0]}")
