"""Whole models on interpreted Triton kernels, prompts and bursts, draw the tokens plain torch draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_cases import interpreted

from bark_fast.config import GPTConfig
from bark_fast.engine.graph_runner import GraphRunner
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.scheduler import Scheduler, Utterance
from bark_fast.modules.gpt import GPT
from bark_fast.ops.dispatch import Backend, prefer
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.pipeline import Bark
from bark_fast.sampling import SamplingRule
from bark_fast.work import Decode, Stage

pytest.importorskip("triton")
pytestmark = interpreted

CONFIG = GPTConfig(
    n_layer=1, n_head=2, n_embd=64, block_size=64, input_vocab_size=50, output_vocab_size=50, bias=False
)  # fmt: skip
RULES = {
    "semantic": SamplingRule("suno", ((0, 40),), 50, 0.7, min_eos_p=0.9, eos_token=39),
    "coarse": SamplingRule("hf", ((0, 24), (24, 50)), 50, 0.8, top_k=12, top_p=0.9),
}


def model(seed: int) -> GPT:
    """A model as small as kernels take it: the interpreter needs milliseconds for each program."""
    gpt = GPT(CONFIG).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in gpt.named_parameters():
        parameter.normal_(1.0 if "ln_" in name else 0.0, 0.1 if "ln_" in name else 0.3, generator=generator)
    return gpt


def stage(name: str, merged: bool) -> Stage[list[int]]:
    """Two decodes: a prompt, perhaps with merged halves, and a longer one that shares its beginning."""
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, 50, 13)
    halves = rng.integers(0, 50, 9) if merged else None
    first = yield Decode(name, prompt, RULES[name], 3, merged=halves)
    grown = np.concatenate([prompt, first.tokens, prompt[:9]])
    second = yield Decode(name, grown, RULES[name], 3, first_step=first.steps, merged=halves)
    return [*first.tokens.tolist(), *second.tokens.tolist()]


def drawn(kind: type[EagerRunner], bark: Bark, backend: Backend) -> list[list[int]]:
    """Tokens of three utterances in one batch."""
    with prefer(backend):
        runner = kind(model(0), model(1), bark.runner.fine_model, bark.runner.codec, max_sequences=4)
        for pool in runner.pools.values():
            for pages in (*pool.keys, *pool.values):
                pages.fill_(torch.nan)
        jobs = [
            Utterance(stage(name, merged), PhiloxNoise(seed, runner.device))
            for seed, (name, merged) in enumerate([("semantic", True), ("semantic", False), ("coarse", False)])
        ]
        outcomes = sorted(Scheduler(runner).run(jobs), key=lambda outcome: outcome.index)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    return [outcome.result or [] for outcome in outcomes]


def test_tokens_equal_those_of_torch(suno_bark: Bark) -> None:
    expected = drawn(EagerRunner, suno_bark, "torch")
    assert all(len(set(tokens)) > 2 for tokens in expected)
    assert drawn(GraphRunner, suno_bark, "triton") == expected
