"""Linear layers of Bark on a GPU: time, share of the copy bandwidth or of the matmul rate, and their peers.

python benchmarks/bench_norm_linear.py [--tune] [--no-compile]. Each figure is one replay of a CUDA graph that
calls the layer on copies of its weight which together exceed the L2, so weights are cold and launches cost
what they cost in a decode step. Peers: torch eager, torch.compile in its default mode, and cuBLAS's product
alone. Target, H200: one row at 80 % of the measured copy bandwidth. --tune tries tiles and prints entries for
TUNED in kernels/norm_linear.py. Not yet run anywhere: there was no GPU when it was written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import copy_bandwidth, going_on, matmul_rate, replay_times, require_gpu, try_quantiles
from harness import NO_TARGET, append_rows, at_least, quantiles, ratio, verdict
from torch import Tensor

from bark_fast.kernels import gemv, matmul
from bark_fast.kernels import norm_linear as kernels
from bark_fast.kernels.target import target_of

COLD_BYTES = 512 * 2**20
ROWS = (1, 2, 4, 8, 16, 64, 257, 887, 1024, 8192)
TARGET_SHARE = 0.8


@dataclass(frozen=True)
class Layer:
    """One linear layer of Bark and what stands around it."""

    name: str
    n: int
    k: int
    normed: bool
    gelu: bool
    added: bool


def layers(width: int) -> list[Layer]:
    """Those of one size of Bark."""
    return [
        Layer("qkv", 3 * width, width, True, False, False),
        Layer("out", width, width, False, False, True),
        Layer("fc", 4 * width, width, True, True, False),
        Layer("proj", width, 4 * width, False, False, True),
        Layer("semantic head", 10_001, width, True, False, False),
        Layer("code head", 1_024, width, True, False, False),
    ]


@dataclass(frozen=True)
class Operands:
    """One layer's input, and as many copies of its weight as make reads cold."""

    x: Tensor
    weights: Tensor
    norm: Tensor
    residual: Tensor
    scratch: tuple[Tensor, Tensor]


