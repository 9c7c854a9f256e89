"""The compiled peer of the benchmarks decodes what our engine decodes: it is a fair peer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from static_peer import StaticCachePeer

from bark_fast.engine.scheduler import Scheduler, Utterance
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.pipeline import Bark
from bark_fast.sampling import SamplingRule
from bark_fast.work import Decode


def stage(work: Decode):
    """A coroutine of one decode."""
    return (yield work)


@pytest.mark.parametrize("mode", [None, pytest.param("max-autotune", marks=pytest.mark.gpu)])
def test_greedy_tokens_equal_ours(suno_bark: Bark, mode: str | None) -> None:
    gpt = suno_bark.runner.models["semantic"]
    device = "cuda" if mode else "cpu"
    prompt = np.random.default_rng(0).integers(0, 10_000, 40)
    rule = SamplingRule("suno", ((0, 10_000),), 10_048, temperature=0.0)
    noise = PhiloxNoise(0, torch.device("cpu"))
    scheduler: Scheduler = Scheduler(suno_bark.runner)
    (ours,) = scheduler.run([Utterance(stage(Decode("semantic", prompt, rule, 30)), noise)])
    peer = StaticCachePeer(gpt.to(device), 1, 0, 10_000, 0.0, mode)
    try:
        theirs = peer.decode(torch.from_numpy(prompt)[None].to(device), 30)[0]
    finally:
        gpt.to("cpu")
    assert ours.result is not None and len(set(ours.result.tokens.tolist())) > 3
    assert theirs.tolist() == ours.result.tokens.tolist()
