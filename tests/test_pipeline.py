"""The public face: options, long texts, voices, progress, and errors for what cannot be."""

from __future__ import annotations

import copy
import math
import pickle
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bark_fast import (
    Audio,
    Bark,
    BarkFastError,
    GenerationError,
    InvalidInput,
    InvalidVoice,
    SamplingParams,
)
from bark_fast.options import samples_of
from bark_fast.progress import Progress, ProgressBar
from bark_fast.stages.semantic import max_tokens

soundfile = pytest.importorskip("soundfile")

LONG = "This is a sentence of some length, spoken slowly. " * 40


class TestGenerate:
    def test_a_string_gives_an_audio_and_a_list_a_list(self, suno_bark):
        audio = suno_bark.generate("One.", seed=0, max_seconds=0.4)
        assert isinstance(audio, Audio)
        (same,) = suno_bark.generate(["One."], seed=0, max_seconds=0.4)
        assert np.array_equal(audio.samples, same.samples)
        assert suno_bark.generate([]) == []

    def test_the_audio_carries_tokens_and_timings(self, suno_bark):
        audio = suno_bark.generate("One.", seed=0, max_seconds=0.4)
        tokens = audio.tokens
        assert audio.sample_rate == 24_000
        assert audio.samples.dtype == np.float32
        assert tokens.semantic.shape == (20,)
        frames = math.floor(20 * 75 / 49.9)
        assert tokens.coarse.shape == (2, frames)
        assert tokens.fine.shape == (8, frames)
        assert np.array_equal(tokens.fine[:2], tokens.coarse)
        assert len(audio.samples) == 320 * frames
        assert list(audio.timings) == ["semantic", "coarse", "fine", "codec"]
        assert all(seconds > 0 for seconds in audio.timings.values())

    def test_max_seconds_counts_as_suno_counts(self, suno_bark):
        layout = suno_bark.config.layout
        for seconds in (0.01, 0.02, 1 / 49.9, 1.0, 2.0, 3.3, 15.0, 100.0):  # the third is met, and not passed
            total, count = 0.0, 0
            while count < 768:
                total, count = total + 1 / 49.9, count + 1
                if total > seconds:
                    break
            assert max_tokens(layout, seconds) == count

    def test_seed_makes_it_reproducible(self, suno_bark):
        one, two, other = (suno_bark.generate("One.", seed=s, max_seconds=0.4) for s in (5, 5, 6))
        assert np.array_equal(one.samples, two.samples)
        assert not np.array_equal(one.tokens.semantic, other.tokens.semantic)

    def test_seeds_of_samples_go_on_from_the_largest_to_0(self):
        assert samples_of(["One."], 3, 2**64 - 2) == (["One."] * 3, [2**64 - 2, 2**64 - 1, 0])

    def test_numpy_seeds_and_big_seeds_do(self, suno_bark):
        one = suno_bark.generate("One.", seed=np.int64(5), max_seconds=0.2)
        assert np.array_equal(one.samples, suno_bark.generate("One.", seed=5, max_seconds=0.2).samples)
        for rng in ("philox", "torch"):
            suno_bark.generate("One.", seed=2**64 - 1, rng=rng, max_seconds=0.1)

    def test_the_dialect_can_be_overridden(self, tiny_suno_dir, tiny_hf_dir, hf_bark):
        """Both formats hold the same weights: under one dialect and one set of parameters they speak alike."""
        other = Bark.from_pretrained(tiny_suno_dir, dialect="hf")
        options = {
            "seed": 1, "rng": "torch", "max_seconds": 0.5, "fine": SamplingParams(temperature=0.5),
            "semantic": SamplingParams(0.7, 50, None, None), "coarse": SamplingParams(0.7, 50, None, None),
        }  # fmt: skip
        assert np.array_equal(
            other.generate("One.", **options).tokens.fine, hf_bark.generate("One.", **options).tokens.fine
        )

    def test_bfloat16_runs_and_keeps_the_codec_in_float32(self, tiny_suno_dir):
        bark = Bark.from_pretrained(tiny_suno_dir, dtype="bf16")
        assert bark.runner.dtype == torch.bfloat16
        assert bark.runner.codec.codebooks.dtype == torch.float32
        assert np.isfinite(bark.generate("One.", seed=0, max_seconds=0.4).samples).all()

    def test_a_copy_is_refused_with_a_remedy(self, suno_bark):
        for way in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="load one where it is used"):
                way(suno_bark)

    def test_generating_leaves_torchs_generator_alone(self, suno_bark):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        suno_bark.generate("One.", seed=1, max_seconds=0.2)
        suno_bark.generate("One.", seed=1, rng="torch", max_seconds=0.2)
        assert torch.equal(before, torch.get_rng_state())

    def test_weights_do_not_ask_for_gradients(self, suno_bark):
        runner = suno_bark.runner
        for module in (*runner.models.values(), runner.fine_model, runner.codec):
            assert not module.training and not any(weight.requires_grad for weight in module.parameters())


