"""The simulator that runs the CUDA sources on a CPU: it notices what it is there to notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulated_cuda import COMPILER, build, simulated_cuda, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "it compiles")

TESTS = Path(__file__).parent
ON_SANITIZED = """
import sys
from pathlib import Path

import pytest

sys.path.insert(0, {tests!r})
import simulated_cuda

module = simulated_cuda.SimulatedCuda(simulated_cuda.load(Path({module!r})))
simulated_cuda.simulated_cuda = lambda: module
"""


@pytest.mark.parametrize("kind", ["barrier", "shuffle"])
def test_threads_that_wait_for_others_in_vain_are_reported(kind: str) -> None:
    lonely = getattr(simulated_cuda().module, f"lonely_{kind}")
    lonely(64)  # everybody is there
    with pytest.raises(RuntimeError, match=rf"waits at a {kind} that not all .* \(block 0, 0, 0\)"):
        lonely(40)


def test_a_missing_barrier_changes_the_result() -> None:
    sums = simulated_cuda().module.sums
    expected = [64 * 63 // 2 + 64 * block for block in range(20)]
    assert sums(True) == expected
    assert sums(False) != expected


def test_cuda_sources_are_clean_under_sanitizers(tmp_path: Path) -> None:
    """Accesses of the kernels past tensors and shared memory, and undefined behaviour."""
    libraries = [
        subprocess.run((COMPILER, f"-print-file-name={name}"), capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"{COMPILER} has no shared libasan and libubsan")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    module = build(tmp_path / "simulated_cuda.so", "-O0", "-g1", *flags)
    settings = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}

    def run(program: str) -> subprocess.CompletedProcess[str]:
        setup = ON_SANITIZED.format(tests=str(TESTS), module=str(module))
        return subprocess.run(
            (sys.executable, "-c", setup + program), env=os.environ | settings, cwd=TESTS.parent,
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip

    assert "heap-buffer-overflow" in run("module.module.write_past_the_end()").stderr
    which = "simulated and (stored or append or copies or gather or absent or outside or moves or share)"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(TESTS / "ops" / "test_paged_kv.py")]
    done = run(f"sys.exit(pytest.main({[*options, '-k', which]}))")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ERROR" not in done.stderr
