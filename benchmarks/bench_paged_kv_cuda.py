"""The paged cache on a GPU: decode attention and ragged prefill, beside the copy bandwidth and torch SDPA.

python benchmarks/bench_paged_kv_cuda.py. Each figure is one replay of a CUDA graph that calls every layer once,
so launches cost what they cost in a decode step; the layers together are larger than the L2, so reads are cold.
Decode attention is held against the bytes of live keys and values over the copy bandwidth, alone and with the
new rows stored, in one launch as the engine does it and in two; prefill against append_kv and SDPA in two
calls, with the backend that torch takes. Not yet run anywhere: there was no GPU when it was written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_paged_kv import HEAD_DIM, Cache
from gpu_timing import COLD_BYTES, copy_bandwidth, matmul_rate, replay_times, require_gpu
from harness import append_rows, quantiles
from torch import Tensor
from torch.nn.attention import SDPBackend

from bark_fast.ops import paged_kv
from bark_fast.ops.dispatch import Backend, prefer
from bark_fast.ops.paged_prefill import paged_prefill

SHAPES = [(1, 257), (1, 1024), (8, 1024), (64, 1024)]  # (batch, keys of each sequence)
PROMPTS = (257, 887)
PAGE_SIZE = 16
Step = Callable[[], None]


def decode_steps(batch: int, keys: int, n_head: int, dtype: torch.dtype, device: str) -> dict[str, Step]:
    """One pass over all layers, by contender."""
    cache = Cache([keys] * batch, n_head, layers_for(batch * keys, n_head, dtype), PAGE_SIZE, dtype)
    pages = [[part.to(device) for part in layer] for layer in cache.layers]
    query, out = cache.query.to(device), cache.out.to(device)
    qkv = torch.randn(batch, 3 * n_head * HEAD_DIM, device=device).to(dtype)
    last = cache.table[:, (keys - 1) // PAGE_SIZE].long()
    slots = (last * PAGE_SIZE + (keys - 1) % PAGE_SIZE).to(device)
    tables = [tensor.to(device) for tensor in (cache.table, cache.lengths, cache.starts)]
    scratch = paged_kv.attention_scratch(batch, n_head, HEAD_DIM, device)

    def paged(backend: Backend) -> None:
        with prefer(backend):
            for k, v in pages:
                paged_kv.paged_attention(query, k, v, *tables, out, scratch=scratch)

    def one_launch(backend: Backend) -> None:
        with prefer(backend):
            for k, v in pages:
                paged_kv.append_attention(qkv, k, v, *tables, slots, out, scratch=scratch)

    def two_launches(backend: Backend) -> None:
        with prefer(backend):
            for k, v in pages:
                paged_kv.append_kv(qkv, k, v, slots)
                paged_kv.paged_attention(query, k, v, *tables, out, scratch=scratch)

    shape = (batch, n_head, keys, HEAD_DIM)
    contiguous = [[torch.randn(shape, dtype=dtype, device=device) for _ in "kv"] for _ in pages]

    def sdpa() -> None:
        for k, v in contiguous:
            F.scaled_dot_product_attention(query[:, :, None], k, v)

    backends: dict[str, Backend] = {"triton": "triton"}
    if paged_kv.compiled(0) is not None:
        backends["cuda"] = "auto"
    steps: dict[str, Step] = {sdpa_name(query[:, :, None], *contiguous[0]): sdpa}
    for name, backend in backends.items():
        steps[name] = partial(paged, backend)
        steps[f"{name}, storing"] = partial(one_launch, backend)
        steps[f"{name}, storing apart"] = partial(two_launches, backend)
    return steps


def prefill_steps(tokens: int, n_head: int, dtype: torch.dtype, device: str) -> dict[str, Step]:
    """One prompt through all layers, by contender: in one launch, and stored and attended to in two."""
    need = -(-tokens // PAGE_SIZE)
    count, width = layers_for(tokens, n_head, dtype), n_head * HEAD_DIM
    shape = (need, n_head, PAGE_SIZE, HEAD_DIM)
    pages = [[torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"] for _ in range(count)]
    projections = [torch.randn(tokens, 3 * width, device=device).to(dtype) for _ in range(count)]
    out = torch.empty(tokens, width, dtype=dtype, device=device)
    slots = torch.arange(tokens, device=device)
    table = torch.arange(need, dtype=torch.int32, device=device)[None]
    lengths, starts = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([tokens], [0, tokens]))

    def one_launch() -> None:
        with prefer("triton"):
            for qkv, (k, v) in zip(projections, pages, strict=True):
                paged_prefill(qkv, k, v, table, lengths, starts, slots, out)

    def sdpa() -> None:
        for qkv, (k, v) in zip(projections, pages, strict=True):
            paged_kv.append_kv(qkv, k, v, slots)
            parts: Tensor = qkv.view(1, tokens, 3, n_head, HEAD_DIM).permute(2, 0, 3, 1, 4)
            F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).reshape(tokens, width)

    sample = projections[0].view(1, tokens, 3, n_head, HEAD_DIM).permute(2, 0, 3, 1, 4)
    return {"triton": one_launch, sdpa_name(*sample, causal=True): sdpa}


def sdpa_name(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> str:
    """Torch's scaled_dot_product_attention with the backend that torch takes for these."""
    backend = SDPBackend(torch._fused_sdp_choice(query, key, value, is_causal=causal))
    return f"sdpa ({backend.name.lower()})"


