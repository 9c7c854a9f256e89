"""Random utterances on a tiny model with short windows, and the runner they are tried on."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bark_fast.audio import Tokens
from bark_fast.config import Layout
from bark_fast.engine.graph_runner import GraphRunner
from bark_fast.engine.kv_pool import KVPool
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.scheduler import Group, Limits, Outcome, Scheduler, Utterance
from bark_fast.errors import GenerationError
from bark_fast.ops.noise import PhiloxNoise, TorchNoise
from bark_fast.pipeline import Bark
from bark_fast.sampling import SamplingParams, SamplingRule, StageDefaults
from bark_fast.stages.request import Options
from bark_fast.stages.utterance import Speech, long_form
from bark_fast.work import Decode, Stage

CPU = torch.device("cpu")
LAYOUT = replace(
    Layout(), max_text_tokens=24, max_semantic_tokens=64, max_coarse_input=24, max_coarse_history=40,
    coarse_window=20, fine_window=32, fine_stride=16,
)  # fmt: skip
"""Every window of Bark, short: prompts slide and fine windows overlap within a second of speech."""
RULE = SamplingRule("suno", ((10_000, 11_024), (11_024, 12_048)), 12_096, temperature=0.8)
"""How codes of the coarse stage are drawn."""
PAGES_OF_ONE = {"semantic": 6, "coarse": 6}
"""Pages that the longest of these utterances needs: 24 + 1 + 64 and 24 + 1 + 40 + 20 tokens."""


class SmallRunner(EagerRunner):
    """The models of another runner, few pages, and a codec that costs nothing: tokens are what counts."""

    def __init__(self, runner: EagerRunner, pages: dict[str, int] | None = None) -> None:
        models = runner.models
        super().__init__(models["semantic"], models["coarse"], runner.fine_model, runner.codec, max_sequences=1)
        for name, gpt in models.items():
            self.pools[name] = KVPool(
                gpt.config, self.devices[name], torch.float32, (pages or {}).get(name, 200)
            )

    def vocode(self, works):
        return [np.zeros(320 * work.codes.shape[1], dtype=np.float32) for work in works]

    def leaks(self) -> dict[str, tuple[int, int]]:
        """Pages and sequences still held, by model, where there are any."""
        held = {name: pool.pool.stats() for name, pool in self.pools.items()}
        return {name: (s.pages_used, s.sequences) for name, s in held.items() if s.pages_used or s.sequences}


class BurstingRunner(GraphRunner, SmallRunner):
    """The same, decoding in bursts as on a GPU."""


def runner_of(kind: type[EagerRunner], bark: Bark, device: str = "cpu", sequences: int = 16) -> Any:
    """A runner over `bark`'s models whose pages hold NaN until they are written."""
    old = bark.runner
    models = [old.models["semantic"], old.models["coarse"], old.fine_model, old.codec]
    runner = kind(*(model.to(device) for model in models), max_sequences=sequences)
    for pool in runner.pools.values():
        for pages in (*pool.keys, *pool.values):
            pages.fill_(torch.nan)
    return runner


class CollectingRunner(SmallRunner):
    """In a step, when another such runner is in one, drops the litter it was given.

    As the garbage collector may at any place.
    """

    litter: list[Any] | None = None

    def __init__(self, runner: EagerRunner, both_in_steps: threading.Barrier) -> None:
        super().__init__(runner)
        self.both_in_steps = both_in_steps

    def step(self, model, sequences):
        if self.litter is not None:
            litter, self.litter = self.litter, None
            self.both_in_steps.wait(20)
            litter.clear()
        return super().step(model, sequences)


