"""With the same torch seed, bark_fast and suno's bark 0.1.5 draw the same tokens and make the same waveform."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bark_fast import Audio, SamplingParams
from bark_fast.config import Layout
from bark_fast.sampling import suno_defaults
from bark_fast.stages.request import Options
from bark_fast.stages.semantic import semantic_rule

TEXT = "Hello, my name is Suno. And, uh, and I like pizza."
VOICE = "v2/en_speaker_6"

ENDLESS = pytest.mark.parametrize("eos_gain", [0.0], indirect=True, ids=["endless"])
OFTEN_ENDING = pytest.mark.parametrize("eos_gain", [4.0], indirect=True, ids=["often-ending"])


def speak_both(bark, peer, seed, voice=None, text=TEXT, max_seconds=1.2, fine_temperature=0.5, **params):
    """The same request to both, under the same seed."""
    torch.manual_seed(seed)
    theirs = peer.speak(text, voice, fine_temperature=fine_temperature, max_seconds=max_seconds, **params)
    drawn = SamplingParams(**{k: v for k, v in params.items() if k != "min_eos_p"})
    eos = {k: v for k, v in params.items() if k == "min_eos_p"}
    ours = bark.generate(
        text, voice=voice, seed=seed, rng="torch", max_seconds=max_seconds,
        semantic=SamplingParams(**eos).over(drawn), coarse=drawn,
        fine=SamplingParams(temperature=fine_temperature),
    )  # fmt: skip
    return ours, theirs


def assert_equal(ours: Audio, theirs) -> None:
    """Tokens equal; samples within 1e-5."""
    for stage in ("semantic", "coarse", "fine"):
        np.testing.assert_array_equal(getattr(ours.tokens, stage), getattr(theirs, stage), err_msg=stage)
    assert ours.samples.shape == theirs.samples.shape
    assert np.abs(ours.samples - theirs.samples).max() <= 1e-5
    assert np.abs(theirs.samples).max() > 0.01  # silence would agree too


@ENDLESS
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.2},
        {"top_k": 50},
        {"top_p": 0.9},
        {"top_k": 30, "top_p": 0.8, "temperature": 0.9},
    ],
    ids=["defaults", "hot", "top_k", "top_p", "both"],
)
def test_sampled_tokens_equal_sunos(suno_bark, suno_peer, seed, params, eos_gain):
    ours, theirs = speak_both(suno_bark, suno_peer, seed, **params)
    assert_equal(ours, theirs)
    assert theirs.coarse.size > 60  # several coarse windows


def test_another_seed_gives_other_tokens(suno_bark):
    """The tests above could not tell seeds apart if the seed were ignored by both."""
    one, two = (suno_bark.generate(TEXT, seed=s, rng="torch", max_seconds=0.5) for s in (0, 1))
    assert not np.array_equal(one.tokens.semantic, two.tokens.semantic)


@pytest.mark.parametrize("voice", [VOICE, "announcer", "de_speaker_3"])
def test_real_voices_give_sunos_tokens(suno_bark, suno_peer, voice):
    assert_equal(*speak_both(suno_bark, suno_peer, 3, voice))


@ENDLESS
def test_long_speech_crosses_many_windows(suno_bark, suno_peer, eos_gain):
    """10 s in a voice: the coarse window slides from its start and the fine stage takes two windows."""
    ours, theirs = speak_both(suno_bark, suno_peer, 5, VOICE, max_seconds=10.0)
    assert theirs.fine.shape[1] > 1024 - 464  # beyond the first fine window, with this voice's 464 frames
    assert_equal(ours, theirs)


@ENDLESS
def test_long_speech_without_a_voice_reuses_the_prefix_exactly(suno_bark, suno_peer, eos_gain):
    """11 s without a voice: beyond 630 coarse codes the kept prefix no longer fits the prompt."""
    ours, theirs = speak_both(suno_bark, suno_peer, 6, max_seconds=11.0)
    assert theirs.coarse.size > 1500
    assert_equal(ours, theirs)


def test_early_stop_by_eos_probability(suno_bark, suno_peer):
    ours, theirs = speak_both(suno_bark, suno_peer, 1, min_eos_p=3e-5, max_seconds=6.0)
    assert 1 < len(theirs.semantic) < 299
    assert_equal(ours, theirs)


@OFTEN_ENDING
def test_early_stop_by_a_drawn_eos(suno_bark, suno_peer, eos_gain):
    ours, theirs = speak_both(suno_bark, suno_peer, 1, min_eos_p=None, max_seconds=6.0)
    assert 1 < len(theirs.semantic) < 299
    assert_equal(ours, theirs)


def test_no_early_stop_by_probability_when_min_eos_p_is_none(suno_bark, suno_peer):
    assert_equal(*speak_both(suno_bark, suno_peer, 1, min_eos_p=None, temperature=1.5, max_seconds=3.0))


def test_greedy_is_the_limit_of_sunos_small_temperature(suno_bark, suno_peer):
    """suno cannot divide by zero; at 1e-4 its softmax is one-hot."""
    torch.manual_seed(0)
    theirs = suno_peer.speak(TEXT, temperature=1e-4, fine_temperature=None, max_seconds=1.5)
    greedy = SamplingParams(temperature=0)
    ours = suno_bark.generate(TEXT, semantic=greedy, coarse=greedy, fine=greedy, max_seconds=1.5)
    assert_equal(ours, theirs)


def test_global_generator_is_consumed_as_suno_does(suno_bark, suno_peer):
    """Without a seed, torch's global generator goes on where it stands, call after call."""
    torch.manual_seed(11)
    theirs = [suno_peer.speak(text, max_seconds=0.6) for text in ("One.", "Two.")]
    torch.manual_seed(11)
    ours = suno_bark.generate(["One.", "Two."], rng="torch", max_seconds=0.6)
    for one, other in zip(ours, theirs, strict=True):
        assert_equal(one, other)


