"""Checkpoints that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from bark_fast.make_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def tiny_suno_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint in suno's format. Read only: copy it to change it."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-suno", "tiny", "suno", seed=0)


@pytest.fixture(scope="session")
def tiny_hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in Hugging Face's format. Read only: copy it to change it."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-hf", "tiny", "hf", seed=0)
