"""The paged cache on a GPU: decode attention and ragged prefill, beside the copy bandwidth and torch SDPA.

python benchmarks/bench_paged_kv_cuda.py [--no-rows]. Each figure is one replay of a CUDA graph that calls
every layer once, so launches cost what they cost in a decode step; the layers together are larger than the L2,
so reads are cold. Decode attention is held against the bytes of live keys and values over the copy bandwidth,
alone and with the new rows stored, in one launch as the engine does it and in two; prefill against append_kv
and SDPA in two calls, with the backend that torch takes. Targets of decode attention, stored in one launch or
not: 80 % of copy bandwidth at 64 x 1,024 keys, 6 us at batch 1. Not yet run anywhere: there was no GPU when it
was written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from bench_paged_kv import HEAD_DIM, Cache
from gpu_timing import (
    COLD_BYTES,
    copy_bandwidth,
    going_on,
    matmul_rate,
    replay_times,
    require_gpu,
    try_quantiles,
)
from harness import NO_TARGET, append_rows, at_least, at_most, ratio, verdict
from torch import Tensor
from torch.nn.attention import SDPBackend

from bark_fast import extension
from bark_fast.ops import paged_kv
from bark_fast.ops.dispatch import Backend, prefer
from bark_fast.ops.paged_prefill import paged_prefill

SHAPES = [(64, 1024), (1, 1024), (1, 257), (8, 1024)]  # (batch, keys of each sequence)
ONE_SECONDS, SHARE = 6e-6, 0.8
"""Meant for one sequence, and of copy bandwidth for 64 of 1,024 keys."""
PROMPTS = (257, 887)
PAGE_SIZE = 16
Step = Callable[[], None]


def decode_steps(batch: int, keys: int, n_head: int, dtype: torch.dtype, device: str) -> dict[str, Step]:
    """One pass over all layers, by contender."""
    cache = Cache([keys] * batch, n_head, layers_for(batch * keys, n_head, dtype), PAGE_SIZE, dtype, device)
    pages, query, out = cache.layers, cache.query, cache.out
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

    def missing() -> NoReturn:
        raise RuntimeError(extension.cuda_fault(torch.cuda.current_device()))

    steps: dict[str, Step] = {sdpa_name(query[:, :, None], *contiguous[0]): sdpa}
    backends: dict[str, Backend] = {"cuda": "auto", "triton": "triton"}
    if paged_kv.compiled(torch.cuda.current_device()) is None:
        steps["cuda"] = missing
        del backends["cuda"]
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
    return {sdpa_name(*sample, causal=True): sdpa, "triton": one_launch}


def sdpa_name(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> str:
    """Torch's scaled_dot_product_attention with the backend that torch takes for these."""
    backend = SDPBackend(torch._fused_sdp_choice(query, key, value, is_causal=causal))
    return f"sdpa ({backend.name.lower()})"


def layers_for(tokens: int, n_head: int, dtype: torch.dtype) -> int:
    """Layers whose keys and values together are larger than the L2."""
    return max(2, -(-COLD_BYTES // (2 * tokens * n_head * HEAD_DIM * dtype.itemsize)))


def rows_of(floor: float, steps: dict[str, Step], layers: int, **shape: Any) -> Iterator[dict[str, Any]]:
    """A row a contender, printed, SDPA's first. floor: seconds a layer at the roofline."""
    described = ", ".join(f"{key} {value}" for key, value in shape.items())
    sdpa: float | str = ""
    for name, step in steps.items():
        time = try_quantiles(f"{name}: {described}", partial(a_layer, step, layers))
        share = ratio(floor, time["p50"])
        sdpa = time["p50"] if name.startswith("sdpa") else sdpa
        row = {
            **shape, "contender": name, "unit": "s a layer", **time, "share_of_roofline": share,
            "speed_of_sdpa": ratio(sdpa, time["p50"]), **target(name, shape, time["p50"], share),
        }  # fmt: skip
        if not time["error"]:
            print(
                f"{described}: {name:24} {1e6 * time['p50']:8.2f} us, {100 * share:5.1f} % of roofline"
                f"{verdict(row, 'at most 6 us' if shape.get('batch') == 1 else 'at least 80 %')}",
                flush=True,
            )
        yield row


def a_layer(step: Step, layers: int) -> list[float]:
    """Seconds of one layer, replay by replay."""
    return [seconds / layers for seconds in replay_times(step)]


def target(contender: str, shape: dict[str, Any], seconds: float | str, share: float | str) -> dict[str, Any]:
    """What is meant of our decode attention, alone and with the new rows stored in the same launch."""
    if contender.removesuffix(", storing") in ("cuda", "triton") and "batch" in shape:
        if shape["batch"] == 1:
            return at_most(seconds, ONE_SECONDS)
        if (shape["batch"], shape["keys"]) == SHAPES[0]:
            return at_least(share, SHARE)
    return NO_TARGET


def main() -> None:
    """Measure all shapes, those with targets first, and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=("bfloat16", "float32"))
    parser.add_argument("--no-rows", action="store_true", help="Print only.")
    options = parser.parse_args()
    require_gpu()
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy / 1e12:.2f} TB/s")
    rates = {name: matmul_rate(getattr(torch, name)) for name in options.dtype}

    def decode(name: str, n_head: int, batch: int, keys: int) -> Iterator[dict[str, Any]]:
        dtype = getattr(torch, name)
        floor = 2 * batch * keys * n_head * HEAD_DIM * dtype.itemsize / copy
        steps = decode_steps(batch, keys, n_head, dtype, "cuda")
        layers = layers_for(batch * keys, n_head, dtype)
        return rows_of(floor, steps, layers, dtype=name, n_head=n_head, batch=batch, keys=keys)

    def prefill(name: str, n_head: int, tokens: int) -> Iterator[dict[str, Any]]:
        dtype = getattr(torch, name)
        moved = 6 * tokens * n_head * HEAD_DIM * dtype.itemsize / copy  # q, k, v read, k, v, the result written
        floor = max(moved, 2 * tokens * (tokens + 1) * n_head * HEAD_DIM / rates[name])
        steps, layers = prefill_steps(tokens, n_head, dtype, "cuda"), layers_for(tokens, n_head, dtype)
        return rows_of(floor, steps, layers, dtype=name, n_head=n_head, tokens=tokens)

    for name, n_head in product(options.dtype, (16, 12)):
        runs = [("paged_kv_cuda", partial(decode, name, n_head, batch, keys)) for batch, keys in SHAPES]
        runs += [("paged_prefill", partial(prefill, name, n_head, tokens)) for tokens in PROMPTS]
        for file, run in runs:
            with going_on(f"{file} {run.args}"):
                for row in run():
                    if not options.no_rows:
                        append_rows(file, [row])  # at once: what is interrupted keeps what it measured


if __name__ == "__main__":
    main()