def layers_for(tokens: int, n_head: int, dtype: torch.dtype) -> int:
    """Layers whose keys and values together are larger than the L2."""
    return max(2, -(-COLD_BYTES // (2 * tokens * n_head * HEAD_DIM * dtype.itemsize)))


def row(floor: float, steps: dict[str, Step], layers: int, **shape: Any) -> list[dict[str, Any]]:
    """Times a layer of every contender, printed and as rows. floor: seconds a layer at the roofline."""
    times = {name: quantiles([s / layers for s in replay_times(step)]) for name, step in steps.items()}
    rows = []
    sdpa = next(time["p50"] for name, time in times.items() if name.startswith("sdpa"))
    for name, time in times.items():
        described = ", ".join(f"{key} {value}" for key, value in shape.items())
        share = floor / time["p50"]
        print(f"{described}: {name:24} {1e6 * time['p50']:8.2f} us, {100 * share:5.1f} % of roofline")
        rows.append({
            **shape, "contender": name, "unit": "s a layer", **time, "share_of_roofline": share,
            "speed_of_sdpa": sdpa / time["p50"],
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure all shapes and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=("bfloat16", "float32"))
    parser.add_argument("--no-rows", action="store_true", help="Print only.")
    options = parser.parse_args()
    require_gpu()

    def keep(name: str, rows: list[dict[str, Any]]) -> None:
        if not options.no_rows:
            append_rows(name, rows)  # at once: what is interrupted keeps what it measured

    copy = copy_bandwidth()
    print(f"copy bandwidth {copy / 1e12:.2f} TB/s")
    for name in options.dtype:
        dtype = getattr(torch, name)
        rate = matmul_rate(dtype)
        for n_head in (12, 16):
            token_bytes = n_head * HEAD_DIM * dtype.itemsize
            for batch, keys in SHAPES:
                steps = decode_steps(batch, keys, n_head, dtype, "cuda")
                floor = 2 * batch * keys * token_bytes / copy
                layers = layers_for(batch * keys, n_head, dtype)
                found = row(floor, steps, layers, dtype=name, n_head=n_head, batch=batch, keys=keys)
                keep("paged_kv_cuda", found)
            for tokens in PROMPTS:
                steps = prefill_steps(tokens, n_head, dtype, "cuda")
                moved = 6 * tokens * token_bytes / copy  # q, k, v read, k, v and the result written
                floor = max(moved, 2 * tokens * (tokens + 1) * n_head * HEAD_DIM / rate)
                layers = layers_for(tokens, n_head, dtype)
                keep("paged_prefill", row(floor, steps, layers, dtype=name, n_head=n_head, tokens=tokens))


if __name__ == "__main__":
    main()
