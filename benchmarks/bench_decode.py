"""Milliseconds a decode step takes: the engine's bursts, its peers, and the floor.

Random weights of the published shapes, the coarse model, which takes three steps of four. The floor is the
bytes of the weights a step reads, and of the keys and values, over the measured copy bandwidth. The peers are
transformers' own loop over the whole vocabulary, the same on the patched model, whose targets are the engine's
minus 10 %, and benchmarks/static_peer.py under torch.compile with mode="max-autotune", which
captures CUDA graphs. A figure is the difference of two lengths, each the least of as many runs for everybody.

    python benchmarks/bench_decode.py                    # on a GPU: large, bfloat16, batches of 1, 8 and 64
    python benchmarks/bench_decode.py --device cpu --size tiny --batch 1 2 --no-rows     # exercises the code
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gpu_timing import copy_bandwidth, going_on
from harness import append_rows, checkpoint, machine, ratio
from peers import HFPeer
from static_peer import StaticCachePeer

import bark_fast
from bark_fast import Bark
from bark_fast.engine.scheduler import Scheduler, Utterance
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.sampling import SamplingRule
from bark_fast.work import Decode, Stage

LOW, HIGH = 10_000, 12_048
RULE = SamplingRule("suno", ((LOW, LOW + 1024), (LOW + 1024, HIGH)), 12_096, temperature=0.7)
PROMPT, TOKENS = 300, 400
COUNTS = (TOKENS // 4, TOKENS)
TARGET_SECONDS, FLOOR_SHARE = 0.35e-3, 0.4
TARGET_TIMES = {"static cache (max-autotune)": 1.5, "transformers": 25.0}
"""Meant for large in bfloat16 at batch 1 on an H200: a step, its share of the floor's speed, the speedups."""
PATCHED = "transformers, patched"
PATCHED_SHARE = 0.9
"""Of each of these that a patched model must reach."""
WANTED = {
    "bark_fast": f"at most {1e3 * TARGET_SECONDS} ms at {100 * FLOOR_SHARE:.0f} % of the floor's speed",
    **{peer: f"at least {times} times ours" for peer, times in TARGET_TIMES.items()},
}


def decode(prompt: np.ndarray, count: int) -> Stage[int]:
    """One utterance: `count` coarse tokens after a prompt."""
    return (yield Decode("coarse", prompt, RULE, count)).steps


def seconds_of(bark: Bark, batch: int, count: int) -> float:
    """Wall seconds for `batch` utterances of `count` tokens after prompts that share nothing."""
    rng = np.random.default_rng(0)
    jobs = [
        Utterance(decode(rng.integers(LOW, HIGH, PROMPT), count), PhiloxNoise(seed, bark.runner.device))
        for seed in range(batch)
    ]
    started = time.perf_counter()
    outcomes = list(Scheduler(bark.runner, max_batch=batch).run(jobs))
    spent = time.perf_counter() - started
    assert [outcome.result for outcome in outcomes] == [count] * batch, [o.error for o in outcomes]
    return spent


def wall_seconds(decode: Callable[[int], torch.Tensor], count: int) -> float:
    """Of a peer that decodes so many tokens."""
    started = time.perf_counter()
    drawn = decode(count).cpu()
    spent = time.perf_counter() - started
    assert drawn.shape[1] == count
    return spent


def step_seconds(seconds: Callable[[int], float], counts: tuple[int, int], runs: int) -> float:
    """Wall seconds a step of one whose runs of a count take so long: prompt and start-up do not count."""
    short, long = (min(seconds(count) for _ in range(runs)) for count in counts)
    return (long - short) / (counts[1] - counts[0])


