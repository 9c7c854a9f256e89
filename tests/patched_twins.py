"""The same call on a model unpatched and patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import bark_fast


def both(model: Any, call: Callable[[Any], Any], seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """What `call(model)` gives unpatched and patched, each after `torch.manual_seed(seed)`."""
    assert not bark_fast.is_patched(model)
    torch.manual_seed(seed)
    expected = call(model)
    with bark_fast.patched(model, **options):
        torch.manual_seed(seed)
        got = call(model)
    return expected, got
