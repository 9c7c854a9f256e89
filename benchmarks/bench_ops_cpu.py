"""The four families of operations on a CPU, by pytest-benchmark, each beside torch's own operations.

    pip install '.[bench]' && pytest benchmarks/bench_ops_cpu.py

One group a shape: "ours" is what a loaded model calls on this machine, "torch" the same through
`dispatch.prefer("torch")`, and for attention `scaled_dot_product_attention` itself. Decode shapes are small
enough to stay in the cache, so ratios here are not those of a model's steps: `bench_linear_cpu.py` measures
those cold.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from bark_fast.ops.attention import attention
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.mlp import layernorm_gelu_mlp
from bark_fast.ops.norm_linear import norm_linear
from bark_fast.ops.rule_rows import pack_rules, place_row
from bark_fast.ops.sampling import sample_rows
from bark_fast.sampling import SamplingRule

BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch"], ids=["ours", "torch"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
WIDTH = 768
Backend = Literal["auto", "torch"]


def weights(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random weights that keep the size of what they multiply."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[-1] ** 0.5).to(dtype)


@DTYPES
@BACKENDS
@pytest.mark.parametrize("rows", [1, 8, 257])
def test_norm_linear(benchmark: Any, backend: Backend, dtype: torch.dtype, rows: int) -> None:
    benchmark.group = f"LayerNorm and projection of {rows} rows, {dtype}"
    x, weight = weights(rows, WIDTH, dtype=dtype), weights(3 * WIDTH, WIDTH, dtype=dtype)
    norm = torch.ones(WIDTH, dtype=dtype)
    with prefer(backend), torch.inference_mode():
        benchmark(norm_linear, x, norm, None, weight)


@DTYPES
@BACKENDS
@pytest.mark.parametrize("rows", [1, 8, 257])
def test_mlp(benchmark: Any, backend: Backend, dtype: torch.dtype, rows: int) -> None:
    benchmark.group = f"LayerNorm-GELU-MLP of {rows} rows, {dtype}"
    x, norm = weights(rows, WIDTH, dtype=dtype), torch.ones(WIDTH, dtype=dtype)
    fc, proj = weights(4 * WIDTH, WIDTH, dtype=dtype), weights(WIDTH, 4 * WIDTH, dtype=dtype)
    with prefer(backend), torch.inference_mode():
        benchmark(layernorm_gelu_mlp, x, norm, None, fc, None, proj, None)


@DTYPES
@pytest.mark.parametrize("backend", ["ours", "sdpa"])
@pytest.mark.parametrize("causal", [False, True], ids=["fine", "causal"])
def test_attention(benchmark: Any, backend: str, dtype: torch.dtype, causal: bool) -> None:
    benchmark.group = f"attention of 1024 tokens, 12 heads, causal {causal}, {dtype}"
    query, key, value = weights(3, 1, 12, 1024, 64, dtype=dtype)
    call = {
        "ours": partial(attention, query, key, value, causal=causal),
        "sdpa": partial(F.scaled_dot_product_attention, query, key, value, is_causal=causal),
    }[backend]
    with torch.inference_mode():
        benchmark(call)


@BACKENDS
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("filters", [{}, {"top_k": 50, "top_p": 0.9}], ids=["temperature", "top-k and top-p"])
def test_sampling(benchmark: Any, backend: Backend, rows: int, filters: dict[str, Any]) -> None:
    benchmark.group = f"sampling {rows} rows of 10,001, {filters or 'temperature'}"
    rule = SamplingRule("suno", ((0, 10_001),), 10_048, temperature=0.7, eos_token=10_000, **filters)
    packed = pack_rules([rule] * rows)
    logits = 3 * torch.randn(rows, 10_001, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([place_row(row, 3, 0, 0) for row in range(rows)])
    with prefer(backend), torch.inference_mode():
        benchmark(sample_rows, logits, packed, places)
