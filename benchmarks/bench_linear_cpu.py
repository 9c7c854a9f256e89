"""Linear layers of few rows on the CPU against torch's, beside the memory's read bandwidth; and decode steps.

python benchmarks/bench_linear_cpu.py [--quick] [--size small large] [--threads 2]. Ours, torch and a read of as
many bytes take turns within a repeat. `linears`: qkv, out, fc and proj of all layers, by the operations (with
LayerNorm, GELU and residual) and by bare torch products, which lack those. `step`: embedding, all layers over
a cache of 300 keys a row, and 10,001 rows of the semantic head; torch's is the same under `prefer("torch")`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_paged_kv import Call, take_turns
from harness import append_rows
from torch import Tensor

from bark_fast import extension
from bark_fast.config import GPTConfig
from bark_fast.engine.kv_pool import KVPool
from bark_fast.modules.gpt import GPT
from bark_fast.modules.layer import Layer
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.mlp import layernorm_gelu_mlp
from bark_fast.ops.norm_linear import linear_residual, norm_linear

SIZES = {"small": (12, 12, 768), "large": (24, 16, 1024)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTEXT, HEAD_ROWS = 300, 10_001
TARGETS = {name: dict.fromkeys((1, 2, 4, 8), 1.15 if name == "float32" else 1.25) for name in DTYPES}
"""Largest ratio to a read of the same bytes that is wanted."""


def model(size: str, dtype: torch.dtype) -> GPT:
    """Random weights of a published shape; one layer's are drawn and copied, which is quick and as cold."""
    n_layer, n_head, n_embd = SIZES[size]
    gpt = GPT(GPTConfig(n_layer, n_head, n_embd, 129_600, 10_048)).to(dtype)
    for parameter in gpt.parameters():
        parameter.data.normal_(std=0.02)
    return gpt


def linears(layers: list[Layer], x: Tensor) -> Tensor:
    """The linear layers of a step, chained as in a step but for attention."""
    for layer in layers:
        norm_linear(x, layer.ln_1.weight, layer.ln_1.bias, layer.qkv.weight)
        x = linear_residual(x, layer.out.weight, x)
        x = layernorm_gelu_mlp(
            x, layer.ln_2.weight, layer.ln_2.bias, layer.fc.weight, None, layer.proj.weight, None
        )
    return x


def products(layers: list[Layer], x: Tensor, hidden: Tensor) -> None:
    """What torch needs for the products alone."""
    for layer in layers:
        for linear in (layer.qkv, layer.out, layer.fc):
            F.linear(x, linear.weight)
        F.linear(hidden, layer.proj.weight)


def step(gpt: GPT, rows: int, backend: str) -> Call:
    """A decode step of `rows` sequences, over and over at one length."""
    weight = gpt.wte.weight
    pool = KVPool(gpt.config, weight.device, weight.dtype, rows * (CONTEXT // 16 + 2))
    for pages in (*pool.keys, *pool.values):
        pages.normal_()
    handles = [pool.pool.create() for _ in range(rows)]
    pool.reserve(handles, [CONTEXT] * rows)
    cache = pool.paged_rows(pool.reserve(handles, [1] * rows))
    assert cache is not None
    ids, positions = torch.arange(rows), torch.full((rows,), CONTEXT)

    def call() -> Tensor:
        with prefer(backend):  # type: ignore[arg-type]
            return gpt.logits(gpt.decode(ids, positions, cache), 0, HEAD_ROWS)

    return call


def rows_of(shape: dict[str, Any], seconds: dict[str, list[float]], read: int) -> dict[str, Any]:
    """Medians, and ratios within a repeat: to torch (above 1: ours is faster) and to the read."""
    ours, torch_, memory = (np.array(seconds[name]) for name in ("ours", "torch", "read"))
    middle = float(np.median(ours))
    to_read = float(np.median(ours / memory))
    target = TARGETS[shape["dtype"]].get(shape["rows"])
    return {
        **shape,
        "ms": middle * 1e3,
        "torch_ms": float(np.median(torch_) * 1e3),
        "read_ms": float(np.median(memory) * 1e3),
        "gb_s": read / middle / 1e9,
        "ratio_torch": float(np.median(torch_ / ours)),
        "ratio_read": to_read,
        "target": "" if target is None else target,
        "met": "" if target is None or shape["what"] == "step" else to_read <= target,
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def measure(size: str, name: str, quick: bool) -> list[dict[str, Any]]:
    gpt = model(size, DTYPES[name])
    layers: list[Layer] = [layer for layer in gpt.layers if isinstance(layer, Layer)]
    matrices = [m for layer in layers for m in (layer.qkv, layer.out, layer.fc, layer.proj)]
    size_bytes = sum(m.weight.numel() for m in matrices) * DTYPES[name].itemsize
    table = []
    for rows in (1, 2, 4, 8, 16):
        x = torch.randn(rows, gpt.config.n_embd).to(DTYPES[name])
        hidden = torch.randn(rows, 4 * gpt.config.n_embd).to(DTYPES[name])
        calls: dict[str, dict[str, Call]] = {
            "linears": {"ours": partial(linears, layers, x), "torch": partial(products, layers, x, hidden)}
        }
        if rows in (1, 8):
            calls["step"] = {"ours": step(gpt, rows, "auto"), "torch": step(gpt, rows, "torch")}
        for what, pair in calls.items():
            read = size_bytes
            if what == "step":
                keys = 2 * CONTEXT * rows * gpt.config.n_layer
                read += (HEAD_ROWS + keys) * gpt.config.n_embd * DTYPES[name].itemsize
            plain = torch.ones(read // 4)
            seconds = take_turns({**pair, "read": plain.sum}, 3 if quick else 11, 0.0)
            table.append(rows_of({"what": what, "size": size, "dtype": name, "rows": rows}, seconds, read))
            row = table[-1]
            print(
                f"{what:8}{size:6}{name:9}{rows:3} rows: {row['ms']:7.2f} ms {row['gb_s']:5.1f} GB/s | torch "
                f"{row['torch_ms']:7.2f} ms, ratio {row['ratio_torch']:5.2f} | read {row['read_ms']:6.2f} ms, "
                f"ratio {row['ratio_read']:5.2f} {row['met']}",
                flush=True,
            )
    return table


Measure = Callable[[str, str, bool], list[dict[str, Any]]]


def run(description: str | None, measure: Measure, results: str) -> None:
    """The rows of `measure(size, dtype, quick)`, as the command line asks for them, to `results`.csv."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few repeats, no rows kept")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if extension.load() is None:
        raise SystemExit("bark_fast._C is missing: nothing to measure")
    rows = []
    with torch.inference_mode():
        for size in options.size:
            for dtype in options.dtype:
                rows += measure(size, dtype, options.quick)
    if not options.quick:
        print(append_rows(results, rows, device="cpu"))


if __name__ == "__main__":
    run(__doc__, measure, "linear_cpu")
