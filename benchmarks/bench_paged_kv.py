"""Paged attention on the CPU against torch SDPA over contiguous caches, and against the memory.

python benchmarks/bench_paged_kv.py [--quick]. Ours and the peers take turns within a repeat, and each row's
ratio is the median over repeats, so what else the machine does falls on both. A call goes to the next of as
many layers as the model has: small 12 heads x 12 layers, large 16 x 24. Bandwidth rows use so many sequences
that their keys and values come from memory (2 GB), beside the read bandwidth of torch on the same number of
bytes. Targets: SDPA takes 1.0 times our time at batch 1 and 1.5 times at ragged batch 16; cold keys and values
are read at 70 % of the read bandwidth.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import append_rows, at_least, verdict
from torch import Tensor

from bark_fast.ops import paged_kv

Call = Callable[[], object]
HEAD_DIM = 64
LAYERS = {12: 12, 16: 24}
RAGGED = np.linspace(64, 1024, 16).astype(int).tolist()
COLD_BYTES = 2 * 10**9
ONE_TARGET, RAGGED_TARGET, READ_TARGET = 1.0, 1.5, 0.7
"""Ratios meant for batch 1, for ragged batch 16, and beside reading."""


class Cache:
    """Layers of one ragged batch with one query row a sequence: paged, and as contiguous tensors."""

    def __init__(
        self,
        lengths: list[int],
        n_head: int,
        layers: int,
        page_size: int,
        dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:
        random = torch.Generator(device).manual_seed(0)
        need = [-(-length // page_size) for length in lengths]
        pages = torch.randperm(sum(need), generator=random, device=device).int().cpu()
        self.table = torch.zeros(len(lengths), max(need), dtype=torch.int32)
        for seq, end in enumerate(np.cumsum(need)):
            self.table[seq, : need[seq]] = pages[end - need[seq] : end]
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
        shape = (sum(need), n_head, page_size, HEAD_DIM)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device).to(dtype)

        self.layers = [[drawn(*shape) for _ in "kv"] for _ in range(layers)]
        self.query = drawn(len(lengths), n_head, HEAD_DIM)
        self.out = torch.empty(len(lengths), n_head * HEAD_DIM, dtype=dtype, device=device)
        self.live_bytes = 2 * sum(lengths) * n_head * HEAD_DIM * dtype.itemsize

    def paged(self) -> Call:
        layers = cycle(self.layers)

        def call() -> Tensor:
            k_pages, v_pages = next(layers)
            return paged_kv.paged_attention(
                self.query, k_pages, v_pages, self.table, self.lengths, self.starts, self.out
            )

        return call

    def sequences(self) -> Call:
        """SDPA sequence by sequence over contiguous caches."""
        query = [row[None, :, None] for row in self.query]
        layers = cycle(
            [
                [
                    [paged_kv.gather_kv(pages, table, int(length))[None] for pages in layer]
                    for table, length in zip(self.table, self.lengths, strict=True)
                ]
                for layer in self.layers
            ]
        )
        return lambda: [
            F.scaled_dot_product_attention(q, k, v) for q, (k, v) in zip(query, next(layers), strict=True)
        ]

    def padded(self) -> Call:
        """SDPA over one padded contiguous cache with a mask."""
        longest = int(self.lengths.max())
        mask = (torch.arange(longest) < self.lengths[:, None])[:, None, None]
        caches = []
        for layer in self.layers:
            pair = [p.new_zeros(len(self.lengths), p.shape[1], longest, HEAD_DIM) for p in layer]
            for seq, length in enumerate(self.lengths.tolist()):
                for pages, padded in zip(layer, pair, strict=True):
                    padded[seq, :, :length] = paged_kv.gather_kv(pages, self.table[seq], length)
            caches.append(pair)
        layers = cycle(caches)
        query = self.query[:, :, None]
        return lambda: F.scaled_dot_product_attention(query, *next(layers), attn_mask=mask)


def take_turns(calls: dict[str, Call], repeats: int, span: float) -> dict[str, list[float]]:
    """Seconds a call, `repeats` times for each, about `span` seconds each time."""
    counts = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        start = time.perf_counter()
        call()
        counts[name] = max(1, int(span / (time.perf_counter() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / counts[name])
    return seconds


def meant(peer: str, batch: int) -> float:
    """The ratio that a row is meant to reach."""
    if peer == "read":
        return READ_TARGET
    return ONE_TARGET if batch == 1 else RAGGED_TARGET


def rows_of(shape: dict[str, Any], seconds: dict[str, list[float]], live_bytes: int) -> list[dict[str, Any]]:
    """One row a peer: our time, its time, and the median of their ratios (above 1: ours is faster)."""
    ours = np.array(seconds["paged"])
    rows = []
    for peer, values in seconds.items():
        if peer != "paged":
            low, middle, high = np.quantile(np.array(values) / ours, (0.2, 0.5, 0.8))
            rows.append(
                {
                    **shape,
                    "peer": peer,
                    "us": float(np.median(ours) * 1e6),
                    "peer_us": float(np.median(values) * 1e6),
                    "ratio_p20": float(low),
                    "ratio": float(middle),
                    "ratio_p80": float(high),
                    "gb_s": live_bytes / float(np.median(ours)) / 1e9,
                    **at_least(float(middle), meant(peer, shape["batch"])),
                    "load": f"{os.getloadavg()[0]:.1f}",
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        wanted = verdict(row, f"at least {row['target']}")
        print(
            f"{row['dtype']:9}{row['n_head']:3} heads, pages of {row['page_size']:2}, batch {row['batch']:4}, "
            f"ctx {row['context']:>8}: {row['us']:9.1f} us {row['gb_s']:5.1f} GB/s | {row['peer']:14}"
            f"{row['peer_us']:9.1f} us, ratio {row['ratio']:5.2f} "
            f"({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f}){wanted}",
            flush=True,
        )


def bench_sdpa(dtype: torch.dtype, n_head: int, page_size: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for lengths in ([257], [512], [1024], RAGGED):
        cache = Cache(lengths, n_head, LAYERS[n_head], page_size, dtype)
        calls = {"paged": cache.paged(), "sdpa": cache.sequences()}
        if len(lengths) > 1:
            calls["sdpa padded"] = cache.padded()
        context = str(lengths[0]) if len(lengths) == 1 else f"{min(lengths)}-{max(lengths)}"
        shape = {"dtype": str(dtype)[6:], "n_head": n_head, "page_size": page_size}
        shape |= {"batch": len(lengths), "context": context}
        seconds = take_turns(calls, repeats, 0.02)
        rows += rows_of(shape, seconds, cache.live_bytes)
        show(rows[len(calls) * -1 + 1 :])
    return rows


def bench_memory(dtype: torch.dtype, page_size: int, repeats: int) -> list[dict[str, Any]]:
    """Share of the read bandwidth: the peer reads the same number of bytes, so the ratio is the share."""
    n_head, length = 16, 1000
    batch = int(COLD_BYTES / (2 * length * n_head * HEAD_DIM * dtype.itemsize))
    cache = Cache([length] * batch, n_head, 1, page_size, dtype)
    plain = torch.ones(cache.live_bytes // 4)
    seconds = take_turns({"paged": cache.paged(), "read": plain.sum}, repeats, 0.0)
    shape = {"dtype": str(dtype)[6:], "n_head": n_head, "page_size": page_size}
    shape |= {"batch": batch, "context": str(length)}
    rows = rows_of(shape, seconds, cache.live_bytes)
    show(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats, no rows kept")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if paged_kv.compiled(None) is None:
        raise SystemExit("bark_fast._C is missing: nothing to measure")
    repeats = 5 if options.quick else 15
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for page_size in (16, 64):
            for n_head in LAYERS:
                rows += bench_sdpa(dtype, n_head, page_size, repeats)
            rows += bench_memory(dtype, page_size, repeats)
    if not options.quick:
        print(append_rows("paged_kv", rows, device="cpu"))


if __name__ == "__main__":
    main()
