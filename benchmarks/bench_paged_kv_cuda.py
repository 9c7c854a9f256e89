"""Paged attention on a GPU: bytes of live keys and values over time, beside the copy bandwidth and torch SDPA.

python benchmarks/bench_paged_kv_cuda.py. Each figure is one replay of a CUDA graph that calls every layer once,
so launches cost what they cost in a decode step; the layers together are larger than the L2, so reads are cold.
Not yet run anywhere: there was no GPU when it was written.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from bench_paged_kv import HEAD_DIM, Cache
from gpu_timing import COLD_BYTES, copy_bandwidth, replay_times, require_gpu
from harness import append_rows, quantiles

from bark_fast.ops import paged_kv

SHAPES = [(1, 257), (1, 1024), (8, 1024), (64, 1024)]  # (batch, keys of each sequence)


def figures(batch: int, keys: int, n_head: int, dtype: torch.dtype) -> tuple[list[float], list[float], int]:
    """Seconds a layer of paged attention and of SDPA over contiguous caches, and bytes a layer."""
    layer_bytes = 2 * batch * keys * n_head * HEAD_DIM * dtype.itemsize
    layers = max(2, -(-COLD_BYTES // layer_bytes))
    cache = Cache([keys] * batch, n_head, layers, 16, dtype)
    pages = [[part.cuda() for part in layer] for layer in cache.layers]
    query, out = cache.query.cuda(), cache.out.cuda()
    table, lengths, starts = cache.table.cuda(), cache.lengths.cuda(), cache.starts.cuda()
    scratch = paged_kv.attention_scratch(batch, n_head, HEAD_DIM, "cuda")

    def paged() -> None:
        for k, v in pages:
            paged_kv.paged_attention(query, k, v, table, lengths, starts, out, scratch=scratch)

    ours = [seconds / layers for seconds in replay_times(paged)]
    shape = (batch, n_head, keys, HEAD_DIM)
    contiguous = [[torch.randn(shape, dtype=dtype, device="cuda") for _ in "kv"] for _ in range(layers)]

    def sdpa() -> None:
        for k, v in contiguous:
            F.scaled_dot_product_attention(query[:, :, None], k, v)

    return ours, [seconds / layers for seconds in replay_times(sdpa)], layer_bytes


def main() -> None:
    """Measure all shapes and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-rows", action="store_true", help="Print only.")
    options = parser.parse_args()
    require_gpu()
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy / 1e12:.2f} TB/s")
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for n_head in (12, 16):
            for batch, keys in SHAPES:
                ours, sdpa, size = figures(batch, keys, n_head, dtype)
                time = quantiles(ours)
                peer = quantiles(sdpa)["p50"]
                share = size / time["p50"] / copy
                name = str(dtype).removeprefix("torch.")
                print(
                    f"{name:9} {n_head} heads, batch {batch:2}, {keys:4} keys: "
                    f"{1e6 * time['p50']:7.2f} us a layer, "
                    f"{100 * share:5.1f} % of copy bandwidth, SDPA {1e6 * peer:7.2f} us"
                )
                rows.append({
                    "dtype": name, "n_head": n_head, "batch": batch, "keys": keys, "unit": "s a layer", **time,
                    "sdpa": peer, "share_of_copy_bandwidth": share,
                })  # fmt: skip
    if not options.no_rows:
        print(f"rows appended to {append_rows('paged_kv_cuda', rows)}")


if __name__ == "__main__":
    main()
