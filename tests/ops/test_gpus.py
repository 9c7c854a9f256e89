"""GPUs that Triton's kernels run on, in part or not at all; what is in use where they do not."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bark_fast.backend_report import backends
from bark_fast.device import pick_dtype
from bark_fast.engine.graph_runner import GraphRunner
from bark_fast.engine.runner import EagerRunner
from bark_fast.errors import InvalidInput
from bark_fast.loading import runner_kind
from bark_fast.ops import gpus
from bark_fast.ops.dispatch import prefer, preferred, uses_triton

pytest.importorskip("triton")
GPU = torch.device("cuda", 1)
FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def machine(monkeypatch):
    """Sets the compute capability of all GPUs, and what launching on one of them raises."""
    caches = (gpus.has_triton, gpus.is_from_ampere_on, gpus.triton_fault, gpus._launch_fault)

    def pretend(capability: tuple[int, int], fault: Exception | None = None) -> None:
        def probe(out: torch.Tensor) -> None:
            assert out.device == GPU
            if fault is not None:
                raise fault

        for one in caches:
            one.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
        monkeypatch.setattr("bark_fast.kernels.probe.probe", probe)

    with FakeTensorMode():
        yield pretend
    for one in caches:
        one.cache_clear()


@pytest.mark.parametrize(
    ("capability", "auto", "runs", "multiplies"),
    [
        ((7, 0), HALF, set(), False),
        ((7, 5), HALF, {FULL, HALF}, False),  # torch says it has bfloat16: it means in plain arithmetic
        ((8, 0), BRAIN, {FULL, HALF, BRAIN}, True),
        ((12, 0), BRAIN, {FULL, HALF, BRAIN}, True),
    ],
)
def test_what_runs_where(machine, capability, auto, runs, multiplies) -> None:
    machine(capability)
    assert pick_dtype("auto", GPU) == auto
    for dtype in (FULL, HALF, BRAIN):
        tensor = torch.empty(2, 64, dtype=dtype, device=GPU)
        assert uses_triton(tensor, head_dim=64) == (dtype in runs)
        assert uses_triton(tensor, multiplies=True) == (dtype in runs and multiplies)
        assert not uses_triton(tensor, head_dim=48)
        if dtype in runs:
            assert runner_kind(GPU, dtype) is GraphRunner
        else:
            with pytest.warns(RuntimeWarning, match=r"on cuda:1 .* slower: compute capability 7\.[05] "):
                assert runner_kind(GPU, dtype) is EagerRunner


def test_amds_number_their_gpus_otherwise(machine, monkeypatch) -> None:
    machine((6, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert uses_triton(torch.empty(2, dtype=BRAIN, device=GPU), multiplies=True)
    assert pick_dtype("auto", GPU) == BRAIN


def test_where_nothing_can_be_launched_torch_runs_and_says_why(machine, monkeypatch) -> None:
    machine((8, 6), RuntimeError("Failed to find C compiler.\nSet CC"))
    reason = "Triton cannot launch a kernel (RuntimeError: Failed to find C compiler.)"
    assert gpus.triton_fault(1) == reason
    tensor = torch.empty(2, device=GPU)
    assert not uses_triton(tensor)
    with prefer("triton"):
        assert uses_triton(tensor)
    with pytest.warns(RuntimeWarning, match="Failed to find C compiler"):
        assert runner_kind(GPU, FULL) is EagerRunner
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpus, "_launch_fault", lambda gpu: reason if gpu == 1 else "")
    told = next(backend for backend in backends() if backend.name == "triton")
    assert told.active and told.reason.endswith(f"; torch takes their place on cuda:1: {reason}")
    gpus.triton_fault.cache_clear()
    monkeypatch.setattr(gpus, "_launch_fault", lambda gpu: reason)
    told = next(backend for backend in backends() if backend.name == "triton")
    assert not told.active and told.reason.count(reason) == 2


def test_a_gpu_without_memory_is_asked_again(machine, monkeypatch) -> None:
    machine((9, 0), RuntimeError("Triton Error [CUDA]: out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        uses_triton(torch.empty(2, device=GPU))
    monkeypatch.setattr("bark_fast.kernels.probe.probe", lambda out: None)
    assert uses_triton(torch.empty(2, device=GPU))
    gpus.triton_fault.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpus, "_launch_fault", Mock(side_effect=RuntimeError("CUDA out of memory.\nMore")))
    told = next(backend for backend in backends() if backend.name == "triton")
    assert not told.active and told.reason.endswith("torch takes their place on cuda:1: CUDA out of memory.")


def test_a_gpu_without_triton_is_told(machine, monkeypatch) -> None:
    machine((9, 0))
    monkeypatch.setattr(gpus, "has_triton", lambda: False)
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert runner_kind(GPU, FULL) is EagerRunner
    with prefer("torch"):
        assert runner_kind(GPU, FULL) is EagerRunner  # as asked for: without a warning
    assert runner_kind(torch.device("cpu"), FULL) is EagerRunner


def test_a_device_without_a_number_is_the_current_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert [gpus.number_of(torch.device(name)) for name in ("cuda", "cuda:0", "cuda:1")] == [2, 0, 1]


def test_products_are_cublas_where_triton_has_no_tensor_cores() -> None:
    from bark_fast.kernels import gemv, matmul, norm_linear
    from bark_fast.kernels.target import KNOWN

    plans = {arch: [norm_linear.plan(KNOWN[arch], HALF, n, 768, 768) for n in (1, 16, 64)] for arch in (75, 86)}
    assert isinstance(plans[75][0], gemv.Tile) and plans[75][1:] == [None, None]
    assert isinstance(plans[86][0], gemv.Tile) and all(isinstance(p, matmul.Tile) for p in plans[86][1:])


def test_the_probe_writes() -> None:
    from bark_fast.kernels.probe import probe

    out = torch.zeros(1, dtype=torch.int32)
    probe(out)
    assert out.item() == 1


@pytest.mark.gpu
def test_nothing_keeps_triton_from_this_gpu() -> None:
    assert [gpus.triton_fault(0, dtype) for dtype in (FULL, HALF, BRAIN)] == [""] * 3


def test_backends_asked_for_within_one_another() -> None:
    assert preferred() == "auto"
    with prefer("torch"):
        with prefer("triton"):
            assert preferred() == "triton"
        assert preferred() == "torch"
        with pytest.raises(InvalidInput, match="backend is 'cuda'; it must be one of auto, torch, triton"):
            prefer("cuda").__enter__()  # type: ignore[arg-type]
        assert preferred() == "torch"
    assert preferred() == "auto"
