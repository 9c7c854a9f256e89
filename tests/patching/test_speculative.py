"""Patched models that guess tokens: those of the original all the same, and bytes that the report counts."""

from __future__ import annotations

import pytest
import torch
from patched_twins import both
from suno_cases import TEXT, VOICE, equal, speech
from suno_cases import both as both_of_suno

import bark_fast
from bark_fast import extension
from bark_fast.engine.speculative_runner import SpeculativeRunner
from bark_fast.modules.draft import DraftGPT

TEXTS = ["Hello there.", "Another, and a longer text than the first.", "Third"]

pytestmark = pytest.mark.skipif(
    extension.load() is None or extension.load().isa() == "portable",  # type: ignore[union-attr]
    reason="no compiled vector code here",
)


@pytest.fixture(autouse=True)
def guesses(monkeypatch):
    """Of tiny models, too; how many guesses there were of each number of sequences."""
    seen: dict[int, int] = {}
    usual = SpeculativeRunner._rows

    def rows(self, gpt, pool, runs, last_only):
        if isinstance(gpt, DraftGPT):
            seen[len(runs)] = seen.get(len(runs), 0) + 1
        return usual(self, gpt, pool, runs, last_only)

    monkeypatch.setattr(SpeculativeRunner, "least_bytes", 0)
    monkeypatch.setattr(SpeculativeRunner, "_rows", rows)
    return seen


@pytest.mark.parametrize("texts", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"top_k": 30, "temperature": 1.1}], ids=str)
@pytest.mark.parametrize("rng", ["torch", "philox"])
@pytest.mark.usefixtures("no_decline")
def test_hugging_faces_tokens(peer, texts, options, rng, guesses):
    """Rows of one generator's noise go step by step; torch's generator is where the original leaves it."""
    with torch.no_grad():
        peer.model.semantic.lm_head.weight[10_000] *= 8  # ends early, and a row before the other

    def call(_):
        spoken = peer.speak(TEXTS[:texts], semantic_max_new_tokens=50, **options)
        return [[one.semantic.tolist(), one.coarse.tolist()] for one in spoken], torch.rand(3).tolist()

    expected, got = both(peer.model, call, seed=2, rng=rng)
    if rng == "torch":
        assert got == expected
    else:
        with bark_fast.patched(peer.model, rng=rng, speculative=False):
            torch.manual_seed(2)
            assert call(None)[0] == got[0]
    alone = rng == "torch" and options.get("do_sample", True)
    if texts == 1 or (texts == 2 and not alone):
        assert sum(guesses.values()) > 10
    assert texts == 1 or not alone or guesses.keys() <= {1}


@pytest.mark.parametrize("temperature", [0.7, 1.2])
def test_sunos_tokens(generation, temperature, guesses):
    """And torch's generator is where suno leaves it."""
    equal(*both_of_suno(generation, "generate_text_semantic", TEXT, history_prompt=VOICE, temp=temperature))
    semantic = speech(60)
    equal(*both_of_suno(generation, "generate_coarse", semantic, history_prompt=VOICE, temp=temperature))
    assert guesses[1] > 30


def test_the_report_counts_them_and_they_are_made_only_where_asked_for(peer, guesses):
    model = bark_fast.patch(peer.model)
    assert bark_fast.patch_report(model).copied_bytes == 0
    peer.speak(TEXTS[:1], semantic_max_new_tokens=10)
    parts = [part.bound().model for part in (model.semantic, model.coarse_acoustics)]
    assert bark_fast.patch_report(model).copied_bytes == sum(DraftGPT.bytes_of(gpt.config) for gpt in parts) > 0
    guesses.clear()
    bark_fast.patch(model, speculative=False)
    peer.speak(TEXTS[:1], semantic_max_new_tokens=10)
    assert not guesses and bark_fast.patch_report(model).copied_bytes == 0


def test_sunos_module_patched_anew_without(bark, generation):
    bark_fast.patch(bark)
    generation.generate_text_semantic(TEXT, silent=True)
    assert bark_fast.patch_report(bark).copied_bytes > 0
    bark_fast.patch(bark, speculative=False)
    generation.generate_text_semantic(TEXT, silent=True)
    assert bark_fast.patch_report(bark).copied_bytes == 0
    bark_fast.unpatch(bark)


def test_weights_that_are_written_to_are_guessed_with(peer):
    """Else all guesses would be wrong from then on."""
    model = bark_fast.patch(peer.model)
    peer.speak(TEXTS[:1], semantic_max_new_tokens=10)
    gpt = model.semantic.bound().model
    draft = gpt.draft()
    assert gpt.draft() is draft
    with torch.no_grad():
        model.semantic.layers[0].mlp.in_proj.weight.mul_(-1)
    assert gpt.draft() is not draft
    assert torch.equal(gpt.draft().layers.weights[8], -draft.layers.weights[8])
