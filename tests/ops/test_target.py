"""Launches happen on the GPU that their tensors lie on, whichever is the current one."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bark_fast.ops

pytest.importorskip("triton")
OPS = Path(bark_fast.ops.__file__).parent


def launching() -> list[tuple[str, str]]:
    """(module of kernels, function) of each call that operations make there with tensors."""
    calls = []
    for path in sorted(OPS.glob("*.py")):
        _, *imports = path.read_text().split("from bark_fast.kernels import ")
        for after in imports:
            calls += [(after.split()[0], name) for name in re.findall(r"\bkernels\.(\w+)\(", after)]
    return [call for call in dict.fromkeys(calls) if not call[1].endswith("_scratch")]


@pytest.mark.parametrize(("module", "name"), launching())
def test_operations_call_what_chooses_the_device(module: str, name: str) -> None:
    function = getattr(import_module(f"bark_fast.kernels.{module}"), name, None)
    assert hasattr(function, "__wrapped__"), f"kernels/{module}.py: {name} wants @on_its_device"


def test_all_families_are_seen() -> None:
    assert len(launching()) >= 13


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", [1]), ("cuda:0", []), ("cpu", [])])
def test_another_gpu_becomes_the_current_one(monkeypatch, device: str, expected: list[int]) -> None:
    from bark_fast.kernels.target import on_its_device

    entered, seen = [], []

    @contextmanager
    def enter(there: torch.device):
        entered.append(there.index)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)

    @on_its_device
    def launch(tensor: torch.Tensor, *, by: int) -> int:
        seen.append(list(entered))
        return by

    with FakeTensorMode():
        assert launch(torch.empty(2, device=device), by=3) == 3
    assert seen == [expected]
    assert entered == [*expected, *["left"] * len(expected)]


def test_two_threads_never_launch_at_once() -> None:
    """Triton's cache of kernels has no lock; launchers call one another."""
    from bark_fast.kernels.target import on_its_device

    tensor, within, most = torch.empty(2), [], []

    @on_its_device
    def launch(tensor: torch.Tensor) -> None:
        within.append(None)
        time.sleep(0.02)
        most.append(len(within))
        within.pop()

    @on_its_device
    def launch_another(tensor: torch.Tensor) -> None:
        launch(tensor)

    threads = [Thread(target=launch_another, args=(tensor,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


@pytest.mark.gpu
def test_the_second_gpu_while_the_first_is_current() -> None:
    from bark_fast.ops.norm_linear import norm_linear

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, weight = torch.randn(3, 64), torch.randn(32, 64)
    norm = torch.ones(64)
    there = norm_linear(*(tensor.to("cuda:1") for tensor in (x, norm)), None, weight.to("cuda:1"))
    assert torch.allclose(there.cpu(), norm_linear(x, norm, None, weight), atol=1e-4)
