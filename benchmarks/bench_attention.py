"""Attention over contiguous keys on a GPU, beside every SDPA backend by name, torch's operations one by one,
eager and under torch.compile, and the FLOP roofline.

python benchmarks/bench_attention.py [--tune] [--no-compile] [--no-rows]. Queries, keys and values are views of
packed projections (batch, time, 3, heads, 64), as the models have them. A figure is one replay of a CUDA graph
that goes through so many layers that each finds the L2 cold. Target: at least 0.95 of the speed of the fastest
SDPA backend. The roofline is the products' operations over the measured rate of torch's matrix product in the
same dtype. Not yet run anywhere: there was no GPU when it was written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from gpu_timing import COLD_BYTES, going_on, matmul_rate, replay_times, require_gpu, try_quantiles
from harness import NO_TARGET, append_rows, at_least, quantiles, ratio, verdict
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bark_fast.ops.attention import attention
from bark_fast.ops.dispatch import prefer

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
TIME, HEAD_DIM = 1024, 64
TARGET = 0.95
SHAPES = list(product((16, 12), (1, 8), (False, True)))
"""(heads, batch, causal)."""
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def ours(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """The Triton kernel."""
    with prefer("triton"):
        return attention(query, key, value, causal)


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool, backend: SDPBackend) -> Tensor:
    """Torch's, forced to one backend, which raises where it cannot."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value, is_causal=causal)


def math(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Eager attention as Hugging Face writes it."""
    scores = query @ key.transpose(2, 3) * HEAD_DIM**-0.5
    if causal:
        unseen = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(unseen, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def contenders(causal: bool, compiles: bool) -> Iterator[tuple[str, Attend]]:
    """Every way to compute it, by name; ours after those that it is held against."""
    for name, backend in BACKENDS.items():
        yield name, partial(sdpa, causal=causal, backend=backend)
    yield "ours", partial(ours, causal=causal)
    yield "formula, eager", partial(math, causal=causal)
    if compiles:
        torch.compiler.reset()  # it compiles one function a few times only, and is eager from then on
        yield "formula, torch.compile (default)", partial(torch.compile(math), causal=causal)


def layers(heads: int, batch: int, dtype: torch.dtype, device: str, cold: int = COLD_BYTES) -> list[Tensor]:
    """Packed projections, as (3, batch, heads, time, head_dim), `cold` bytes of them together."""
    shape = (batch, TIME, 3, heads, HEAD_DIM)
    count = max(2, -(-cold // (torch.Size(shape).numel() * dtype.itemsize)))
    return [torch.randn(shape, device=device).to(dtype).permute(2, 0, 3, 1, 4) for _ in range(count)]


def seconds(attend: Attend, projections: list[Tensor]) -> list[float]:
    """Of one layer, replay by replay."""

    def step() -> None:
        for query, key, value in projections:
            attend(query, key, value)

    return [total / len(projections) for total in replay_times(step)]


def operations(heads: int, batch: int, causal: bool) -> int:
    """Multiplications and additions of both products, over the pairs that are seen."""
    pairs = TIME * (TIME + 1) // 2 if causal else TIME * TIME
    return 4 * batch * heads * HEAD_DIM * pairs


def measure(
    shape: tuple[int, int, bool], dtype: torch.dtype, rate: float, compiles: bool, device: str = "cuda"
) -> Iterator[dict[str, Any]]:
    """The rows of one shape: SDPA's backends, ours beside the best of them, and the formula."""
    heads, batch, causal = shape
    projections = layers(heads, batch, dtype, device)
    floor = operations(heads, batch, causal) / rate
    label = str(dtype).removeprefix("torch.")
    best: tuple[float, str] | None = None
    for name, attend in contenders(causal, compiles):
        described = f"{label:9} {heads} heads, batch {batch}, causal {causal!s:5} {name:32}"
        time = try_quantiles(described, partial(seconds, attend, projections))
        if name in BACKENDS and not time["error"]:
            best = min(best or (time["p50"], name), (time["p50"], name))
        speed = "" if name in BACKENDS or best is None else ratio(best[0], time["p50"])
        row = {
            "dtype": label, "n_head": heads, "batch": batch, "time": TIME, "causal": causal,
            "contender": name, "unit": "s a layer", **time, "share_of_roofline": ratio(floor, time["p50"]),
            "best_sdpa": "" if best is None or speed == "" else best[1], "speed_of_best_sdpa": speed,
            **(at_least(speed, TARGET) if name == "ours" else NO_TARGET),
        }  # fmt: skip
        if not time["error"]:
            beside = f", {speed:5.2f} x {best[1]}" if best and speed != "" else ""
            print(
                f"{described} {1e6 * time['p50']:8.1f} us, {100 * row['share_of_roofline']:5.1f} % of roofline"
                f"{beside}{verdict(row, f'at least {TARGET} x')}",
                flush=True,
            )
        yield row


def tune(dtype: torch.dtype, device: str = "cuda") -> None:
    """Print the three fastest entries of the launch table for every shape."""
    from bark_fast.kernels import attention as kernels

    sizes = (16, 32, 64) if dtype == torch.float32 else (32, 64, 128)
    for heads, batch, causal in SHAPES:
        projections = layers(heads, batch, dtype, device)
        found = []
        for entry in (kernels.Blocks(*sizes_) for sizes_ in product(sizes, sizes, (2, 4, 8), (1, 2, 3, 4))):
            with patch.object(kernels, "blocks", lambda *_, chosen=entry: chosen):
                try:
                    time = quantiles(seconds(partial(ours, causal=causal), projections))["p50"]
                except Exception as why:  # the compiler fails in many ways where a chip has no room
                    print(f"  {entry}: {type(why).__name__}")
                    continue
            found.append((time, entry))
        for time, entry in sorted(found, key=lambda pair: pair[0])[:3]:
            print(f"{dtype} {heads} heads, batch {batch}, causal {causal}: {1e6 * time:8.1f} us {entry}")


def main() -> None:
    """Measure all shapes and append their rows, or tune."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="Try launch-table entries and print the best.")
    parser.add_argument("--no-compile", action="store_true", help="Leave torch.compile out.")
    parser.add_argument("--dtype", nargs="+", default=("bfloat16", "float16", "float32"))
    parser.add_argument("--no-rows", action="store_true", help="Print only.")
    options = parser.parse_args()
    require_gpu()
    with torch.inference_mode():
        for dtype in (getattr(torch, name) for name in options.dtype):
            if options.tune:
                tune(dtype)
                continue
            rate = matmul_rate(dtype)
            print(f"{dtype} matrix product: {rate / 1e12:.0f} TFLOP/s")
            for shape in SHAPES:
                with going_on(f"{dtype}, {shape}"):
                    for row in measure(shape, dtype, rate, compiles=not options.no_compile):
                        if not options.no_rows:  # at once: what is interrupted keeps what it measured
                            append_rows("attention", [row])


if __name__ == "__main__":
    main()
