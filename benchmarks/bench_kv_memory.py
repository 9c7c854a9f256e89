"""Waste of the paged key-value cache over 200 utterances of mixed length at batch 32.

The scheduler really runs them (tiny random weights, semantic and coarse stages); after every step the pools say
how many tokens their pages could hold and how many they do. Beside it stands what a contiguous cache of full
length for every open sequence would reserve at the same moments.

    python benchmarks/bench_kv_memory.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness import append_rows, quantiles

from bark_fast import Bark, make_checkpoint
from bark_fast.engine.scheduler import Scheduler, Utterance
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.stages.coarse import coarse
from bark_fast.stages.request import Options
from bark_fast.stages.semantic import semantic
from bark_fast.text import encode_text
from bark_fast.work import IntArray, Stage

TEXT = "Hello, my name is Suno. And, uh, and I like pizza."


def utterances(bark: Bark, seconds: list[float]) -> Iterator[Utterance[IntArray]]:
    """One utterance per length, up to its coarse codes."""

    def stage(options: Options) -> Stage[IntArray]:
        tokens = yield from semantic(text, None, options.sampling.semantic, options, 0)
        return (yield from coarse(tokens, None, options.sampling.coarse, options, 0))

    text = encode_text(TEXT, bark.tokenizer, bark.config.layout)
    for index, length in enumerate(seconds):
        options = Options(
            bark.config.layout, bark.dialect, bark.defaults, bark.config.semantic.output_vocab_size,
            bark.config.coarse.output_vocab_size, max_seconds=length,
        )  # fmt: skip
        yield Utterance(stage(options), PhiloxNoise(index, bark.device))


def main() -> None:
    """Run the trace and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--no-rows", action="store_true", help="Print only.")
    options = parser.parse_args()
    seconds = np.random.default_rng(0).uniform(1.0, 13.0, options.utterances).tolist()
    paged: list[float] = []
    contiguous: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        bark = Bark.from_pretrained(
            make_checkpoint(Path(folder) / "tiny", size="tiny", format="suno", seed=0),
            device="cpu", max_batch=options.batch,
        )  # fmt: skip
        step = bark.runner.step

        def watched(model: str, sequences: list) -> list:  # type: ignore[type-arg]
            tokens = step(model, sequences)
            stats = [pool.pool.stats() for pool in bark.runner.pools.values()]
            live, reserved = sum(s.tokens_live for s in stats), sum(s.tokens_reserved for s in stats)
            whole = sum(s.sequences for s in stats) * bark.config.semantic.block_size
            paged.append((reserved - live) / reserved)
            contiguous.append((whole - live) / whole)
            return tokens

        bark.runner.step = watched  # type: ignore[method-assign]
        jobs = utterances(bark, seconds)
        outcomes = list(Scheduler(bark.runner, max_batch=options.batch).run(jobs))
        assert not [one.error for one in outcomes if one.error]
    print(f"{options.utterances} utterances of 1 to 13 s, batch {options.batch}, {len(paged)} steps")
    rows = []
    for name, waste in (("pages of 16", paged), ("contiguous, full length", contiguous)):
        mean, worst = 100 * np.mean(waste), 100 * max(waste)
        print(f"{name:26} waste {mean:5.1f} % of reserved bytes (worst step {worst:.1f} %)")
        rows.append({"utterances": options.utterances, "batch": options.batch, "cache": name,
                     "unit": "waste / reserved bytes", "mean": float(np.mean(waste)), "max": max(waste),
                     **quantiles(waste)})  # fmt: skip
    if not options.no_rows:
        print(f"rows appended to {append_rows('kv_memory', rows, device='cpu')}")


if __name__ == "__main__":
    main()
