"""A Hugging Face model to do anything to, and the same call on it unpatched and patched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peers import HFPeer

import bark_fast

SHORT_WINDOWS = {
    "coarse_acoustics_config": {
        "max_coarse_input_length": 64, "max_coarse_history": 90, "sliding_window_len": 20,
    },
    "fine_acoustics_config": {"max_fine_input_length": 128, "max_fine_history_length": 64},
}  # fmt: skip
"""They slide within a second of speech, and a fine pass costs an eighth. Published: 256, 630, 60, 1024, 512."""


def twin_of(peer: HFPeer) -> HFPeer:
    """A peer with an unpatched model of its own, whose windows are short."""
    twin = copy.copy(peer)
    twin.model = copy.deepcopy(peer.model)
    for stage, windows in SHORT_WINDOWS.items():
        getattr(twin.model.generation_config, stage).update(windows)
    return twin


def both(model: Any, call: Callable[[Any], Any], seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """What `call(model)` gives unpatched and patched, each after `torch.manual_seed(seed)`."""
    assert not bark_fast.is_patched(model)
    torch.manual_seed(seed)
    expected = call(model)
    with bark_fast.patched(model, **options):
        torch.manual_seed(seed)
        got = call(model)
    return expected, got
