"""scripts/gpu_check.sh with stubs for every command: parts get their time, and a table comes in any case."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
PLANNED = 530
pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which("timeout")), reason="needs Linux and coreutils"
)
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts the script on a copy of the tree that has little in it; `body` is what each part does."""
    for folder in ("scripts", "bark_fast/kernels", "benchmarks/results", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "benchmarks" / "results" / "rows.csv").write_text("a,b\n")

    def begin(body: str, seconds: int, capabilities: str = "9.0") -> subprocess.Popen[str]:
        for name in ("python3", "nvidia-smi", "compute-sanitizer"):
            stub = tmp_path / "bin" / name
            quick = '[ "$1" = -c ] && exit 0' if name == "python3" else ""
            body_of = f"echo '{capabilities}'" if name == "nvidia-smi" else body
            stub.write_text(f"#!/bin/sh\n{quick}\n{body_of}\n")
            stub.chmod(0o755)
        return subprocess.Popen(
            [tmp_path / "scripts" / "gpu_check.sh", tmp_path / "out"],
            env={
                **os.environ,
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "GPU_CHECK_SECONDS": str(seconds),
            },
            stdout=subprocess.PIPE,
            text=True,
        )

    monkeypatch.delenv("BARK_FAST_CUDA", raising=False)
    return begin


def table(said: str) -> dict[str, str]:
    """Exit status by part."""
    return dict(re.findall(r"^(\S+) +exit (\S+)", said, re.MULTILINE))


def test_limits_one_after_another_fill_the_plan() -> None:
    plan = re.findall(r"^(begin|finish|alone) (.*)$", SCRIPT.read_text(), re.MULTILINE)
    seconds = [int(rest.split()[0 if word == "finish" else 1]) for word, rest in plan if word != "begin"]
    assert sum(seconds) == PLANNED <= 540 - 5
    assert f"owed={PLANNED} " in SCRIPT.read_text()


def test_parts_that_use_all_of_their_time_leave_the_others_theirs(start: Start, tmp_path: Path) -> None:
    started = time.monotonic()
    said, _ = (script := start("exec sleep 100", 20)).communicate()
    assert time.monotonic() - started < 22
    assert len(table(said)) > 20 and set(table(said).values()) == {"124"}
    assert not any("no time was left" in log.read_text() for log in (tmp_path / "out").glob("*.log"))
    assert script.returncode == 1


@pytest.mark.parametrize(("body", "code"), [("exit 0", 0), ('[ "$2" = bark_fast.cli ] && exit 3; exit 0', 1)])
def test_the_exit_status_is_that_of_the_parts(start: Start, tmp_path: Path, body: str, code: int) -> None:
    said, _ = (script := start(body, 60)).communicate()
    assert script.returncode == code
    assert [name for name, status in table(said).items() if status != "0"] == ["checkpoint", "doctor"] * code
    assert (tmp_path / "out" / "rows.csv").exists()


def test_time_that_is_not_used_goes_to_the_next_part(start: Start) -> None:
    said, _ = start('case "$*" in *bench_e2e*small*) sleep 2;; esac; exit 0', 12).communicate()
    assert table(said)["e2e-small"] == "0"  # of its own it has 0.45 s


def bodies(**lines: str) -> str:
    """A command that prints lines by a word of its arguments."""
    cases = "".join(f"*{word}*) printf '%b' '{text}';; " for word, text in lines.items())
    return f'case "$*" in {cases}esac'


