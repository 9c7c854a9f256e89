"""What is timed on a GPU, without one: the order of events, what a call is given, and how cold it is."""

from __future__ import annotations

from types import SimpleNamespace

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
