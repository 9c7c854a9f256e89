"""Speed of the page pool: operations from C++, and one Python call a scheduler step.

    python benchmarks/bench_page_pool.py [--no-rows]

Compiles csrc/tests/bench_page_pool.cpp, runs it, times `step` from Python, and appends rows to
benchmarks/results/page_pool.csv. `value` is the best of several rounds.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import append_rows

from bark_fast.engine.page_pool import PagePool, make_pool
from bark_fast.engine.python_page_pool import PythonPagePool
from bark_fast.extension import load

CSRC = Path(__file__).parent.parent / "csrc"
PAGE_SIZE, CONTEXT, ROUNDS = 16, 1024, 7


def from_cpp() -> list[dict[str, Any]]:
    """Rows of the C++ benchmark, million operations a second."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "bench_page_pool"
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        sources = (CSRC / "tests" / "bench_page_pool.cpp", CSRC / "page_pool.cpp")
        subprocess.run((*compiler, "-std=c++17", "-O3", "-pthread", *sources, "-o", program), check=True)
        printed = subprocess.run((program,), capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in printed.splitlines()]
    return [row("C++", name, "million operations per s", float(speed) / 1e6) for name, speed in lines]


def from_python(caller: str, pool_of: Any) -> list[dict[str, Any]]:
    """Rows of one `step` call from Python that gives each sequence a token, microseconds a call."""
    return [
        row(caller, f"step_batch_{batch}", "us per call", step_microseconds(pool_of, batch))
        for batch in (1, 16, 64)
    ]


def step_microseconds(pool_of: Any, batch: int) -> float:
    """Mean over sequences that grow from nothing to the whole context, best of several rounds."""
    pages = CONTEXT // PAGE_SIZE
    pool: PagePool = pool_of(batch * pages, PAGE_SIZE)
    handles = np.array([pool.create() for _ in range(batch)])
    n_new, lengths = np.ones(batch, np.int32), np.empty(batch, np.int32)
    tables, slots = np.empty((batch, pages), np.int32), np.empty(batch, np.int64)
    best = float("inf")
    for _ in range(ROUNDS):
        for handle in handles:
            pool.truncate(int(handle), 0)
        start = time.perf_counter()
        for _ in range(CONTEXT):
            pool.step(handles, n_new, tables, slots, lengths)
        best = min(best, (time.perf_counter() - start) / CONTEXT * 1e6)
    return best


def row(caller: str, name: str, unit: str, value: float) -> dict[str, Any]:
    return {"caller": caller, "operation": name, "page_size": PAGE_SIZE, "unit": unit, "value": value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-rows", action="store_true", help="Print only.")
    options = parser.parse_args()
    rows = from_cpp() + from_python("Python, PythonPagePool", PythonPagePool)
    if load() is not None:
        rows += from_python("Python, C++ pool", make_pool)
    for measured in rows:
        print(
            f"{measured['caller']:<24} {measured['operation']:<24} {measured['value']:8.2f} {measured['unit']}"
        )
    if not options.no_rows:
        print(append_rows("page_pool", rows, device="cpu"))


if __name__ == "__main__":
    main()
