"""A Hugging Face model of its own for each test, ways to compare it with an untouched twin; suno's module."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from patched_twins import twin_of
from peers import HFPeer
from suno_cases import everything

import bark_fast
from bark_fast.patching import core


@pytest.fixture
def peer(hf_peer: HFPeer) -> HFPeer:
    """An unpatched transformers BarkModel of short windows that the test may do anything to."""
    return twin_of(hf_peer)


@pytest.fixture
def published_windows(peer: HFPeer, hf_peer: HFPeer) -> None:
    """Windows of `peer` as long as those of the published models."""
    peer.model.generation_config = copy.deepcopy(hf_peer.model.generation_config)


@pytest.fixture
def model(peer: HFPeer) -> Any:
    """The model of `peer`."""
    return peer.model


@pytest.fixture
def text(peer: HFPeer) -> Callable[..., dict[str, torch.Tensor]]:
    """Texts as `BarkModel.generate` takes them: padded to 256, with a mask."""

    def encode(*texts: str) -> dict[str, torch.Tensor]:
        return dict(
            peer.tokenizer(
                list(texts), return_tensors="pt", padding="max_length", max_length=256,
                add_special_tokens=False, return_token_type_ids=False,
            )
        )  # fmt: skip

    return encode


@pytest.fixture
def no_decline() -> Iterator[None]:
    """Fails the test if anything is left to the original code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="bark_fast leaves", category=RuntimeWarning)
        yield


@pytest.fixture
def fail_third_swap(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """Call it, and the third module patched from then on is not; returns what every swap is asked for."""

    def begin() -> list[Any]:
        swap, calls = core.swap, []

        def fail_once(*arguments: Any) -> None:
            calls.append(arguments)
            if len(calls) == 3:
                raise MemoryError
            swap(*arguments)

        monkeypatch.setattr(core, "swap", fail_once)
        return calls

    return begin


@pytest.fixture
def generation(suno_peer):
    """`bark.generation` with the tiny checkpoint loaded; put back as it was, and checked for traces."""
    module = suno_peer.bark
    models, before = dict(module.models), everything(module)
    yield module
    bark_fast.unpatch(module)
    module.models.clear()
    module.models.update(models)
    assert everything(module) == before


@pytest.fixture
def bark(generation):
    """The package `bark`."""
    return sys.modules["bark"]