def floor_seconds(bark: Bark, batch: int, bandwidth: float) -> float:
    """Bytes of one step in the middle of the run, over the bandwidth."""
    gpt = bark.runner.models["coarse"]
    config, size = gpt.config, gpt.wte.weight.element_size()
    weights = sum(p.numel() for layer in gpt.layers for p in layer.parameters()) + (HIGH - LOW) * config.n_embd
    keys = 2 * config.n_layer * config.n_embd * (PROMPT + sum(COUNTS) // 2)
    return (weights + batch * keys) * size / bandwidth


def meets_target(contender: str, seconds: float, ours: float, floor: float) -> bool:
    """Whether a step is as fast as is meant for batch 1, or a peer's as much slower than ours."""
    if contender == "bark_fast":
        return seconds <= TARGET_SECONDS and floor >= FLOOR_SHARE * seconds
    return contender in TARGET_TIMES and seconds >= TARGET_TIMES[contender] * ours


def of_patched(contender: str, seconds: float, patched: float) -> str:
    """Whether a patched model's step is as fast as is meant: by itself, or beside another contender's."""
    if contender == PATCHED:
        bound = TARGET_SECONDS / PATCHED_SHARE
        return f"{PATCHED}: wanted at most {1e3 * bound:.3f} ms: {'met' if patched <= bound else 'NOT MET'}"
    bound, times = PATCHED_SHARE * TARGET_TIMES[contender], seconds / patched
    met = "met" if times >= bound else "NOT MET"
    return f"{PATCHED}: {times:.2f} times as fast as {contender}, wanted at least {bound:.3g}: {met}"


def main() -> None:
    """Measure every batch and append its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "large"], default="large")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--runs", type=int, default=3, help="Runs of each length; the least counts.")
    parser.add_argument("--peers-batch", type=int, nargs="+", help="Only these batches for the peers.")
    parser.add_argument("--no-compile", action="store_true", help="Leave the static cache out.")
    parser.add_argument("--checkpoints", type=Path, help="Keep the checkpoints in this folder.")
    parser.add_argument("--no-rows", action="store_true", help="Print only.")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU is visible to torch; this benchmark needs one, or --device cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint(options.checkpoints or Path(temporary), options.size, "hf")
        bark = Bark.from_pretrained(
            folder, device=options.device, dtype=options.dtype, max_batch=max(options.batch)
        )
        try:
            transformers = HFPeer(folder, options.device, getattr(torch, options.dtype))
        except ImportError as error:
            print(f"transformers is left out: {error}")
            transformers = None
    bandwidth = copy_bandwidth() if on_gpu else float("nan")
    runner = type(bark.runner).__name__
    print(
        f"{machine(options.device)}, torch {torch.__version__}, {options.size} {options.dtype}, {runner}",
        flush=True,
    )
    ours: dict[int, float] = {}

    def keep(contender: str, batch: int, seconds: float) -> None:
        """At once: another one may not fit into the time there is."""
        floor = floor_seconds(bark, batch, bandwidth)
        times = ratio(seconds, ours.get(batch, ""))
        has_target = batch == 1 and batch in ours and contender in WANTED
        met = meets_target(contender, seconds, ours[batch], floor) if has_target else ""
        beside = f", {times:5.2f} times ours" if times != "" else ""
        wanted = f", wanted {WANTED[contender]}: {'met' if met else 'NOT MET'}" if met != "" else ""
        print(
            f"batch {batch:3}: {contender:27} {1e3 * seconds:7.3f} ms a step, "
            f"{100 * floor / seconds:5.1f} % of the floor's speed{beside}{wanted}",
            flush=True,
        )
        row = {
            "size": options.size, "dtype": options.dtype, "batch": batch, "contender": contender,
            "unit": "ms a step", "value": 1e3 * seconds, "runs": options.runs, "floor": 1e3 * floor,
            "times_ours": times, "target": WANTED[contender] if met != "" else "", "met": met,
        }  # fmt: skip
        if not options.no_rows:
            append_rows("decode", [row], device=options.device)

    for batch in options.batch:
        with going_on(f"bark_fast, batch {batch}"):
            seconds_of(bark, batch, TOKENS)  # compiles and captures
            ours[batch] = step_seconds(partial(seconds_of, bark, batch), COUNTS, options.runs)
            keep("bark_fast", batch, ours[batch])
    gpt = bark.runner.models["coarse"]
    mode = "max-autotune" if on_gpu else None
    for batch in options.batch:
        if batch not in (options.peers_batch or options.batch):
            continue
        prompt = torch.randint(LOW, HIGH, (batch, PROMPT), device=bark.device)
        peers: dict[str, Callable[[int], torch.Tensor]] = {}
        if transformers is not None:
            peers[PATCHED] = partial(transformers.decode_coarse, prompt, RULE.temperature)
        if not options.no_compile:
            static = StaticCachePeer(gpt, batch, LOW, LOW + 1024, RULE.temperature, mode)
            peers[f"static cache ({mode or 'eager'})"] = partial(static.decode, prompt)
        if transformers is not None:
            peers["transformers"] = peers[PATCHED]
        patched: float | None = None
        for name, decode_tokens in peers.items():
            # strictly: what it leaves to the original is not what is measured
            inside = nullcontext() if name != PATCHED else bark_fast.patched(transformers.model, strict=True)
            with going_on(f"{name}, batch {batch}"), inside:
                decode_tokens(12)  # compiles
                seconds = step_seconds(partial(wall_seconds, decode_tokens), COUNTS, options.runs)
                keep(name, batch, seconds)
                patched = seconds if name == PATCHED else patched
                if batch == 1 and patched is not None and (name == PATCHED or name in TARGET_TIMES):
                    print(of_patched(name, seconds, patched), flush=True)
    for capture in bark.captures:
        print(
            f"captured {capture.model} for {capture.rows} rows: {capture.seconds:.2f} s, {capture.bytes} bytes"
        )


if __name__ == "__main__":
    main()