def test_numpys_integers_are_integers(suno_bark):
    def spoken(top_k, seed):
        params = SamplingParams(top_k=top_k)
        audios = suno_bark.generate(["One.", "Two."], seed=seed, semantic=params, max_seconds=0.3)
        return [audio.tokens.fine.tolist() for audio in audios]

    assert spoken(np.int64(5), np.array([1, 2])) == spoken(5, [1, 2]) != spoken(5, [1, 3])


class TestVoices:
    def test_a_saved_voice_speaks_as_the_audio_it_came_from(self, suno_bark, tmp_path):
        first = suno_bark.generate("One and two.", seed=0, max_seconds=1.0)
        first.save_voice(tmp_path / "me.npz")
        a = suno_bark.generate("Three.", voice=first, seed=1, max_seconds=0.5)
        b = suno_bark.generate("Three.", voice=tmp_path / "me.npz", seed=1, max_seconds=0.5)
        c = suno_bark.generate("Three.", seed=1, max_seconds=0.5)
        assert np.array_equal(a.tokens.fine, b.tokens.fine)
        assert not np.array_equal(a.tokens.fine, c.tokens.fine)

    def test_an_unknown_voice_is_named(self, suno_bark):
        with pytest.raises(InvalidVoice, match="en_speaker_99"):
            suno_bark.generate("One.", voice="en_speaker_99")

    def test_voices_are_one_or_one_per_text(self, suno_bark):
        with pytest.raises(InvalidInput, match="2 voices for 3 texts"):
            suno_bark.generate(["a", "b", "c"], voice=[None, None])