@dataclass(frozen=True)
class Spoken:
    """A request, for an utterance or a group of utterances that wait for each other."""

    texts: list[list[np.ndarray]]  # of each utterance: chunks of ids
    voice: Tokens | None
    options: Options
    rng: str
    seed: int

    def utterances(self, device: torch.device = CPU) -> list[Utterance]:
        """Fresh coroutines, and noise drawn on a device."""
        group = Group() if len(self.texts) > 1 else None
        return [
            Utterance(long_form(chunks, self.voice, self.options), self._noise(row, device), group)
            for row, chunks in enumerate(self.texts)
        ]

    def _noise(self, row: int, device: torch.device) -> PhiloxNoise | TorchNoise:
        if self.rng == "philox":
            return PhiloxNoise(self.seed, device)
        generator = torch.Generator(device).manual_seed(self.seed)
        return TorchNoise(generator, device, self.options.dialect, len(self.texts), row)


def random_request(rng: np.random.Generator, group: bool = False, longest: float = 0.5) -> Spoken:
    """Any text, voice, length, dialect, settings and seed."""
    dialect = "hf" if group else str(rng.choice(["suno", "hf"]))
    source = "torch" if group else str(rng.choice(["philox", "torch"]))

    def params(eos: bool) -> SamplingParams:
        temperature, top_k = float(rng.choice([0.0, 0.7, 1.1])), int(rng.integers(2, 60))
        return SamplingParams(
            temperature,
            top_k if rng.random() < 0.3 else None,
            float(rng.uniform(0.5, 1.0)) if rng.random() < 0.3 else None,
            1.3e-4 if eos and rng.random() < 0.5 else None,
        )

    fine = SamplingParams(float(rng.choice([0.0, 0.5])), None, None, None)
    options = Options(
        LAYOUT, dialect, StageDefaults(params(True), params(False), fine), 10_048, 12_096,
        max_seconds=float(rng.uniform(0.1, longest)), joined=group,
    )  # fmt: skip
    chunks = 1 if group else int(rng.choice([1, 1, 1, 2]))
    texts = [
        [rng.integers(10_048, 120_000, rng.integers(1, 25)) for _ in range(chunks)]
        for _ in range(3 if group else 1)
    ]
    return Spoken(texts, random_voice(rng), options, source, int(rng.integers(2**32)))


def random_voice(rng: np.random.Generator) -> Tokens | None:
    """None, or one of a few voices, so that prompts have beginnings in common."""
    which = int(rng.integers(0, 6))
    if which > 2:
        return None
    own = np.random.default_rng(which)
    frames = int(own.integers(20, 60))
    fine = own.integers(0, 1024, (8, frames))
    return Tokens(own.integers(0, 10_000, frames * 2 // 3), fine[:2], fine)


def tokens_of(outcome: Outcome) -> Any:
    """All tokens of all chunks as lists, or the error as a string."""
    if outcome.error is not None:
        assert isinstance(outcome.error, GenerationError), outcome.error
        return str(outcome.error)
    return [
        [getattr(speech.tokens, stage).tolist() for stage in ("semantic", "coarse", "fine")]
        if isinstance(speech, Speech)
        else str(speech)
        for speech in outcome.result
    ]


def spoken_alone(runner: EagerRunner, request: Spoken, kind: type[SmallRunner] = SmallRunner) -> list[Any]:
    """What each utterance of the request says when nothing else is under way, fed whole."""
    scheduler: Scheduler = Scheduler(kind(runner), limits=Limits(prefill_rows=10_000))
    outcomes = sorted(scheduler.run(request.utterances(runner.device)), key=lambda outcome: outcome.index)
    return [tokens_of(outcome) for outcome in outcomes]


def forever() -> Stage[None]:
    """Draws until it is closed."""
    while True:
        yield Decode("coarse", np.arange(10_000, 10_040), RULE, 20)


def wait_for_idle() -> None:
    """Until no worker thread is left, which must not be long."""
    deadline = time.perf_counter() + 10
    while any(thread.name == "bark-fast" for thread in threading.enumerate()):
        assert time.perf_counter() < deadline, "the worker's thread does not end"
        time.sleep(0.01)
