"""Milliseconds a decode step takes: the engine's bursts, its peers, and the floor.

Random weights of the published shapes, the coarse model, which takes three steps of four. The floor is the
bytes of the weights a step reads, and of the keys and values, over the measured copy bandwidth. The peers are
transformers' own loop, and benchmarks/static_peer.py under torch.compile with mode="max-autotune", which
captures CUDA graphs.

    python benchmarks/bench_decode.py                    # on a GPU: large, bfloat16, batches of 1, 8 and 64
    python benchmarks/bench_decode.py --device cpu --size tiny --batch 1 2 --no-rows     # exercises the code
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gpu_timing import copy_bandwidth
from harness import append_rows, checkpoint, machine
from peers import HFPeer
from static_peer import StaticCachePeer

from bark_fast import Bark
from bark_fast.engine.scheduler import Scheduler, Utterance
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.sampling import SamplingRule
from bark_fast.work import Decode, Stage

LOW, HIGH = 10_000, 12_048
RULE = SamplingRule("suno", ((LOW, LOW + 1024), (LOW + 1024, HIGH)), 12_096, temperature=0.7)
PROMPT, TOKENS = 300, 400
TARGET_SECONDS, FLOOR_SHARE, TIMES_COMPILED, TIMES_EAGER = 0.35e-3, 0.4, 1.5, 25
"""Meant for large in bfloat16 at batch 1 on an H200: a step, its share of the floor's speed, the speedups."""


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


def step_seconds(decode: Callable[[int], torch.Tensor], counts: tuple[int, int]) -> float:
    """Wall seconds a step of a peer that decodes so many tokens: prompt and start-up do not count."""
    decode(12)  # compiles
    times = []
    for count in counts:
        started = time.perf_counter()
        drawn = decode(count).cpu()
        times.append(time.perf_counter() - started)
        assert drawn.shape[1] == count
    return (times[1] - times[0]) / (counts[1] - counts[0])


def floor_seconds(bark: Bark, batch: int, bandwidth: float) -> float:
    """Bytes of one step in the middle of the run, over the bandwidth."""
    gpt = bark.runner.models["coarse"]
    config, size = gpt.config, gpt.wte.weight.element_size()
    weights = sum(p.numel() for layer in gpt.layers for p in layer.parameters()) + (HIGH - LOW) * config.n_embd
    keys = 2 * config.n_layer * config.n_embd * (PROMPT + TOKENS // 2)
    return (weights + batch * keys) * size / bandwidth


def meets_targets(ours: float, compiled: float, eager: float, floor: float) -> bool:
    """Whether these seconds a step are what is meant for batch 1. A peer that is missing (NaN) meets none."""
    speedups = compiled >= TIMES_COMPILED * ours and eager >= TIMES_EAGER * ours
    return ours <= TARGET_SECONDS and floor >= FLOOR_SHARE * ours and speedups


def main() -> None:
    """Measure every batch and append its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "large"], default="large")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
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
    print(
        f"{machine()}, torch {torch.__version__}, {options.size} {options.dtype}, {type(bark.runner).__name__}"
    )
    counts = (TOKENS // 4, TOKENS)
    gpt = bark.runner.models["coarse"]
    for batch in options.batch:
        seconds_of(bark, batch, TOKENS)  # compiles and captures
        short, long = (min(seconds_of(bark, batch, count) for _ in range(3)) for count in counts)
        ours = (long - short) / (counts[1] - counts[0])
        prompt = torch.randint(LOW, HIGH, (batch, PROMPT), device=bark.device)
        mode = "max-autotune" if on_gpu else None
        static = StaticCachePeer(gpt, batch, LOW, LOW + 1024, RULE.temperature, mode)
        compiled = step_seconds(partial(static.decode, prompt), counts)
        eager = float("nan")
        if transformers is not None:
            eager = step_seconds(partial(transformers.decode_coarse, prompt, RULE.temperature), counts)
        floor = floor_seconds(bark, batch, bandwidth)
        print(
            f"batch {batch:3}: {1e3 * ours:7.3f} ms a step, {100 * floor / ours:5.1f} % of the floor's speed, "
            f"static cache {1e3 * compiled:7.3f} ms ({compiled / ours:.2f}x), "
            f"transformers {1e3 * eager:7.3f} ms ({eager / ours:.2f}x)"
        )
        row = {
            "size": options.size, "dtype": options.dtype, "batch": batch, "unit": "ms a step",
            "bark_fast": 1e3 * ours, "static_cache_compiled": 1e3 * compiled, "transformers": 1e3 * eager,
            "floor": 1e3 * floor, "captures": len(getattr(bark.runner, "captures", [])),
            "meets_targets": meets_targets(ours, compiled, eager, floor) if batch == 1 else "",
        }  # fmt: skip
        if not options.no_rows:  # at once: another batch may not fit into the time there is
            print(f"row appended to {append_rows('decode', [row])}")
    for capture in getattr(bark.runner, "captures", []):
        print(
            f"captured {capture.model} for {capture.rows} rows: {capture.seconds:.2f} s, {capture.bytes} bytes"
        )


if __name__ == "__main__":
    main()
