"""Passes of many rows on a CPU, prompts and fine windows, beside the same by torch's operations.

python benchmarks/bench_passes_cpu.py [--quick] [--size small large] [--threads 2]. Ours and torch's
(`prefer("torch")`) take turns within a repeat. `linears` are qkv, out, fc and proj of one layer with LayerNorm,
GELU and residual, `attention` that of one layer, `prefill` a pass over a prompt that draws from its last row,
`fine` a pass of the fine model over a window of which 512 codes are given.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_linear_cpu import DTYPES, SIZES, linears, model, run
from bench_paged_kv import Call, take_turns
from torch import Tensor

from bark_fast import extension
from bark_fast.config import FineConfig
from bark_fast.engine.kv_pool import KVPool
from bark_fast.modules.fine import FineGPT
from bark_fast.modules.gpt import GPT
from bark_fast.ops.attention import attention
from bark_fast.ops.dispatch import prefer

WINDOW = 1024
PROMPTS = (257, 512, 887)


def turns(call: Call) -> dict[str, Call]:
    """The call by our operations and by torch's."""

    def on(backend: str) -> object:
        with prefer(backend):  # type: ignore[arg-type]
            return call()

    return {"ours": partial(on, "auto"), "torch": partial(on, "torch")}


def prefill(gpt: GPT, rows: int) -> Call:
    """A prompt of one sequence, over and over into the same pages."""
    weight = gpt.wte.weight
    pool = KVPool(gpt.config, weight.device, weight.dtype, rows // 16 + 2)
    batch = pool.reserve([pool.pool.create()], [rows])
    ids, positions, last = torch.arange(rows), torch.arange(rows), torch.tensor([rows - 1])

    def attend(layer: int, qkv: Tensor) -> Tensor:
        return pool.attend(batch, layer, qkv)

    return lambda: gpt(ids, positions, attend, wanted=last)


def fine(size: str, dtype: torch.dtype) -> Call:
    """Codebook 4 of a window whose second half is to be filled."""
    layers, heads, width = SIZES[size]
    gpt = FineGPT(FineConfig(layers, heads, width, 1056, 1056)).to(dtype)
    for parameter in gpt.parameters():
        parameter.data.normal_(std=0.02)
    codes = torch.randint(0, 1024, (1, WINDOW, 8), generator=torch.Generator().manual_seed(0))
    return lambda: gpt.logits(gpt(codes, 4, start=512), 4, 1024)


def work(size: str, rows: int, *, layers: int, queries: int) -> float:
    """Products of a pass in GFLOP: linear layers of all rows, and attention of `queries` over `rows` keys."""
    width = SIZES[size][2]
    return layers * (24 * rows * width**2 + 4 * queries * rows * width) / 1e9


def measure(size: str, name: str, quick: bool) -> list[dict[str, Any]]:
    dtype = DTYPES[name]
    layers, heads, width = SIZES[size]
    gpt = model(size, dtype)
    x = torch.randn(WINDOW, width).to(dtype)
    query, key, value = torch.randn(3, 1, WINDOW, heads, 64).to(dtype).transpose(2, 3)
    one = work(size, WINDOW, layers=1, queries=WINDOW)
    products = work(size, WINDOW, layers=1, queries=0)
    cases: list[tuple[str, int, Call, float]] = [
        ("linears", WINDOW, lambda: linears(list(gpt.layers)[:1], x), products),  # type: ignore[arg-type]
        ("attention", WINDOW, lambda: attention(query, key, value, causal=False), one - products),
        *(("prefill", n, prefill(gpt, n), work(size, n, layers=layers, queries=n // 2)) for n in PROMPTS),
        ("fine", WINDOW, fine(size, dtype), work(size, WINDOW, layers=layers, queries=WINDOW)),
    ]
    module = extension.load()
    isa = "" if module is None else module.isa()
    table = []
    for what, rows, call, gflop in cases:
        seconds = take_turns(turns(call), 1 if quick else 9, 0.0)
        ours, theirs = (np.array(seconds[key]) for key in ("ours", "torch"))
        low, middle, high = np.quantile(theirs / ours, (0.2, 0.5, 0.8))
        mine, other = float(np.median(ours)), float(np.median(theirs))
        table.append({
            "what": what, "size": size, "dtype": name, "rows": rows, "isa": isa, "ms": mine * 1e3,
            "torch_ms": other * 1e3, "gflop_s": gflop / mine, "torch_gflop_s": gflop / other,
            "ratio_p20": low, "ratio_p50": middle, "ratio_p80": high, "load": f"{os.getloadavg()[0]:.1f}",
        })  # fmt: skip
        print(
            f"{what:10}{size:6}{name:9}{rows:5} rows: {mine * 1e3:8.2f} ms {gflop / mine:4.0f} GFLOP/s | torch "
            f"{other * 1e3:8.2f} ms {gflop / other:4.0f} GFLOP/s | ratio {middle:.2f}",
            flush=True,
        )
    return table


if __name__ == "__main__":
    run(__doc__, measure, "passes_cpu")
