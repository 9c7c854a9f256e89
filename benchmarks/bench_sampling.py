"""Sampling on a GPU: one launch from logits to token, beside the torch reference, eager and compiled.

python benchmarks/bench_sampling.py [--tune] [--few]. Each figure is one replay of a CUDA graph of `CALLS` calls
on different logits, which write into one tensor of tokens and one flag, as decode steps do. The target is 8 us
for a row of 10,048 with top-k and top-p, at any batch up to 64. The rows "head and draw" say whether
`head_sample`, which the decode step does not use, would pay: LayerNorm, head and draw in one launch, beside
the two that the decode step has, each call with a head that the L2 does not hold. Not yet run anywhere: there
was no GPU when it was written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from gpu_timing import COLD_BYTES, replay_times, require_gpu
from harness import append_rows, quantiles
from torch import Tensor

from bark_fast.ops import sampling as ops
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.norm_linear import norm_linear
from bark_fast.ops.rule_rows import RuleRows, pack_rules, place_row
from bark_fast.sampling import SamplingRule

TARGET = 8e-6
CALLS = 20
BATCHES = (1, 8, 64)
SEMANTIC, CODEBOOK = 10_048, 1_024
RULES: dict[str, dict[str, Any]] = {
    "top-k and top-p": {"top_k": 50, "top_p": 0.9, "temperature": 0.7},
    "top-p": {"top_p": 0.9, "temperature": 0.7},
    "temperature": {"temperature": 0.7},
}


def inputs(batch: int, width: int, device: str) -> tuple[list[Tensor], Tensor]:
    """Logits of `CALLS` steps and places."""
    logits = [3 * torch.randn(batch, width, device=device) for _ in range(CALLS)]
    places = torch.tensor([place_row(row, 0, 0, 0) for row in range(batch)], device=device)
    return logits, places


def outputs(batch: int, device: str) -> dict[str, Tensor]:
    """Tokens and flag, made once: a flag made anew would be another launch."""
    tokens = torch.empty(batch, dtype=torch.int64, device=device)
    return {"tokens": tokens, "flag": torch.zeros(1, dtype=torch.int32, device=device)}


def kernel_calls(logits: list[Tensor], rows: RuleRows, places: Tensor, out: dict[str, Tensor]) -> None:
    """One launch a step."""
    for step in logits:
        ops.sample_rows(step, rows, places, **out)


def reference_calls(logits: list[Tensor], rule: SamplingRule, sample: Callable[..., Tensor]) -> None:
    """The torch path with torch's own noise."""
    with prefer("torch"):
        for step in logits:
            sample(step, torch.empty_like(step).exponential_(), rule, None)


def measure(
    batch: int, width: int, dialect: Any, name: str, timed: Callable[..., list[float]], compiles: bool = True
) -> dict[str, Any]:
    """Seconds a call of the kernel and the reference, also under torch.compile (default) if wanted."""
    logits, places = inputs(batch, width, "cuda")
    rule = SamplingRule(dialect, ((0, width),), width, **RULES[name])
    rows = pack_rules([rule], "cuda").expand(batch)
    calls = {
        "ours": partial(kernel_calls, logits, rows, places, outputs(batch, "cuda")),
        "torch": partial(reference_calls, logits, rule, ops.sample),
    }
    if compiles:
        torch.compiler.reset()  # it compiles one function a few times only, and is eager from then on
        compiled = torch.compile(ops.sample, dynamic=False)
        calls["compiled"] = partial(reference_calls, logits, rule, compiled)
    seconds = {who: quantiles([t / CALLS for t in timed(call)]) for who, call in calls.items()}
    wanted = width == SEMANTIC and name == "top-k and top-p"
    return {
        "rule": name, "dialect": dialect, "batch": batch, "width": width, "unit": "s a call", **seconds["ours"],
        "torch": seconds["torch"]["p50"], "compiled (default)": seconds["compiled"]["p50"] if compiles else "",
        "target": TARGET if wanted else "",
        "target_met": seconds["ours"]["p50"] <= TARGET if wanted else "",
    }  # fmt: skip