def test_what_is_worth_knowing_fits_into_the_end_of_the_output(start: Start, tmp_path: Path) -> None:
    failed = "".join(f"FAILED tests/test_it.py::test_{i} - {'why ' * 40}\\n" for i in range(9))
    rows = "".join(f"row {i} {'and what it is ' * 10}, wanted at most 8 us: met\\n" for i in range(40))
    body = bodies(
        setup="bark_fast: built _C with CPU (portable) and CUDA (sm_90)\\n", pytest=failed,
        bench_decode="static cache 1 ms, wanted 1.5 times ours: NOT MET\\nours, wanted 3: met\\n",
        bench_norm="FAILED bark_fast: qkv\\n7 us, wanted 8 us: met\\n", bench_=rows,
    )  # fmt: skip
    said, _ = (script := start(body, 60)).communicate()
    told = said[said.index("CUDA part: built, CUDA (sm_90)") :]
    assert len(said) < 12_000 and len(table(told)) == 31
    failures = (tmp_path / "out" / "failures.txt").read_text()
    assert re.findall(r"^engine: FAILED tests/test_it.py::test_(.) - why", failures, re.MULTILINE) == list(
        "01234"
    )
    assert "\nengine: FAILED tests/test_it.py::test_0 - why" in told  # if not all fit, the first of each log
    assert "\nnorm_linear: FAILED bark_fast: qkv\n" in told
    assert "\ndecode: ours, wanted 3: met\n" in told and "\nspeech: row 0 " in told and "row 12 " not in told
    assert "\ncompile_decode: static cache 1 ms, wanted 1.5 times ours: NOT MET\n" in told
    assert "compile_linear: 7 us" not in told
    assert script.returncode == 1  # though every part's exit status is 0
    with tarfile.open(tmp_path / "out" / "all.tgz") as files:
        kept = {Path(name).name for name in files.getnames()}
    assert kept >= {"report.txt", "summary.txt", "failures.txt", "rows.csv", "engine.log", "mlp.log"}
    assert "all.tgz" not in kept


@pytest.mark.parametrize(
    ("built", "told"),
    [
        ("bark_fast: built _C with CPU (portable), without CUDA: no nvcc found", "no nvcc found"),
        ("bark_fast: _C left out: compiling failed", "compiling failed"),
        ("", "the build said nothing"),
    ],
)
def test_a_cuda_part_that_is_missing_is_told(start: Start, built: str, told: str) -> None:
    said, _ = start(
        bodies(setup=built, doctor="and CUDA; Triton takes its place on cuda:0 (old)"), 60
    ).communicate()
    assert re.search(f"^CUDA PART MISSING: .*{told}$", said, re.MULTILINE)
    assert "\nCUDA PART NOT USED: Triton takes its place on cuda:0 (old)\n" in said


@pytest.mark.parametrize(
    ("capabilities", "archs"), [("8.0", "80"), ("9.0\n9.0\n10.0", "100 90"), ("[N/A]", "90"), ("", "90")]
)
def test_the_cuda_part_is_built_for_the_gpus_that_are_here(
    start: Start, tmp_path: Path, capabilities: str, archs: str
) -> None:
    said, _ = start('echo "for $BARK_FAST_CUDA"', 60, capabilities).communicate()
    assert (tmp_path / "out" / "build.log").read_text() == f"for {archs}\n"
    assert ("names no compute capability" in said) is ("." not in capabilities)


def test_a_signal_ends_the_parts_and_the_table_comes_all_the_same(start: Start, tmp_path: Path) -> None:
    script = start(f"echo $$ >> {tmp_path}/pids; exec sleep 100", 600)
    pids = tmp_path / "pids"
    while not pids.exists() or len(pids.read_text().split()) < 2:
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    said, _ = script.communicate(timeout=20)
    assert script.returncode == 143
    assert table(said) == {"build": "143", "checkpoint": "143"}
    assert (tmp_path / "out" / "rows.csv").exists()
    for pid in map(int, pids.read_text().split()):
        assert not Path(f"/proc/{pid}").exists()


def test_every_file_with_tests_for_a_gpu_is_run() -> None:
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    named = SCRIPT.read_text()
    assert len(files) > 15
    assert not [path for path in files if path != Path(__file__) and str(path.relative_to(ROOT)) not in named]


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["plain", "xdist"])
def test_tests_that_are_ended_still_say_what_failed(tmp_path: Path, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text(
        "import pathlib, time\n"
        "def test_a(): assert 'found' == 'wanted'\n"
        f"def test_b(): time.sleep(1); pathlib.Path({str(tmp_path / 'there')!r}).touch(); time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "-p", "conftest"]
    paths = os.pathsep.join(str(ROOT / name) for name in ("tests", "benchmarks", "."))
    run = subprocess.Popen(
        [*command, "-p", "no:cacheprovider", *workers, tmp_path / "test_it.py"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "there").exists():
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)  # as `timeout` does
    said, _ = run.communicate(timeout=60)
    assert "AssertionError: assert 'found' == 'wanted'" in said and "1 failed" in said
