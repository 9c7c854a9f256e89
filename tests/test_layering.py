"""Imports go down only, and importing the package stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bark_fast

PACKAGE = Path(bark_fast.__file__).parent

FLOORS = {
    "__main__": 7, "cli": 7,
    "pipeline": 6, "patching": 6, "progress": 6, "device": 6, "randomness": 6, "options": 6, "loading": 6,
    "chunks": 6, "streaming": 6,
    "stages": 5,
    "engine": 4,
    "modules": 3,
    "ops": 2, "backend_report": 2,
    "kernels": 1, "extension": 1,
    "config": 0, "sampling": 0, "rule_layout": 0, "work": 0, "audio": 0, "bars": 0, "numeric": 0, "errors": 0,
}  # fmt: skip
ANNEX = {
    "text",
    "voices",
    "checkpoint",
    "random_checkpoint",
}  # beside floor 5; they see floor 0 and one another
NARROW = {"stages": 0}  # rooms that see less than the floors below them


def rooms_imported(source: str) -> set[str]:
    """Rooms of bark_fast that `source` imports, at any depth of nesting, types included."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "bark_fast" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms & (FLOORS.keys() | ANNEX)


def violations(room: str, imported: set[str]) -> set[str]:
    """Rooms that `room` must not see."""
    allowed = {room}
    if room in ANNEX:
        allowed |= ANNEX | {r for r, floor in FLOORS.items() if floor == 0}
    else:
        highest = NARROW.get(room, FLOORS[room])
        allowed |= {r for r, floor in FLOORS.items() if floor <= highest}
        allowed |= ANNEX if FLOORS[room] > 5 else set()
    return imported - allowed


def source_files() -> list[Path]:
    """Every module of the package except its lazy front door."""
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in FLOORS.keys() | ANNEX, f"{room} has no floor: give it one here and in docs/architecture.md"
    assert not violations(room, rooms_imported(path.read_text()))


def test_an_upward_import_is_noticed() -> None:
    inside = "def f():\n    from bark_fast.engine.runner import EagerRunner\n"
    assert violations("modules", rooms_imported(inside)) == {"engine"}
    assert violations("stages", rooms_imported("import bark_fast.ops.noise")) == {"ops"}
    assert violations("text", rooms_imported("from bark_fast import pipeline")) == {"pipeline"}


def test_sources_are_not_missing() -> None:
    assert len(source_files()) > 30


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_fast_and_pulls_in_nothing_heavy() -> None:
    code = """
import sys, time
import torch
start = time.perf_counter()
import bark_fast
spent = time.perf_counter() - start
print(spent, *sorted({"transformers", "triton", "encodec", "torchaudio"} & set(sys.modules)))
"""
    best, *heavy = min(run_python(code).split() for _ in range(3))
    assert float(best) < 0.05
    assert not heavy


def test_loading_the_pipeline_imports_neither_transformers_nor_triton() -> None:
    code = "import sys, bark_fast.pipeline; print({'transformers', 'triton', 'torchaudio'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


def test_every_public_name_resolves() -> None:
    for name in bark_fast.__all__:
        assert getattr(bark_fast, name) is not None
    assert set(bark_fast.__all__) <= set(dir(bark_fast))
    # importing a submodule sets its name in the package, over a function's of the same name
    assert not {path.stem for path in source_files()} & set(bark_fast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = bark_fast.nonsense
