"""Audio-seconds per second of many requests, beside Hugging Face's static batches, and what one alone costs.

"mixed": 32 requests of 1 to 10 s in one list, for Hugging Face in batches of 8 as they come. "equal": 8
requests of the same length, one batch for both. Same weights (random, of the published shapes), dtype and
machine, each contender in turn, a text of its own for each request. "many": 64 requests of 5 s under way
together, without a peer. "book": 8 texts joined into one long one, in a given voice, beside the same chunk by
chunk. "alone": one utterance, see benchmarks/one_utterance.py.

Random weights do not end by themselves, so each request's length is its limit of semantic tokens. In a batch of
Hugging Face's every row is computed up to the longest one's end in all stages but the codec, which decodes
each row's own length. So the batch is run at its longest length; only the rows' own seconds count as audio,
and of the codec's time only their share counts as work.

    python benchmarks/bench_engine.py --size small
    python benchmarks/bench_engine.py --case alone many --size large --dtype bfloat16 --device cuda
    python benchmarks/bench_engine.py --quick           # tiny weights, short requests: exercises the code only
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_timing import going_on
from harness import TEXT, append_rows, checkpoint, machine, quantiles
from one_utterance import figures
from peers import HFPeer

from bark_fast import Audio, Bark, SamplingParams

HF_BATCH = 8
HF, IN_ORDER = "transformers", "bark_fast, chunk by chunk"
CASES = ("mixed", "equal", "many", "book", "alone")


@dataclass(frozen=True)
class Case:
    """Requests by their seconds, under way together.

    target: how many times faster than the peer they are meant to be; without one, the audio-seconds per second
    meant for large in bfloat16 on an H200.
    """

    name: str
    seconds: list[float]
    batch: int
    target: float
    peer: str = HF


def cases(quick: bool, batch: int) -> list[Case]:
    """32 requests of mixed lengths, 8 of one, 64 at a time."""
    rng = np.random.default_rng(0)
    if quick:
        return [
            Case("mixed", [round(float(s), 2) for s in rng.uniform(0.2, 1.5, 10)], batch, 1.8),
            Case("equal", [0.6] * 4, batch, 1.3),
            Case("many", [0.6] * 6, 6, 100.0, peer=""),
            Case("book", [0.6] * 4, batch, 1.3, peer=IN_ORDER),
        ]
    return [
        Case("mixed", [round(float(s), 1) for s in rng.uniform(1.0, 10.0, 32)], batch, 1.8),
        Case("equal", [5.0] * 8, batch, 1.3),
        Case("many", [5.0] * 64, 64, 100.0, peer=""),
        Case("book", [5.0] * 8, batch, 1.3, peer=IN_ORDER),
    ]


def texts(count: int) -> list[str]:
    """One a request, different from its first word on: requests of one text share its prefill."""
    return [f"{index}. {TEXT}" for index in range(count)]


def speak_ours(bark: Bark, case: Case) -> tuple[float, float]:
    """Seconds of work and of audio."""
    spoken = zip(texts(len(case.seconds)), case.seconds, strict=True)
    requests = ({"text": text, "seed": i, "max_seconds": s} for i, (text, s) in enumerate(spoken))
    start = time.perf_counter()
    done = dict(bark.stream_results(requests, semantic=SamplingParams(min_eos_p=None)))
    spent = time.perf_counter() - start
    return spent, sum(audio.duration for audio in done.values())


def speak_book(bark: Bark, voice: Audio, case: Case) -> tuple[float, float]:
    """Seconds of work and of audio, less the pauses."""
    start = time.perf_counter()
    audio = bark.generate(
        " ".join(texts(len(case.seconds))), voice=voice, seed=0, long_form=True, max_seconds=case.seconds[0],
        semantic=SamplingParams(min_eos_p=None),
    )  # fmt: skip
    spent = time.perf_counter() - start
    assert audio.tokens is not None
    return spent, audio.tokens.fine.shape[1] / 75


def speak_hf(peer: HFPeer, case: Case) -> tuple[float, float]:
    """Seconds of work and of audio."""
    torch.manual_seed(0)
    spent = audio = 0.0
    for first in range(0, len(case.seconds), HF_BATCH):
        lengths = case.seconds[first : first + HF_BATCH]
        said = texts(len(case.seconds))[first : first + HF_BATCH]
        start = time.perf_counter()
        spoken = peer.speak(said, semantic_max_new_tokens=round(max(lengths) * 49.9 + 0.5))
        spent += time.perf_counter() - start
        own = sum(lengths) / (max(lengths) * len(lengths))
        spent -= spoken[0].timings["codec"] * (1 - own)
        audio += sum(len(one.samples) for one in spoken) / 24_000 * own
    return spent, audio


def main() -> None:
    """Run the cases one after the other and append the rows of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "large"], default="small")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--max-batch", type=int, default=16, help="Utterances under way at a time beside Hugging Face's."
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["mixed", "equal"], help="Only these.")
    parser.add_argument("--checkpoints", type=Path, help="Keep the checkpoints in this folder.")
    parser.add_argument("--quick", action="store_true", help="Tiny weights, short requests, no rows.")
    parser.add_argument("--no-rows", action="store_true", help="Print only.")
    options = parser.parse_args()
    if options.quick:
        options.size, options.no_rows, options.case = "tiny", True, CASES
    print(f"{machine(options.device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    chosen = [case for case in cases(options.quick, options.max_batch) if case.name in options.case]
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint(options.checkpoints or Path(temporary), options.size, "hf")
        for run in [partial(alone, folder, options)] * ("alone" in options.case) + [
            partial(measure, case, folder, options) for case in chosen
        ]:
            with going_on(run.args[0].name if isinstance(run.args[0], Case) else "alone"):
                rows = run()
                if not options.no_rows:  # at once: the next case may take half an hour
                    print(f"rows appended to {append_rows('engine', rows, device=options.device)}")


def alone(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each figure of one utterance."""
    bark = Bark.from_pretrained(folder, device=options.device, dtype=options.dtype, max_batch=1)
    bounded = options.size == "large" and options.dtype == "bfloat16"
    rows = []
    for one in figures(bark, 0.6 if options.quick else 5.0, max(3, options.repeats), bounded):
        spread = quantiles(one.values)
        met: bool | str = ""
        wanted = ""
        if one.at_most is not None:
            met = spread["p50"] <= one.at_most
            wanted = f", wanted at most {one.at_most:.4g}: {'met' if met else 'NOT MET'}"
        print(f"alone: {spread['p50']:.4g} {one.unit}{wanted}")
        rows.append({
            "case": "alone", "size": options.size, "dtype": options.dtype, "device": options.device,
            "requests": 1, "batch": 1, "contender": "bark_fast", "audio_seconds": one.audio_seconds,
            "unit": one.unit, **spread, "speedup": "", "target": one.at_most or "", "met": met,
        })  # fmt: skip
    return rows


def measure(case: Case, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the contenders, one after the other in each repeat."""
    load = partial(Bark.from_pretrained, folder, device=options.device, dtype=options.dtype)
    bark = load(max_batch=case.batch)
    runs: dict[str, Callable[[Case], tuple[float, float]]] = {"bark_fast": partial(speak_ours, bark)}
    if case.peer == IN_ORDER:
        voice = bark.generate(TEXT, seed=0, max_seconds=case.seconds[0])
        runs = {
            "bark_fast": partial(speak_book, bark, voice),
            case.peer: partial(speak_book, load(max_batch=1), voice),
        }
    if case.peer == HF:
        try:
            peer = HFPeer(folder, options.device, getattr(torch, options.dtype))
            runs[HF] = partial(speak_hf, peer)
        except ImportError as error:
            print(f"transformers is left out: {error}")
    short = replace(case, seconds=[0.3] * min(len(case.seconds), case.batch))
    for run in runs.values():
        run(short)
    if bark.captures:  # a graph is captured for each number of rows that the case meets
        runs["bark_fast"](case)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    seconds = {}
    for _ in range(options.repeats):
        for name, run in runs.items():
            spent, seconds[name] = run(case)
            rates[name].append(seconds[name] / spent)
            print(f"{case.name}: {name} {seconds[name]:.1f} s of audio in {spent:.1f} s", flush=True)
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    speedup = medians["bark_fast"] / medians[case.peer] if case.peer in medians else ""
    reached = speedup if case.peer else medians["bark_fast"]
    met: bool | str = ""
    if reached != "":
        met = reached >= case.target
        measured = f"x {case.peer}" if case.peer else " s of audio per second"
        print(f"{case.name}: {reached:.2f}{measured}, wanted {case.target}: {'met' if met else 'NOT MET'}")
    return [
        {
            "case": case.name, "size": options.size, "dtype": options.dtype, "device": options.device,
            "requests": len(case.seconds),
            "batch": {"bark_fast": case.batch, IN_ORDER: 1}.get(name, HF_BATCH),
            "contender": name, "audio_seconds": seconds[name], "unit": "audio s per s", **quantiles(values),
            "speedup": speedup if name == "bark_fast" else 1.0, "target": case.target, "met": met,
        }
        for name, values in rates.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
