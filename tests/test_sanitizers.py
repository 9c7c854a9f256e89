"""The C++ tests of csrc/tests, plain and under address, UB and thread sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)

STAGES = ("stages", "parallel", "isa")
SOURCES = {
    "test_page_pool": ("page_pool",),
    # portable code only, which has the same loops over rows, columns, keys and pieces as the others
    "test_linear": (
        *(f"{name}{of}" for name in ("linear", "gemm", "flash") for of in ("", "_portable")),
        *STAGES,
    ),
    "test_paged_kv": ("paged_kv", "paged_kv_portable", "attention_stage", *STAGES),
}
"""What each is compiled with."""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def check(folder: Path, name: str, flags: tuple[str, ...], *arguments: int) -> str:
    """Compile a test and run it; what it prints."""
    program = folder / name
    sources = (CSRC / f"{source}.cpp" for source in (f"tests/{name}", *SOURCES[name]))
    command = (COMPILER, "-std=c++17", "-pthread", "-Wall", "-Wextra", "-Werror", *flags)
    subprocess.run((*command, *sources, "-o", program, "-ldl"), check=True)
    done = subprocess.run((program, *map(str, arguments)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ERROR" not in done.stderr and "WARNING" not in done.stderr
    return done.stdout


def test_millions_of_random_operations(tmp_path):
    said = check(tmp_path, "test_page_pool", ("-O2",), 3_000_000, 0, 20_000)
    assert "3000000 random operations agree" in said


def test_linear_layers(tmp_path):
    assert "linear layers and attention agree" in check(tmp_path, "test_linear", ("-O2",))


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("test_page_pool", (150_000, 1, 2_000), "150000 random operations agree"),
        ("test_linear", (), "linear layers and attention agree"),
        ("test_paged_kv", (), "the paged cache agrees"),
    ],
)
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_clean_under_sanitizers(tmp_path, kind, name, arguments, says):
    # -O2 takes twice as long to compile, and -g half as long again
    flags = ("-O1", f"-fsanitize={kind}", "-fno-sanitize-recover=all", "-g1")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    made = subprocess.run((COMPILER, *flags, probe, "-o", tmp_path / "probe"), capture_output=True)
    if made.returncode or subprocess.run((tmp_path / "probe",), capture_output=True).returncode:
        pytest.skip(f"{COMPILER} has no -fsanitize={kind} here")
    assert says in check(tmp_path, name, flags, *arguments)