def operands(
    layer: Layer, rows: int, dtype: torch.dtype, device: str, cold_bytes: int = COLD_BYTES
) -> Operands:
    """Random numbers of a layer's shapes."""
    copies = max(2, -(-cold_bytes // (layer.n * layer.k * dtype.itemsize)))
    return Operands(
        x=torch.randn(rows, layer.k, device=device).to(dtype),
        weights=torch.empty(copies, layer.n, layer.k, dtype=dtype, device=device).normal_(std=layer.k**-0.5),
        norm=torch.ones(layer.k, dtype=dtype, device=device),
        residual=torch.randn(rows, layer.n, device=device).to(dtype),
        scratch=kernels.make_scratch(rows, layer.n, torch.device(device)),
    )


def ours(layer: Layer, o: Operands, pdl: bool = False) -> Callable[[Tensor], Tensor]:
    """The layer by the table, as a function of its weight."""
    return lambda weight: kernels.linear(
        o.x, weight, norm=(o.norm, None) if layer.normed else None,
        residual=o.residual if layer.added else None, gelu=layer.gelu, scratch=o.scratch, pdl=pdl,
    )  # fmt: skip


def by_torch(layer: Layer, o: Operands) -> Callable[[Tensor], Tensor]:
    """The layer as torch eager computes it."""

    def call(weight: Tensor) -> Tensor:
        y = F.layer_norm(o.x, (layer.k,), o.norm, None, 1e-5) if layer.normed else o.x
        y = F.linear(y, weight)
        y = F.gelu(y) if layer.gelu else y
        return o.residual + y if layer.added else y

    return call


def seconds(call: Callable[[Tensor], Any], weights: Tensor) -> list[float]:
    """Of one call, replay by replay, over copies of the weight."""

    def all_copies() -> None:
        for weight in weights.unbind():
            call(weight)

    return [time / len(weights) for time in replay_times(all_copies)]


def figures(
    layer: Layer, rows: int, dtype: torch.dtype, device: str, copy: float, rate: float,
    cold_bytes: int = COLD_BYTES, compiles: bool = True,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows for the results: ours, ours with dependent launches, and the peers, torch.compile last."""
    o = operands(layer, rows, dtype, device, cold_bytes)
    size = float(dtype.itemsize * (layer.n * layer.k + rows * (layer.k + layer.n * (2 if layer.added else 1))))
    operations = 2.0 * rows * layer.n * layer.k
    calls: dict[str, Callable[[Tensor], Any]] = {"bark_fast": ours(layer, o)}
    calls["torch eager"] = by_torch(layer, o)
    calls["cublas alone"] = lambda weight: F.linear(o.x, weight)
    if target_of(o.x.device).arch >= 90 and rows <= 64:
        calls["bark_fast pdl"] = ours(layer, o, pdl=True)
    if compiles:
        torch.compiler.reset()  # it compiles one function a few times only, and is eager from then on
        calls["torch.compile (default)"] = torch.compile(by_torch(layer, o), dynamic=False)
    for name, call in calls.items():
        time = try_quantiles(f"{name}: {layer.name}, {rows} rows, {dtype}", partial(seconds, call, o.weights))
        share = ratio(size / copy, time["p50"])
        has_target = rows == 1 and name.startswith("bark_fast")
        yield {
            "layer": layer.name, "n": layer.n, "k": layer.k, "rows": rows,
            "dtype": str(dtype).removeprefix("torch."), "backend": name, "unit": "s", **time,
            "share_of_copy_bandwidth": share, "share_of_matmul_rate": ratio(operations / rate, time["p50"]),
            **(at_least(share, TARGET_SHARE) if has_target else NO_TARGET),
        }  # fmt: skip


def candidates(layer: Layer, rows: int, dtype: torch.dtype) -> Iterator[kernels.Plan]:
    """Plans worth a try at a shape."""
    span = 32 * (16 // dtype.itemsize)
    if rows <= gemv.MAX_ROWS:
        for block_n, warps in product((1, 2, 4, 8), (1, 2, 4)):
            tile = gemv.Tile(block_n, span * warps, warps)
            if gemv.fits(rows, layer.k, tile) and block_n * layer.k <= 32 * span * warps:
                yield tile
    if rows <= 64:
        height = max(16, kernels.bucket(rows))
        fused = (True, False) if layer.normed and rows <= matmul.MAX_NORM_ROWS else (True,)
        for n, k, splits, inside in product((16, 32, 64), (64, 128), (1, 2, 4, 8), fused):
            yield matmul.Tile(height, n, k, splits, 2 if n == 16 else 4, 4, inside)
    elif dtype != torch.float32:
        for (m, n, warps), k, splits in product(
            ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8)), (32, 64), (1, 2, 4)
        ):
            yield matmul.Tile(m, n, k, splits, warps, 3)
    yield None


def best(
    layer: Layer, rows: int, dtype: torch.dtype, device: str, cold_bytes: int = COLD_BYTES,
    plans: Iterator[kernels.Plan] | None = None,
) -> tuple[kernels.Plan, float]:  # fmt: skip
    """The fastest plan and its median time; a plan that the chip has no room for is passed over."""
    from triton.runtime.errors import OutOfResources

    o = operands(layer, rows, dtype, device, cold_bytes)
    norm, residual = (o.norm, None) if layer.normed else None, o.residual if layer.added else None
    times: list[tuple[float, kernels.Plan]] = []
    for plan in plans or candidates(layer, rows, dtype):

        def call(weight: Tensor, plan: kernels.Plan = plan) -> Tensor:
            return kernels.planned(plan, o.x, norm, weight, None, residual, layer.gelu, o.scratch)

        try:
            times.append((quantiles(seconds(call, o.weights))["p50"], plan))
        except OutOfResources:
            continue
    time, plan = min(times, key=lambda pair: pair[0])
    return plan, time


def entry(arch: int, layer: Layer, rows: int, dtype: torch.dtype, plan: kernels.Plan, time: float) -> str:
    """A line of TUNED."""
    written = "None" if plan is None else f"{type(plan).__module__.rpartition('.')[2]}.{plan}"
    key = f"({arch}, {dtype}, {kernels.bucket(rows)}, {layer.n}, {layer.k})"
    return f"    {key}: {written},  # {1e6 * time:.2f} us"


def options_of(description: str | None) -> argparse.Namespace:
    """The command line of this benchmark and of the MLP's; ends the program where no GPU is visible."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tune", action="store_true", help="Search for tiles instead.")
    parser.add_argument("--no-compile", action="store_true", help="Leave torch.compile out.")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--width", type=int, nargs="+", default=(1024, 768))
    parser.add_argument("--dtype", nargs="+", default=("bfloat16", "float16", "float32"))
    parser.add_argument("--no-rows", action="store_true", help="Print only.")
    options = parser.parse_args()
    require_gpu()
    return options


def show(shape: str, row: dict[str, Any], wanted: str) -> None:
    """Print a row's figures; of what failed that was printed."""
    if not row["error"]:
        print(
            f"{row['dtype']:9} {shape} {row['backend']:23} {1e6 * row['p50']:8.2f} us "
            f"{100 * row['share_of_copy_bandwidth']:5.1f} % of copy "
            f"{100 * row['share_of_matmul_rate']:5.1f} % of matmul{verdict(row, wanted)}",
            flush=True,
        )


def main() -> None:
    """Measure all layers, one row of them first, or search for their tiles."""
    options = options_of(__doc__)
    shapes = [
        (layer, rows, getattr(torch, dtype))
        for dtype in options.dtype for rows in options.rows
        for width in options.width for layer in layers(width)
    ]  # fmt: skip
    if options.tune:
        arch = target_of(torch.device("cuda", torch.cuda.current_device())).arch
        for layer, rows, dtype in shapes:
            print(entry(arch, layer, rows, dtype, *best(layer, rows, dtype, "cuda")), flush=True)
        return
    copy = copy_bandwidth()
    rates = {dtype: matmul_rate(dtype) for dtype in {dtype for _, _, dtype in shapes}}
    print(f"copy bandwidth {copy / 1e12:.2f} TB/s, {rates}")
    for layer, rows, dtype in shapes:
        shape = f"{layer.name:14} {layer.n:6}x{layer.k:<5} rows {rows:5}"
        with going_on(shape):
            for row in figures(layer, rows, dtype, "cuda", copy, rates[dtype], compiles=not options.no_compile):
                show(shape, row, f"at least {100 * TARGET_SHARE:.0f} % of copy")
                if not options.no_rows:
                    append_rows("norm_linear", [row])  # at once: what is interrupted keeps what it measured


if __name__ == "__main__":
    main()
