"""C++ tests of page pool, linear layers and attention, plain and under address, UB and thread sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def build(folder: Path, *flags: str) -> Path:
    program = folder / "test_page_pool"
    sources = (CSRC / "tests" / "test_page_pool.cpp", CSRC / "page_pool.cpp")
    command = (COMPILER, "-std=c++17", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror", *flags)
    subprocess.run((*command, *sources, "-o", program), check=True)
    return program


def build_linear(folder: Path, *flags: str) -> Path:
    """Portable code only, which has the same loops over rows, columns and pieces as the others."""
    program = folder / "test_linear"
    kernels = ("linear", "gemm", "flash")
    names = (
        *kernels,
        *(f"{name}_portable" for name in kernels),
        "stages",
        "parallel",
        "isa",
        "tests/test_linear",
    )
    command = (COMPILER, "-std=c++17", "-O2", "-pthread", "-Wall", "-Wextra", *flags)
    subprocess.run((*command, *(CSRC / f"{name}.cpp" for name in names), "-o", program, "-ldl"), check=True)
    return program


def check_linear(program: Path) -> None:
    done = subprocess.run((program,), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "linear layers and attention agree" in done.stdout
    assert "ERROR" not in done.stderr and "WARNING" not in done.stderr


def check(program: Path, operations: int, threaded: int, seed: int = 0) -> None:
    command = (program, str(operations), str(seed), str(threaded))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{operations} random operations agree" in done.stdout
    assert "ERROR" not in done.stderr and "WARNING" not in done.stderr


def test_millions_of_random_operations(tmp_path):
    check(build(tmp_path), operations=3_000_000, threaded=20_000)


def test_linear_layers(tmp_path):
    check_linear(build_linear(tmp_path))


@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_clean_under_sanitizers(tmp_path, kind):
    # -O2 takes twice as long to compile, and -g half as long again
    flags = ("-O1", f"-fsanitize={kind}", "-fno-sanitize-recover=all", "-g1")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    made = subprocess.run((COMPILER, *flags, probe, "-o", tmp_path / "probe"), capture_output=True)
    if made.returncode or subprocess.run((tmp_path / "probe",), capture_output=True).returncode:
        pytest.skip(f"{COMPILER} has no -fsanitize={kind} here")
    check(build(tmp_path, *flags), operations=150_000, threaded=2_000, seed=1)
    check_linear(build_linear(tmp_path, *flags))
