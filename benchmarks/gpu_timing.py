"""Times on a GPU, and the two rates rooflines are drawn with: bytes copied and products summed a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from harness import quantiles

from bark_fast.engine.capture import nothing_collected

COLD_BYTES = 512 * 2**20
"""Bytes a graph walks through so that each call finds the L2 cold; larger than any GPU's."""

HEAD_START = 4_000_000
"""Cycles, some 2 ms, that keep the GPU busy while the host launches what is timed: launching does not count."""


def require_gpu() -> None:
    """End the program, with a reason, where no GPU is visible."""
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU is visible to torch; this benchmark needs one")


def replay_times(call: Callable[[], object], repeats: int = 50) -> list[float]:
    """Seconds of each replay of a graph of `call`, by CUDA events."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # what the call works on has been written
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), nothing_collected(), torch.cuda.graph(graph, stream=stream):
        call()  # a capture that fails leaves its stream current; the outer block does not
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times[5:]


@contextmanager
def going_on(what: str) -> Iterator[list[str]]:
    """Print an error of the block after "FAILED", for who searches logs, and go on; yields what was printed.

    It begins by waiting for the GPU. Where an error of CUDA stays, as that of an illegal address does, this
    raises and ends the program, after what came before has kept its rows.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    said: list[str] = []
    try:
        yield said
    except Exception as why:  # compilers of kernels raise in many ways
        said.append(" ".join(f"{type(why).__name__}: {why}".split())[:200])
        print(f"FAILED {what}: {said[0]}", flush=True)


def try_quantiles(what: str, times: Callable[[], list[float]]) -> dict[str, Any]:
    """Quantiles of what `times` measures, empty where it fails, and the column "error", which says why."""
    found: dict[str, Any] = {"p20": "", "p50": "", "p80": "", "repeats": 0}
    with going_on(what) as said:
        found = quantiles(times())
    return {**found, "error": "".join(said)}


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / quantiles(replay_times(lambda: target.copy_(source)))["p50"]


def matmul_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """Operations (two a product) a second of torch's square matrix product; float32 without TF32."""
    left, right = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        times = replay_times(lambda: torch.mm(left, right, out=out), 20)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / quantiles(times)["p50"]