def heads_for(window: int, width: int) -> int:
    """So many heads in bfloat16 that each call finds its own cold, as a step of the model does."""
    return -(-COLD_BYTES // (2 * window * width))


def measure_head(batch: int, width: int, window: int, timed: Callable[..., list[float]]) -> dict[str, Any]:
    """Seconds from hidden states to tokens by temperature alone: one launch, two launches, torch."""
    from bark_fast.kernels import head_sampling as kernels

    count = heads_for(window, width)
    hidden = [torch.randn(batch, width, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    heads = [torch.randn(window, width, device="cuda", dtype=torch.bfloat16) / width**0.5 for _ in range(count)]
    norm = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    rule = SamplingRule("suno", ((0, window),), window, temperature=0.7)
    rows = pack_rules([rule], "cuda").expand(batch)
    places, out = inputs(batch, 1, "cuda")[1], outputs(batch, "cuda")
    scratch = kernels.head_scratch(window, batch, torch.device("cuda"))

    def one_launch() -> None:
        for x, head in zip(hidden, heads, strict=True):
            kernels.head_sample(
                x, norm, None, head, None, rows.integers, rows.numbers, places, rows.window, **out,
                scratch=scratch,
            )  # fmt: skip

    def two_launches() -> None:
        for x, head in zip(hidden, heads, strict=True):
            ops.sample_rows(norm_linear(x, norm, None, head), rows, places, **out)

    def by_torch() -> None:
        with prefer("torch"):
            for x, head in zip(hidden, heads, strict=True):
                logits = norm_linear(x, norm, None, head)
                ops.sample(logits, torch.empty_like(logits, dtype=torch.float32).exponential_(), rule, None)

    ours, apart, torch_s = (
        quantiles([t / count for t in timed(call)]) for call in (one_launch, two_launches, by_torch)
    )
    return {
        "rule": f"head and draw, width {width}", "dialect": "suno", "batch": batch,
        "width": window, "unit": "s a call", **ours, "torch": torch_s["p50"], "compiled (default)": "",
        "target": apart["p50"], "target_met": ours["p50"] <= apart["p50"],
    }  # fmt: skip


def tune(timed: Callable[..., list[float]], device: str = "cuda") -> None:
    """Time chunks of candidates at the target's shape, best first."""
    from bark_fast.kernels import sampling as kernels

    logits, places = inputs(1, SEMANTIC, device)
    rows = pack_rules([SamplingRule("suno", ((0, SEMANTIC),), SEMANTIC, **RULES["top-k and top-p"])], device)
    found = []
    for chunk in (256, 512, 1024, 2048):

        def call(chunk: int = chunk) -> None:
            for step in logits:
                kernels.sample(step, None, rows.integers, rows.numbers, places, SEMANTIC, chunk=chunk)

        found.append((quantiles(timed(call))["p50"] / CALLS, chunk))
    for seconds, chunk in sorted(found):
        print(f"chunk {chunk:5}: {1e6 * seconds:7.2f} us")


def main() -> None:
    """Measure all shapes and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-rows", action="store_true", help="Print only.")
    parser.add_argument("--tune", action="store_true", help="Try launch-table entries instead.")
    parser.add_argument("--few", action="store_true", help="What has a target, and codes; nothing compiled.")
    options = parser.parse_args()
    require_gpu()
    if options.tune:
        tune(replay_times)
        return

    def keep(row: dict[str, Any]) -> None:
        if not options.no_rows:
            append_rows("sampling", [row])  # at once: what is interrupted keeps what it measured

    cases = list(product((SEMANTIC, CODEBOOK), BATCHES, ("suno", "hf"), RULES))
    if options.few:
        cases = [(SEMANTIC, batch, "suno", "top-k and top-p") for batch in BATCHES]
        cases += [(CODEBOOK, batch, "suno", "temperature") for batch in BATCHES]
    contenders = {"ours": "p50", "torch": "torch", "torch.compile (default)": "compiled (default)"}
    for width, batch, dialect, name in cases:
        row = measure(batch, width, dialect, name, replay_times, compiles=not options.few)
        keep(row)
        described = f"{width:6} columns, batch {batch:2}, {dialect:4} {name:16}"
        times = {who: row[key] for who, key in contenders.items() if row[key] != ""}
        print(described + "".join(f", {who} {1e6 * time:7.2f} us" for who, time in times.items()), flush=True)
    for batch in BATCHES:
        places = inputs(batch, 1, "cuda")[1]

        def noise(places: Tensor = places) -> None:
            for _ in range(CALLS):
                ops.exponential(places, SEMANTIC)

        seconds = quantiles([t / CALLS for t in replay_times(noise)])
        print(f"Philox noise, batch {batch:2}: {1e6 * seconds['p50']:7.2f} us")
        keep({
            "rule": "Philox noise", "dialect": "", "batch": batch, "width": SEMANTIC, "unit": "s a call",
            **seconds, "torch": "", "compiled (default)": "", "target": "", "target_met": "",
        })  # fmt: skip
    for window, width in ((10_001, 768), (10_001, 1024), (1_024, 768), (1_024, 1024)):
        for batch in (1, 8, 16):
            row = measure_head(batch, width, window, replay_times)
            keep(row)
            one, two, torch_s = (1e6 * row[who] for who in ("p50", "target", "torch"))
            print(
                f"{window:6} rows of a head of width {width:4}, batch {batch:2}: head_sample {one:7.2f} us, "
                f"two launches {two:7.2f} us, torch {torch_s:7.2f} us"
            )


if __name__ == "__main__":
    main()