def test_a_previous_audio_carries_its_voice(suno_bark, suno_peer):
    """`voice=audio` is suno's history_prompt of a full generation."""
    torch.manual_seed(2)
    first = suno_peer.speak(TEXT, max_seconds=2.0)
    history = {
        "semantic_prompt": first.semantic, "coarse_prompt": first.coarse, "fine_prompt": first.fine
    }  # fmt: skip
    torch.manual_seed(3)
    theirs = suno_peer.speak("And more.", history, max_seconds=1.0)
    audio = suno_bark.generate(TEXT, seed=2, rng="torch", max_seconds=2.0)
    ours = suno_bark.generate("And more.", voice=audio, seed=3, rng="torch", max_seconds=1.0)
    assert_equal(ours, theirs)


def test_what_may_not_end_cannot_draw_eos():
    """suno cuts the logits before the pad token then; otherwise it is the last that may be drawn."""
    options = Options(Layout(), "suno", suno_defaults(), 10_048, 12_096)
    free, bound = (
        semantic_rule(suno_defaults().semantic, replace(options, may_end=may_end)) for may_end in (True, False)
    )
    assert (free.windows, free.eos_token, free.min_eos_p) == (((0, 10_001),), 10_000, 0.2)
    assert (bound.windows, bound.eos_token, bound.min_eos_p) == (((0, 10_000),), None, None)


def test_whole_stretch_of_semantic_counts_gives_sunos_frames():
    """Frames per semantic token, for every count Bark can reach, in suno's float64 expression."""
    from bark_fast.config import Layout
    from bark_fast.stages.coarse import frames_for

    ratio = 75 / 49.9 * 2
    for count in range(1, 769):
        theirs = round(np.floor(count * ratio / 2) * 2)
        assert frames_for(count, Layout(), "suno") * 2 == theirs, count
