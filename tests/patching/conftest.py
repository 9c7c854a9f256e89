"""A Hugging Face model of its own for each test, and ways to compare it with an untouched twin."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peers import HFPeer


@pytest.fixture
def peer(hf_peer: HFPeer) -> HFPeer:
    """An unpatched transformers BarkModel that the test may do anything to."""
    twin = copy.copy(hf_peer)
    twin.model = copy.deepcopy(hf_peer.model)
    return twin


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
