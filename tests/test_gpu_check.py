"""scripts/gpu_check.sh with stubs for every command: parts get their time, and a table comes in any case."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
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
def start(tmp_path: Path) -> Start:
    """Starts the script on a copy of the tree that has little in it; `body` is what each part does."""
    for folder in ("scripts", "bark_fast/kernels", "benchmarks/results", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "benchmarks" / "results" / "rows.csv").write_text("a,b\n")

    def begin(body: str, seconds: int) -> subprocess.Popen[str]:
        for name in ("python3", "nvidia-smi", "compute-sanitizer"):
            stub = tmp_path / "bin" / name
            quick = '[ "$1" = -c ] && exit 0' if name == "python3" else ""
            body_of = "exit 0" if name == "nvidia-smi" else body
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
    said, _ = (script := start("exec sleep 100", 12)).communicate()
    assert time.monotonic() - started < 14
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
    assert table(said)["e2e-small"] == "0"  # of its own it has 0.6 s


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
        f"def test_b(): time.sleep(1); pathlib.Path({str(tmp_path / 'there')!r}).touch(); time.sleep(60)\n"
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
    said, _ = run.communicate(timeout=20)
    assert "AssertionError: assert 'found' == 'wanted'" in said and "1 failed" in said
