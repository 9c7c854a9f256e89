"""Sampling on a GPU: one launch from logits to token, beside the torch reference, eager and compiled.

python benchmarks/bench_sampling.py [--tune] [--few] [--no-compile]. Each figure is one replay of a CUDA graph
of `CALLS` calls on different logits, which write into one tensor of tokens and one flag, as decode steps do.
The target is 8 us for a row of 10,048 with top-k and top-p, at any batch up to 64. The roofline is the bytes
of the logits, or of the head, over the measured copy bandwidth. The rows "head and draw" say whether
`head_sample`, which the decode step does not use, would pay: LayerNorm, head and draw in one launch, beside
the two that the decode step has, each call with a head that the L2 does not hold. Not yet run anywhere: there
was no GPU when it was written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from gpu_timing import COLD_BYTES, copy_bandwidth, going_on, replay_times, require_gpu, try_quantiles
from harness import NO_TARGET, append_rows, at_most, quantiles, ratio, verdict
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


Row = dict[str, Any]
Timed = Callable[[Callable[[], object]], list[float]]


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


def row_of(case: dict[str, Any], who: str, times: Callable[[], list[float]], size: int, copy: float) -> Row:
    """What a contender takes, without a target. size: the bytes it cannot but read."""
    time = try_quantiles(f"{who}: {described(case)}", times)
    return {
        **case, "contender": who, "unit": "s a call", **time,
        "share_of_copy_bandwidth": ratio(size / copy, time["p50"]), **NO_TARGET,
    }  # fmt: skip


def described(case: dict[str, Any]) -> str:
    """A case in words."""
    return f"{case['rule']}, {case['dialect']}, {case['width']} columns, batch {case['batch']}"


def measure(
    batch: int,
    width: int,
    dialect: Any,
    name: str,
    copy: float,
    timed: Timed,
    compiles: bool,
    device: str = "cuda",
) -> Iterator[Row]:
    """The kernel, the reference, and that under torch.compile (default) if wanted, one after the other."""
    logits, places = inputs(batch, width, device)
    rule = SamplingRule(dialect, ((0, width),), width, **RULES[name])
    rows = pack_rules([rule], device).expand(batch)
    calls = {
        "ours": partial(kernel_calls, logits, rows, places, outputs(batch, device)),
        "torch": partial(reference_calls, logits, rule, ops.sample),
    }
    if compiles:
        torch.compiler.reset()  # it compiles one function a few times only, and is eager from then on
        compiled = torch.compile(ops.sample, dynamic=False)
        calls["torch.compile (default)"] = partial(reference_calls, logits, rule, compiled)
    case = {"rule": name, "dialect": dialect, "batch": batch, "width": width}
    for who, call in calls.items():
        row = row_of(case, who, partial(a_call, timed, call, CALLS), logits[0].nbytes, copy)
        if who == "ours" and width == SEMANTIC and name == "top-k and top-p":
            row |= at_most(row["p50"], TARGET)
        yield row


def a_call(timed: Timed, calls: Callable[[], object], count: int) -> list[float]:
    """Seconds of one of so many calls, replay by replay."""
    return [seconds / count for seconds in timed(calls)]


def heads_for(window: int, width: int) -> int:
    """So many heads in bfloat16 that each call finds its own cold, as a step of the model does."""
    return -(-COLD_BYTES // (2 * window * width))


def measure_head(batch: int, width: int, window: int, copy: float, timed: Timed) -> Iterator[Row]:
    """From hidden states to tokens by temperature alone: two launches, one launch, torch.

    One launch is worth its code where it takes no longer than two.
    """
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

    case = {"rule": f"head and draw, width {width}", "dialect": "suno", "batch": batch, "width": window}
    size, apart = heads[0].nbytes, None
    for who, call in (("two launches", two_launches), ("head_sample", one_launch), ("torch", by_torch)):
        row = row_of(case, who, partial(a_call, timed, call, count), size, copy)
        if who == "two launches":
            apart = row["p50"]
        elif who == "head_sample" and isinstance(apart, float):
            row |= at_most(row["p50"], apart)
        yield row


def measure_noise(batch: int, copy: float, timed: Timed) -> Iterator[Row]:
    """Philox noise alone, of which only the writing is counted as bytes."""
    places = inputs(batch, 1, "cuda")[1]

    def noise() -> None:
        for _ in range(CALLS):
            ops.exponential(places, SEMANTIC)

    case = {"rule": "Philox noise", "dialect": "", "batch": batch, "width": SEMANTIC}
    yield row_of(case, "ours", partial(a_call, timed, noise, CALLS), 4 * batch * SEMANTIC, copy)


def tune(timed: Timed, device: str = "cuda") -> None:
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
    parser.add_argument("--few", action="store_true", help="What has a target, and codes.")
    parser.add_argument("--no-compile", action="store_true", help="Leave torch.compile out.")
    options = parser.parse_args()
    require_gpu()
    if options.tune:
        tune(replay_times)
        return
    cases = list(product((SEMANTIC, CODEBOOK), BATCHES, ("suno", "hf"), RULES))
    if options.few:
        cases = [(SEMANTIC, batch, "suno", "top-k and top-p") for batch in BATCHES]
        cases += [(CODEBOOK, batch, "suno", "temperature") for batch in BATCHES]
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy / 1e12:.2f} TB/s")
    runs = [
        partial(measure, batch, width, dialect, name, copy, replay_times, not options.no_compile)
        for width, batch, dialect, name in cases
    ]
    runs += [partial(measure_noise, batch, copy, replay_times) for batch in BATCHES]
    runs += [
        partial(measure_head, batch, width, window, copy, replay_times)
        for window, width in ((10_001, 1024), (10_001, 768), (1_024, 1024), (1_024, 768))
        for batch in (1, 8, 16)
    ]
    for run in runs:
        with going_on(f"{run.func.__name__}{run.args}"):
            for row in run():
                show(row)
                if not options.no_rows:
                    append_rows("sampling", [row])  # at once: what is interrupted keeps what it measured


def show(row: Row) -> None:
    """Print a row's figures; of what failed that was printed."""
    if not row["error"]:
        wanted = verdict(row, "at most 8 us" if row["target"] == TARGET else "at most two launches' time")
        print(
            f"{described(row)}: {row['contender']:23} {1e6 * row['p50']:8.2f} us "
            f"{100 * row['share_of_copy_bandwidth']:5.1f} % of copy{wanted}",
            flush=True,
        )


if __name__ == "__main__":
    main()
