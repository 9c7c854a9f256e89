"""Audio-seconds per second of many requests: bark_fast's scheduler beside Hugging Face's static batches.

"mixed": 32 requests of 1 to 10 s in one list, for Hugging Face in batches of 8 as they come. "equal": 8
requests of the same length, one batch for both. Same weights (random, of the published shapes), dtype and
machine, each contender in turn.

Random weights do not end by themselves, so each request's length is its limit of semantic tokens. In a batch of
Hugging Face's every row is computed up to the longest one's end in all stages but the codec, which decodes
each row's own length. So the batch is run at its longest length; only the rows' own seconds count as audio,
and of the codec's time only their share counts as work.

    python benchmarks/bench_engine.py --size small
    python benchmarks/bench_engine.py --quick           # tiny weights, short requests: exercises the code only
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import append_rows, machine, quantiles
from peers import HFPeer

from bark_fast import Bark, SamplingParams, make_checkpoint

TEXT = "Hello, my name is Suno. And, uh, and I like pizza. But I also have other interests."
HF_BATCH = 8


@dataclass(frozen=True)
class Case:
    """Requests by their seconds, and how many times faster than Hugging Face they are meant to be."""

    name: str
    seconds: list[float]
    target: float


def cases(quick: bool) -> list[Case]:
    """32 requests of mixed lengths, 8 of one."""
    rng = np.random.default_rng(0)
    if quick:
        return [
            Case("mixed", [round(float(s), 2) for s in rng.uniform(0.2, 1.5, 10)], 1.8),
            Case("equal", [0.6] * 4, 1.3),
        ]
    return [
        Case("mixed", [round(float(s), 1) for s in rng.uniform(1.0, 10.0, 32)], 1.8),
        Case("equal", [5.0] * 8, 1.3),
    ]


def speak_ours(bark: Bark, case: Case) -> tuple[float, float]:
    """Seconds of work and of audio."""
    requests = ({"text": TEXT, "seed": i, "max_seconds": s} for i, s in enumerate(case.seconds))
    start = time.perf_counter()
    done = dict(bark.stream_results(requests, semantic=SamplingParams(min_eos_p=None)))
    spent = time.perf_counter() - start
    return spent, sum(audio.duration for audio in done.values())


def speak_hf(peer: HFPeer, case: Case) -> tuple[float, float]:
    """Seconds of work and of audio."""
    torch.manual_seed(0)
    spent = audio = 0.0
    for first in range(0, len(case.seconds), HF_BATCH):
        lengths = case.seconds[first : first + HF_BATCH]
        start = time.perf_counter()
        spoken = peer.speak([TEXT] * len(lengths), semantic_max_new_tokens=round(max(lengths) * 49.9 + 0.5))
        spent += time.perf_counter() - start
        own = sum(lengths) / (max(lengths) * len(lengths))
        spent -= spoken[0].timings["codec"] * (1 - own)
        audio += sum(len(one.samples) for one in spoken) / 24_000 * own
    return spent, audio


def main() -> None:
    """Run both contenders and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "large"], default="small")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--max-batch", type=int, default=16, help="Utterances under way at a time in bark_fast."
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--case", choices=["mixed", "equal"], help="Only this one.")
    parser.add_argument("--checkpoints", type=Path, help="Keep the checkpoints in this folder.")
    parser.add_argument("--quick", action="store_true", help="Tiny weights, short requests, no rows.")
    parser.add_argument("--no-rows", action="store_true", help="Print only.")
    options = parser.parse_args()
    if options.quick:
        options.size, options.no_rows = "tiny", True
    print(f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.checkpoints or Path(temporary)) / options.size / "hf"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            make_checkpoint(folder, size=options.size, format="hf", seed=0)
        bark = Bark.from_pretrained(
            folder, device=options.device, dtype=options.dtype, max_batch=options.max_batch
        )
        peer = HFPeer(folder, options.device, getattr(torch, options.dtype))
        for case in cases(options.quick):
            if options.case in (None, case.name):
                rows = measure(case, bark, peer, options)
                if not options.no_rows:  # at once: the next case may take half an hour
                    print(f"rows appended to {append_rows('engine', rows)}")


def measure(case: Case, bark: Bark, peer: HFPeer, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of both contenders, one after the other in each repeat."""
    runs = {"bark_fast": lambda: speak_ours(bark, case), "transformers": lambda: speak_hf(peer, case)}
    short = Case("warm-up", [0.3] * 2, 0.0)
    speak_ours(bark, short)
    speak_hf(peer, short)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    seconds = {}
    for _ in range(options.repeats):
        for name, run in runs.items():
            spent, seconds[name] = run()
            rates[name].append(seconds[name] / spent)
            print(f"{case.name}: {name} {seconds[name]:.1f} s of audio in {spent:.1f} s", flush=True)
    speedup = float(np.median(rates["bark_fast"])) / float(np.median(rates["transformers"]))
    met = speedup >= case.target
    print(f"{case.name}: {speedup:.2f}x Hugging Face, wanted {case.target}x: {'met' if met else 'NOT MET'}")
    return [
        {
            "case": case.name, "size": options.size, "dtype": options.dtype, "device": options.device,
            "requests": len(case.seconds), "batch": options.max_batch if name == "bark_fast" else HF_BATCH,
            "contender": name, "audio_seconds": seconds[name], "unit": "audio s per s", **quantiles(values),
            "speedup": speedup if name == "bark_fast" else 1.0, "target": case.target, "met": met,
        }
        for name, values in rates.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
