"""What guessing tokens gains on a CPU: one or two texts spoken with a draft model and without, in turns.

python benchmarks/bench_speculative.py [--size small large] [--dtype float32 bfloat16] [--quick]. Of the stages
that decode, prompts included, in ms a token of one text; the others are left out. Weights that are not random
make other guesses: the share of them that was right stands in the row. Tokens are compared.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import TEXT, append_rows, checkpoint, machine

from bark_fast import Audio, Bark, SamplingParams
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.speculative_runner import SpeculativeRunner
from bark_fast.work import FinePass, FloatArray, IntArray, Vocode

STAGES = ("semantic", "coarse")
CONTENDERS = {"step by step": False, "speculative": True}


def leave_out_what_does_not_decode(runner: EagerRunner) -> None:
    """Fine codes are zeros, and the audio silent."""

    def fine(passes: Sequence[FinePass], noise: object) -> list[IntArray]:
        return [np.zeros(len(work.codes) - work.start, dtype=np.int64) for work in passes]

    def vocode(works: Sequence[Vocode]) -> list[FloatArray]:
        return [np.zeros(320 * work.codes.shape[1], dtype=np.float32) for work in works]

    runner.fine, runner.vocode = fine, vocode  # type: ignore[method-assign]


def speak(bark: Bark, texts: int, seconds: float) -> Audio:
    """The first of `texts` spoken at once."""
    spoken = bark.generate([TEXT] * texts, seed=list(range(texts)), max_seconds=seconds,
                           semantic=SamplingParams(min_eos_p=None))  # fmt: skip
    return spoken[0]


def ms_a_token(audio: Audio, stage: str) -> float:
    """Of one stage."""
    assert audio.timings is not None and audio.tokens is not None
    tokens: np.ndarray = getattr(audio.tokens, stage)
    return 1e3 * audio.timings[stage] / tokens.size


def share_right(bark: Bark, stage: str) -> float | str:
    """Of the last guesses; empty where none were made."""
    if not isinstance(bark.runner, SpeculativeRunner):
        return ""
    return bark.runner.odds[stage].right


def measure(
    folder: Path, size: str, dtype: str, texts: int, seconds: float, repeats: int
) -> list[dict[str, Any]]:
    """A row a stage and contender."""
    barks = {
        name: Bark.from_pretrained(folder, device="cpu", dtype=dtype, speculative=speculative)
        for name, speculative in CONTENDERS.items()
    }
    for bark in barks.values():
        leave_out_what_does_not_decode(bark.runner)
    times: dict[tuple[str, str], list[float]] = {(name, stage): [] for name in barks for stage in STAGES}
    said: dict[str, Audio] = {}
    for repeat in range(repeats + 1):  # the first makes the draft, and is dropped
        for name, bark in barks.items():
            said[name] = speak(bark, texts, seconds if repeat else min(seconds, 1.0))
            for stage in STAGES if repeat else ():
                times[name, stage].append(ms_a_token(said[name], stage))
    ours, theirs = (audio.tokens for audio in said.values())
    assert ours is not None and theirs is not None
    rows = []
    for stage in STAGES:
        equal = np.array_equal(getattr(ours, stage), getattr(theirs, stage))
        plain = np.array(times["step by step", stage])
        for name, bark in barks.items():
            mine = np.array(times[name, stage])
            rows.append(
                {
                    "stage": stage, "size": size, "dtype": dtype, "texts": texts, "seconds": seconds,
                    "contender": name, "ms_a_token": float(np.median(mine)),
                    "speedup": float(np.median(plain / mine)), "right": share_right(bark, stage),
                    "repeats": repeats, "tokens_equal": equal,
                }
            )  # fmt: skip
            print({key: f"{v:.3g}" if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    return rows


def main() -> None:
    """Measure what was chosen; append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=["small", "large"], default=["small"])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--texts", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoints", type=Path, help="Keep the checkpoints in this folder.")
    parser.add_argument("--quick", action="store_true", help="Tiny weights, short speech, no rows.")
    options = parser.parse_args()
    if options.quick:
        options.size, options.seconds, options.repeats = ["tiny"], 0.5, 1
        SpeculativeRunner.least_bytes = 0
    print(f"{machine('cpu')}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        for size in options.size:
            folder = checkpoint(options.checkpoints or Path(temporary), size, "suno")
            for dtype in options.dtype:
                for texts in options.texts:
                    rows = measure(folder, size, dtype, texts, options.seconds, options.repeats)
                    if not options.quick:
                        print(f"rows appended to {append_rows('speculative', rows, device='cpu')}")


if __name__ == "__main__":
    main()