class TestProgress:
    def test_events_count_up_to_their_total(self, suno_bark):
        events = []
        audio = suno_bark.generate("One.", seed=0, max_seconds=0.5, progress=events.append)
        by_stage = {}
        for event in events:
            by_stage.setdefault(event.stage, []).append(event)
        assert list(by_stage) == ["semantic", "coarse", "fine", "codec"]
        assert [e.done for e in by_stage["coarse"]] == list(range(1, audio.tokens.coarse.size + 1))
        assert [e.done for e in by_stage["fine"]] == list(range(1, 7))
        for stage in ("coarse", "fine", "codec"):
            assert by_stage[stage][-1].done == by_stage[stage][-1].total

    def test_the_bar_shows_stage_rate_and_real_time_factor(self, suno_bark, capsys):
        suno_bark.generate(["One.", "Two."], seed=0, max_seconds=0.5, progress=True)
        shown = capsys.readouterr().err
        assert "100%" in shown
        assert re.search(r"coarse \d+/\d+, \d+ tokens/s, real-time factor \d", shown)

    def test_the_bar_of_a_call_that_fails_is_not_filled(self, suno_bark, capsys, monkeypatch):
        def fail(*_):
            raise GenerationError("broken")

        monkeypatch.setattr(suno_bark.scheduler, "run", fail)
        with pytest.raises(GenerationError):
            suno_bark.generate("One.", progress=True)
        shown = capsys.readouterr().err
        assert "0%" in shown and "100%" not in shown

    def test_the_bar_never_passes_its_end(self, suno_bark, monkeypatch):
        """tqdm would warn on the screen; rounding of the shares must not get there."""
        filled = []
        call = ProgressBar.__call__

        def watched(bar, event):
            call(bar, event)
            filled.append(bar.bar.n)
            assert bar.bar.n <= bar.bar.total

        monkeypatch.setattr(ProgressBar, "__call__", watched)
        suno_bark.generate(["One.", "Two."], seed=0, max_seconds=0.5, progress=True)
        assert filled == sorted(filled)
        assert filled[-1] == pytest.approx(200)

    def test_the_bar_does_not_look_at_all_texts_at_every_token(self, suno_bark):
        """Of 200,000 texts, 3,000 events; summing the texts at each would take ten seconds and more."""
        bar = ProgressBar(suno_bark.config.layout, [1] * 200_000)
        start = time.perf_counter()
        for index in range(3000):
            bar(Progress(index, 0, "coarse", 1, 2))
        took = time.perf_counter() - start
        assert bar.bar.n == pytest.approx(3000 * 100 * (0.15 + 0.65 / 2))
        bar.close(finished=False)
        assert took < 3

    def test_an_exception_in_the_callback_reaches_the_caller(self, suno_bark):
        def boom(event):
            if event.stage == "coarse":
                raise RuntimeError("stop here")

        with pytest.raises(RuntimeError, match="stop here"):
            suno_bark.generate("One.", seed=0, max_seconds=0.5, progress=boom)
        suno_bark.generate("One.", seed=0, max_seconds=0.2)  # and the model is as good as before


BAD_OPTIONS = [
    ({"rng": "numpy"}, "rng is 'numpy'"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"seed": "7"}, "seed is '7'"),
    ({"seed": "12"}, "seed is '12'"),
    ({"seed": b"7"}, "seed is b'7'"),
    ({"seed": [1, 2]}, "2 seeds for 1 texts"),
    ({"max_seconds": 0}, "max_seconds is 0"),
    ({"max_seconds": math.nan}, "max_seconds is nan"),
    ({"max_seconds": "3"}, "max_seconds is '3'"),
    ({"semantic": 0.7}, "semantic is 0.7"),
    ({"coarse": {"temperature": 1}}, "coarse is"),
    ({"fine": SamplingParams(top_k=3)}, "fine.top_k is 3"),
    ({"coarse": SamplingParams(min_eos_p=0.5)}, "coarse.min_eos_p is 0.5"),
    ({"fine": SamplingParams(top_p=0.5)}, "fine.top_p is 0.5"),
    ({"voice": 3}, "voice"),
    ({"progress": "bar"}, "progress is 'bar'; pass True for a bar, a function, or False"),
    ({"progress": 1}, "progress is 1"),
    ({"voice": "no such voice"}, "no such voice"),
]


