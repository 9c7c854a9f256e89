"""With the same torch seed, bark_fast and transformers' BarkModel draw the same tokens, alone and batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bark_fast import SamplingParams
from bark_fast.config import Layout
from bark_fast.stages.coarse import frames_for

TEXTS = ["Hello there.", "Another, and a much longer text than the first, isn't it?", "Third"]

ENDLESS = pytest.mark.parametrize("eos_gain", [0.0], indirect=True, ids=["endless"])
OFTEN_ENDING = pytest.mark.parametrize("eos_gain", [4.0], indirect=True, ids=["often-ending"])


def seconds(tokens: int) -> float:
    """`max_seconds` that allows exactly `tokens` semantic tokens."""
    return (tokens - 0.5) / 49.9


def speak_both(bark, peer, texts, seed, tokens=45, voice=None, theirs=None, **ours):
    """The same request to both, under the same seed."""
    torch.manual_seed(seed)
    expected = peer.speak(texts, voice, semantic_max_new_tokens=tokens, **(theirs or {}))
    got = bark.generate(texts, voice=voice, seed=seed, rng="torch", max_seconds=seconds(tokens), **ours)
    return got, expected


def assert_equal(got, expected) -> None:
    """Tokens equal; samples within 1e-5."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        for stage in ("semantic", "coarse", "fine"):
            np.testing.assert_array_equal(getattr(ours.tokens, stage), getattr(theirs, stage), err_msg=stage)
        assert ours.samples.shape == theirs.samples.shape
        assert np.abs(ours.samples - theirs.samples).max() <= 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 1.2}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.7, "temperature": 0.9}],
    ids=["defaults", "hot", "top_k", "top_p", "all"],
)
def test_sampled_tokens_equal_hf(hf_bark, hf_peer, seed, params):
    options = {"semantic": SamplingParams(**params), "coarse": SamplingParams(**params)}
    if "temperature" in params:
        options["fine"] = SamplingParams(temperature=params["temperature"])
    assert_equal(*speak_both(hf_bark, hf_peer, TEXTS[:1], seed, theirs=params, **options))


@pytest.mark.parametrize("seed", [0, 1])
def test_batch_with_padding_equals_hf(hf_bark, hf_peer, seed):
    got, expected = speak_both(hf_bark, hf_peer, TEXTS, seed)
    assert_equal(got, expected)


def test_batch_of_rows_that_end_at_different_steps_equals_hf(hf_bark, hf_peer):
    """Rows that end early still consume noise and run as long as the longest, as in HF's lockstep batch."""
    min_eos_p = 3e-5
    got, expected = speak_both(
        hf_bark, hf_peer, TEXTS, 3, tokens=80,
        theirs={"min_eos_p": min_eos_p}, semantic=SamplingParams(min_eos_p=min_eos_p),
    )  # fmt: skip
    assert len({len(one.semantic) for one in expected}) > 1
    assert_equal(got, expected)


@OFTEN_ENDING
def test_batch_of_rows_that_draw_eos_equals_hf(hf_bark, hf_peer, eos_gain):
    got, expected = speak_both(hf_bark, hf_peer, TEXTS, 5, tokens=100)
    assert len({len(one.semantic) for one in expected}) > 1
    assert_equal(got, expected)


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["alone", "batched"])
def test_greedy_tokens_equal_hf(hf_bark, hf_peer, texts):
    greedy = SamplingParams(temperature=0)
    got, expected = speak_both(
        hf_bark, hf_peer, texts, 0,
        theirs={"do_sample": False, "fine_temperature": 1.0}, semantic=greedy, coarse=greedy, fine=greedy,
    )  # fmt: skip
    assert_equal(got, expected)


def test_a_real_voice_equals_hf(hf_bark, hf_peer, preset):
    assert_equal(*speak_both(hf_bark, hf_peer, TEXTS[:1], 4, voice=preset))


@ENDLESS
def test_long_speech_crosses_many_windows(hf_bark, hf_peer, eos_gain):
    """9 s without a voice: the coarse window slides from its start. (Fine needs one window: see suno's.)"""
    got, expected = speak_both(hf_bark, hf_peer, TEXTS[:1], 0, tokens=450)
    assert expected[0].coarse.size > 1300
    assert_equal(got, expected)


def test_second_codebook_may_draw_ids_beyond_its_codes(hf_bark):
    """HF leaves rows above the second codebook open and folds what is drawn there; suno does not."""
    from bark_fast.sampling import suno_defaults
    from bark_fast.stages.coarse import coarse_rule
    from bark_fast.stages.request import Options

    windows = {}
    for dialect in ("hf", "suno"):
        options = Options(Layout(), dialect, suno_defaults(), 10_048, 12_096)
        windows[dialect] = coarse_rule(suno_defaults().coarse, options).windows
    assert windows == {
        "hf": ((10_000, 11_024), (11_024, 12_096)),
        "suno": ((10_000, 11_024), (11_024, 12_048)),
    }


def test_whole_stretch_of_semantic_counts_gives_hfs_frames():
    """HF counts frames in torch's float32; every count Bark can reach gives the same number."""
    ratio = 75 / 49.9 * 2
    counts = torch.arange(1, 769)
    theirs = torch.round(torch.floor(counts * ratio / 2) * 2).int()
    ours = [frames_for(int(count), Layout(), "hf") * 2 for count in counts]
    assert ours == theirs.tolist()
