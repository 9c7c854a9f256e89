"""The feed-forward half of a layer on a GPU: x + proj(gelu(fc(LN(x)))), two launches at decode.

python benchmarks/bench_mlp.py [--tune] [--no-compile]. Measured as in bench_norm_linear.py, over copies of
both weights. Target, H200, one row: at most 1.25 times the bytes of the weights over the measured copy
bandwidth, and 3 us. --tune prints entries of fc and proj for TUNED in kernels/norm_linear.py. Not yet run
anywhere: there was no GPU when it was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_norm_linear import COLD_BYTES, best, entry, layers, options_of, show
from gpu_timing import copy_bandwidth, going_on, matmul_rate, replay_times, try_quantiles
from harness import NO_TARGET, append_rows, at_most, ratio
from torch import Tensor

from bark_fast.kernels.norm_linear import make_scratch
from bark_fast.kernels.target import target_of
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.mlp import layernorm_gelu_mlp

Call = Callable[[Tensor, Tensor], Any]


def target_seconds(width: int, dtype: torch.dtype, copy: float) -> float:
    """What one row may take."""
    return 1.25 * 8 * width * width * dtype.itemsize / copy + 3e-6


def figures(
    width: int,
    rows: int,
    dtype: torch.dtype,
    device: str,
    copy: float,
    rate: float,
    cold_bytes: int = COLD_BYTES,
    compiles: bool = True,
) -> Iterator[dict[str, Any]]:
    """Rows for the results: ours, ours with dependent launches, and the peers, torch.compile last."""
    size = 8 * width * width * dtype.itemsize
    copies = max(2, -(-cold_bytes // size))
    x = torch.randn(rows, width, device=device).to(dtype)
    norm = torch.ones(width, dtype=dtype, device=device)
    fc = torch.empty(copies, 4 * width, width, dtype=dtype, device=device).normal_(std=width**-0.5)
    proj = torch.empty(copies, width, 4 * width, dtype=dtype, device=device).normal_(std=width**-0.5)
    scratch = make_scratch(rows, 4 * width, torch.device(device))

    def ours(pdl: bool) -> Call:
        return lambda fc, proj: layernorm_gelu_mlp(
            x, norm, None, fc, None, proj, None, scratch=scratch, pdl=pdl
        )

    def by_torch(fc: Tensor, proj: Tensor) -> Tensor:
        return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (width,), norm, None, 1e-5), fc)), proj)

    def seconds(call: Call) -> list[float]:
        def all_copies() -> None:
            with prefer("triton"):
                for pair in zip(fc.unbind(), proj.unbind(), strict=True):
                    call(*pair)

        return [time / copies for time in replay_times(all_copies)]

    calls: dict[str, Call] = {"bark_fast": ours(False)}
    calls["torch eager"] = by_torch
    calls["cublas alone"] = lambda fc, proj: F.linear(F.linear(x, fc), proj)
    if target_of(x.device).arch >= 90 and rows <= 64:
        calls["bark_fast pdl"] = ours(True)
    if compiles:
        torch.compiler.reset()  # it compiles one function a few times only, and is eager from then on
        calls["torch.compile (default)"] = torch.compile(by_torch, dynamic=False)
    bound = target_seconds(width, dtype, copy)
    for name, call in calls.items():
        time = try_quantiles(f"{name}: width {width}, {rows} rows, {dtype}", partial(seconds, call))
        has_target = rows == 1 and name.startswith("bark_fast")
        yield {
            "width": width, "rows": rows, "dtype": str(dtype).removeprefix("torch."), "backend": name,
            "unit": "s", **time, "share_of_copy_bandwidth": ratio(size / copy, time["p50"]),
            "share_of_matmul_rate": ratio(16 * rows * width * width / rate, time["p50"]),
            **(at_most(time["p50"], bound) if has_target else NO_TARGET),
        }  # fmt: skip


def main() -> None:
    """Measure both widths, one row first, or search for the tiles of fc and proj."""
    options = options_of(__doc__)
    shapes = [
        (width, rows, getattr(torch, dtype))
        for dtype in options.dtype for rows in options.rows for width in options.width
    ]  # fmt: skip
    if options.tune:
        arch = target_of(torch.device("cuda", torch.cuda.current_device())).arch
        for width, rows, dtype in shapes:
            for layer in layers(width):
                if layer.name in ("fc", "proj"):
                    plan, time = best(layer, rows, dtype, "cuda")
                    print(entry(arch, layer, rows, dtype, plan, time), flush=True)
        return
    copy = copy_bandwidth()
    rates = {dtype: matmul_rate(dtype) for dtype in {dtype for _, _, dtype in shapes}}
    print(f"copy bandwidth {copy / 1e12:.2f} TB/s, {rates}")
    for width, rows, dtype in shapes:
        wanted = f"at most {1e6 * target_seconds(width, dtype, copy):.2f} us"
        with going_on(f"width {width}, {rows} rows"):
            for row in figures(width, rows, dtype, "cuda", copy, rates[dtype], compiles=not options.no_compile):
                show(f"width {width:4} rows {rows:5}", row, wanted)
                if not options.no_rows:
                    append_rows("mlp", [row])  # at once: what is interrupted keeps what it measured


if __name__ == "__main__":
    main()
