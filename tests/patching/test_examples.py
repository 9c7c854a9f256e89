"""The examples run as they stand in the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from oracles import hf

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("hf_peer")
def test_patch_hf(tiny_hf_dir, tmp_path):
    hf()
    said = run("patch_hf.py", "--model", str(tiny_hf_dir), "--tokens", "20", "Hello.", folder=tmp_path)
    assert "the same speech" in said
    assert "generate in the engine" in said
    assert (tmp_path / "patched.wav").stat().st_size > 10_000


@pytest.mark.usefixtures("suno_peer")
def test_patch_suno(tiny_suno_dir, tmp_path):
    said = run("patch_suno.py", "--checkpoint", str(tiny_suno_dir), "--seconds", "0.5", folder=tmp_path)
    assert "tokens equal: True" in said
    assert "runs in the engine" in said
