"""suno's `bark` patched: every argument of every function gives the same tokens."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import torch
from suno_cases import TEXT, VOICE, both, codes, equal, speech, voice_dict, voice_file

import bark_fast
from bark_fast.patching.swap import STATE

VOICES = {
    "none": lambda generation: None,
    "preset": lambda generation: VOICE,
    "file": lambda generation: str(voice_file(generation)),
    "dict": voice_dict,
}

SEMANTIC = {
    "defaults": {},
    "hot": {"temp": 1.3},
    "whole-number": {"temp": 1},
    "nearly-greedy": {"temp": 1e-4},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "both": {"top_k": 30, "top_p": 0.8, "temp": 0.9},
    "cached": {"use_kv_caching": True},
    "never-ending": {"allow_early_stop": False},
    "never-ending-top_p": {"allow_early_stop": False, "top_p": 0.9, "min_eos_p": 0.0},
    "often-ending": {"min_eos_p": 1e-5, "max_gen_duration_s": 4.0},
    "unforced": {"min_eos_p": None, "temp": 1.5},
    "at-once": {"max_gen_duration_s": 0},
}


@pytest.mark.parametrize("options", SEMANTIC.values(), ids=SEMANTIC.keys())
def test_semantic_arguments(generation, options):
    for seed in (0, 1):
        equal(
            *both(
                generation, "generate_text_semantic", TEXT, seed=seed, **{"max_gen_duration_s": 0.6, **options}
            )
        )


def test_the_often_ending_case_ends(generation):
    """Or the cases above would not show that EOS is drawn, and forced, where suno does."""
    with bark_fast.patched(generation):
        for seed, most in ((0, 120), (1, 180)):
            torch.manual_seed(seed)
            options = {**SEMANTIC["often-ending"], "silent": True}
            assert len(generation.generate_text_semantic(TEXT, **options)) < most


@pytest.mark.parametrize("text", ["a", "  \n Zwei\tWorte ", " ".join(map(str, range(300))), "¡Olé! 你好"])
def test_texts(generation, text, caplog):
    with caplog.at_level(logging.WARNING, "bark.generation"):
        equal(*both(generation, "generate_text_semantic", text, max_gen_duration_s=0.3))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (2 if len(text) > 1000 else 0)
    assert len(set(messages)) <= 1  # suno's very words, once each


COARSE = {
    "defaults": {},
    "hot": {"temp": 1.3},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "both": {"top_k": 30, "top_p": 0.8, "temp": 0.9},
    "cached": {"use_kv_caching": True},
    "short-history": {"max_coarse_history": 60},
    "odd-history": {"max_coarse_history": 61, "use_kv_caching": True},
    "short-windows": {"sliding_window_len": 10},
    "odd-windows": {"sliding_window_len": 7, "top_k": 100},
    "one-code-a-window": {"sliding_window_len": 1, "use_kv_caching": True},
    "long-windows": {"sliding_window_len": 138},
    "longest-windows": {"sliding_window_len": 708, "max_coarse_history": 60, "use_kv_caching": True},
}


@pytest.mark.parametrize("options", COARSE.values(), ids=COARSE.keys())
@pytest.mark.parametrize("voice", [None, VOICE], ids=["none", "voice"])
def test_coarse_arguments(generation, options, voice):
    equal(*both(generation, "generate_coarse", speech(), voice, **options))


def test_coarse_of_many_windows(generation):
    """The window slides, and the kept prefix no longer fits the prompt."""
    ours, theirs = both(generation, "generate_coarse", speech(300), use_kv_caching=True)
    assert ours.size > 800
    equal(ours, theirs)


@pytest.mark.parametrize("tokens", [1, 2, 19, 20])
def test_coarse_of_few_tokens(generation, tokens):
    equal(*both(generation, "generate_coarse", speech(tokens)))


@pytest.mark.parametrize(("tokens", "frames"), [(2, 3), (4, 6), (13, 20), (300, 451)])
def test_histories_of_any_length(generation, tokens, frames):
    history = {
        "semantic_prompt": speech(tokens), "coarse_prompt": codes(2, frames), "fine_prompt": codes(8, frames)
    }  # fmt: skip
    equal(*both(generation, "generate_coarse", speech(10), history))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint16])
def test_histories_of_any_integers(generation, dtype):
    history = {key: value.astype(dtype) for key, value in voice_dict(generation).items()}
    equal(*both(generation, "generate_text_semantic", TEXT, history, max_gen_duration_s=0.2))
    equal(*both(generation, "generate_coarse", speech(10), history))
    equal(*both(generation, "generate_fine", codes(), history, temp=None))


FINE = {
    "defaults": {},
    "hot": {"temp": 1.2},
    "greedy": {"temp": None},
    "shown": {"silent": False},
}


@pytest.mark.parametrize("options", FINE.values(), ids=FINE.keys())
@pytest.mark.parametrize("voice", [None, VOICE], ids=["none", "voice"])
def test_fine_arguments(generation, options, voice):
    equal(*both(generation, "generate_fine", codes(), voice, **options))


@pytest.mark.parametrize("books", [1, 3, 7])
def test_fine_from_other_numbers_of_codebooks(generation, books):
    equal(*both(generation, "generate_fine", codes(books)))


@pytest.mark.parametrize(("frames", "voice"), [(1, None), (1024, None), (1025, None), (1030, VOICE)])
def test_fine_of_several_windows(generation, frames, voice):
    equal(*both(generation, "generate_fine", codes(2, frames), voice, temp=None))


@pytest.mark.parametrize("voice", VOICES.values(), ids=VOICES.keys())
def test_generate_audio(bark, generation, voice):
    """The public function, in every kind of voice: tokens equal, samples within 1e-4."""

    def speak():
        torch.manual_seed(7)
        return bark.generate_audio("One.", voice(generation), text_temp=0.8, waveform_temp=0.6, silent=True,
                                   output_full=True)  # fmt: skip

    cut = generation.generate_text_semantic
    head = generation.models["text"]["model"].lm_head.weight
    with torch.no_grad():
        kept = head[10_000].clone()
        head[10_000] *= 4  # ends by itself
        try:
            tokens, samples = speak()
            with bark_fast.patched(bark, strict=True):
                assert generation.generate_text_semantic is not cut
                our_tokens, our_samples = speak()
        finally:
            head[10_000] = kept
    assert tokens.keys() == our_tokens.keys()
    for key in tokens:
        equal(our_tokens[key], tokens[key])
    assert (our_samples.dtype, our_samples.shape) == (samples.dtype, samples.shape)
    assert np.abs(our_samples - samples).max() <= 1e-4
    assert np.abs(samples).max() > 0.01


def test_halves_of_the_way(bark):
    """`text_to_semantic` and `semantic_to_waveform` are fast by themselves."""
    tokens = speech(20)
    torch.manual_seed(1)
    theirs = bark.semantic_to_waveform(tokens, VOICE, silent=True)
    with bark_fast.patched(bark, strict=True):
        torch.manual_seed(1)
        ours = bark.semantic_to_waveform(tokens, VOICE, silent=True)
        assert set(sys.modules["bark.generation"].__dict__[STATE].stages.models.held) == {"coarse", "fine"}
    assert np.abs(ours - theirs).max() <= 1e-4


def test_codec_decode_records_no_gradients(generation):
    ours, theirs = both(generation, "codec_decode", codes(8).astype(np.int32))
    assert np.abs(ours - theirs).max() <= 1e-4
    with bark_fast.patched(generation):
        seen = []
        handle = generation.models["codec"].decoder.register_forward_hook(lambda m, a, out: seen.append(out))
        generation.codec_decode(codes(8))
        handle.remove()
    assert not seen[0].requires_grad
