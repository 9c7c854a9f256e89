"""suno's bark with a checkpoint, checked for traces after each test."""

from __future__ import annotations

import sys

import pytest
from suno_cases import everything

import bark_fast


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