class TestBadInput:
    """One line that names the value; nothing has run by then."""

    @pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[m for _, m in BAD_OPTIONS])
    def test_options(self, suno_bark, options, message):
        with pytest.raises(InvalidInput) as caught:
            suno_bark.generate("One.", **({"max_seconds": 0.1} | options))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "text", ["", "  \n\t ", "\u00a0", None, 3, b"bytes", ["fine", ""], ["fine", None], {"a"}]
    )
    def test_texts(self, suno_bark, text):
        with pytest.raises(InvalidInput) as caught:
            suno_bark.generate(text, max_seconds=0.1)
        assert "text" in str(caught.value)

    def test_an_unknown_keyword_is_named(self, suno_bark):
        with pytest.raises(TypeError, match="temperature"):
            suno_bark.generate("One.", temperature=0.7)

    def test_one_hf_batch_is_as_large_as_max_batch_at_most(self, hf_bark, monkeypatch):
        monkeypatch.setattr(hf_bark, "max_batch", 2)
        options = {"rng": "torch", "seed": 0, "max_seconds": 0.1}
        assert len(hf_bark.generate(["One."] * 2, **options)) == 2
        with pytest.raises(InvalidInput, match=r"3 texts in one Hugging Face batch.* max_batch=2"):
            hf_bark.generate(["One."] * 3, **options)

    def test_long_form_cannot_be_one_hf_batch(self, hf_bark):
        with pytest.raises(InvalidInput, match="long_form=True"):
            hf_bark.generate(["One.", "Two."], seed=1, rng="torch", long_form=True)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"device": "cuda:99"}, "device 'cuda:99'"),
            ({"device": "toaster"}, "device 'toaster'"),
            ({"dtype": "int8"}, "dtype is 'int8'"),
            ({"dtype": torch.int64}, "dtype is torch.int64"),
            ({"dtype": torch.float64}, "dtype is torch.float64"),
            ({"dialect": "bark"}, "dialect is 'bark'"),
            ({"max_batch": 0}, "max_batch is 0"),
            ({"max_batch": 2**62}, "max_batch is 4611686018427387904"),
            ({"device": 2**70}, "device 1180591620717411303424 cannot be used"),
            ({"offload": "no"}, "offload is 'no'; it must be True or False"),
            ({"progress": print}, "progress is <built-in function print>; it must be True or False"),
            ({"max_batch": 10**8}, "no memory for the caches of max_batch=100000000 utterances"),
        ],
    )
    def test_loading_options(self, tiny_suno_dir, options, message):
        with pytest.raises(InvalidInput) as caught:
            Bark.from_pretrained(tiny_suno_dir, **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        text=st.text(max_size=30) | st.none() | st.integers(),
        seed=st.none()
        | st.integers()
        | st.floats()
        | st.text(max_size=3)
        | st.lists(st.integers(), max_size=2),
        temperature=st.none() | st.floats() | st.text(max_size=2),
        max_seconds=st.floats() | st.integers(max_value=0) | st.text(max_size=2),
    )
    def test_any_input_gives_speech_or_one_line(self, suno_bark, text, seed, temperature, max_seconds):
        def stop(event):
            raise StopIteration  # got as far as the first token: the input was accepted

        try:
            suno_bark.generate(
                text, seed=seed, coarse=SamplingParams(temperature=temperature), max_seconds=max_seconds,
                progress=stop,
            )  # fmt: skip
        except BarkFastError as error:
            assert "\n" not in str(error)
            assert not isinstance(error, GenerationError)
        except (StopIteration, RuntimeError):
            pass
        else:
            pytest.fail("the progress callback was never called")


def test_saving_what_was_spoken_gives_a_playable_file(suno_bark, tmp_path):
    audio = suno_bark.generate("One.", seed=0, max_seconds=0.5)
    for suffix in ("wav", "flac", "ogg", "mp3"):
        audio.save(tmp_path / f"a.{suffix}")
        info = soundfile.info(tmp_path / f"a.{suffix}")
        assert info.samplerate == 24_000
        assert abs(info.duration - audio.duration) < 0.1


def test_no_console_no_bar(suno_bark, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert suno_bark.generate("One.", seed=0, max_seconds=0.3, progress=True).duration > 0


def test_numbers_of_numpy_are_numbers(suno_bark):
    plain = suno_bark.generate("One.", n=2, seed=1, max_seconds=0.25, semantic=SamplingParams(temperature=0.5))
    numpy = suno_bark.generate(
        "One.", n=np.int64(2), seed=1, max_seconds=np.float32(0.25),
        semantic=SamplingParams(temperature=np.float32(0.5)),
    )  # fmt: skip
    assert all(np.array_equal(a.tokens.fine, b.tokens.fine) for a, b in zip(plain, numpy, strict=True))


@pytest.mark.parametrize("source", ["~nobody-of-this-name/x", "x" * 5000, "", None, 3])
def test_what_names_no_checkpoint_is_told(source):
    with pytest.raises(BarkFastError, match="names no checkpoint"):
        Bark.from_pretrained(source, device="cpu")
