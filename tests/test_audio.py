"""Audio reaches the disk whole or not at all, in every format, and its voice keeps its tokens."""

from __future__ import annotations

import base64
import os
import pickle
import re
import resource
import stat
import wave
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bark_fast.audio import Audio, Tokens, atomic_write, check_audio_path, check_writable
from bark_fast.errors import InvalidInput, OutputError

soundfile = pytest.importorskip("soundfile")

RATE = 24_000


def tone(seconds: float = 0.5, peak: float = 0.5) -> np.ndarray:
    """A 440 Hz sine, float32."""
    return (peak * np.sin(2 * np.pi * 440 * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def tokens(n: int = 100, seed: int = 0) -> Tokens:
    """Random tokens of the lengths that Bark gives."""
    draw = np.random.default_rng(seed)
    frames = int(n * 75 / 49.9)
    return Tokens(
        draw.integers(0, 10_000, n), draw.integers(0, 1024, (2, frames)), draw.integers(0, 1024, (8, frames))
    )


def names(folder: Path) -> list[str]:
    """Everything in `folder`, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


class TestFormats:
    """What is written is what was there."""

    @pytest.mark.parametrize(
        ("suffix", "subtype", "least_snr"),
        [(".wav", None, 80), (".wav", "PCM_24", 130), (".wav", "FLOAT", 300), (".WAV", None, 80),
         (".flac", None, 80), (".flac", "PCM_24", 130), (".ogg", None, 15), (".mp3", None, 15)],
    )  # fmt: skip
    def test_a_tone_survives(self, tmp_path, suffix, subtype, least_snr):
        path = tmp_path / f"tone{suffix}"
        Audio(tone(), RATE).save(path, subtype)
        back, rate = soundfile.read(path, dtype="float32")
        error = back[: len(tone())] - tone()
        assert rate == RATE
        assert len(back) >= len(tone())
        assert 10 * np.log10((tone() ** 2).sum() / ((error**2).sum() + 1e-30)) > least_snr
        assert names(tmp_path) == [path.name]

    @pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
    def test_beyond_one_is_clipped_not_wrapped(self, tmp_path, suffix):
        Audio(np.full(4800, 1.5, np.float32), RATE).save(tmp_path / f"loud{suffix}")
        back, _ = soundfile.read(tmp_path / f"loud{suffix}")
        assert 0.9 < np.median(back) <= 1.01

    def test_float_wav_keeps_what_is_beyond_one(self, tmp_path):
        Audio(np.full(48, 1.5, np.float32), RATE).save(tmp_path / "loud.wav", "FLOAT")
        assert (soundfile.read(tmp_path / "loud.wav")[0] == 1.5).all()

    def test_ten_minutes_of_ogg(self, tmp_path):
        samples = np.tile(tone(1), 600)
        Audio(samples, RATE).save(tmp_path / "long.ogg")
        assert soundfile.info(tmp_path / "long.ogg").frames == len(samples)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_samples_that_are_no_numbers_are_refused(self, tmp_path, bad):
        samples = tone()
        samples[7] = bad
        with pytest.raises(OutputError, match=f"1 of {len(samples)} samples"):
            Audio(samples, RATE).save(tmp_path / "a.wav", "FLOAT")
        assert names(tmp_path) == []

    def test_no_samples_are_refused(self, tmp_path):
        with pytest.raises(OutputError, match="no samples"):
            Audio(tone()[:0], RATE).save(tmp_path / "a.wav")

    @pytest.mark.parametrize("name", ["a.aiff", "a", "wav", "a.wav.txt", ".wav"])
    def test_unknown_suffix_names_the_known_ones(self, tmp_path, name):
        for attempt in (Audio(tone(), RATE).save, check_audio_path):
            with pytest.raises(OutputError, match=r"\.wav, \.flac, \.ogg, \.mp3"):
                attempt(tmp_path / name)

    def test_unknown_subtype_names_the_known_ones(self, tmp_path):
        with pytest.raises(OutputError, match="PCM_16, PCM_24"):
            Audio(tone(), RATE).save(tmp_path / "a.flac", "FLOAT")

    def test_old_libsndfile_without_mp3_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(soundfile, "available_subtypes", lambda container: {})
        with pytest.raises(OutputError, match=r"cannot encode MP3 .*pip install -U soundfile"):
            Audio(tone(), RATE).save(tmp_path / "a.mp3")


def failing_paths(tmp_path: Path) -> dict[str, Path]:
    """Paths that cannot be written, by what is wrong."""
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    return {
        "no folder": tmp_path / "missing" / "a.wav",
        "is a folder": tmp_path / "folder.wav",
        "a file as folder": tmp_path / "file" / "a.wav",
        "too long": tmp_path / ("n" * 300 + ".wav"),
        "null byte": tmp_path / "nul\0l.wav",
        "pipe": tmp_path / "pipe.wav",
        "device": Path("/dev/null"),
        "circle": tmp_path / "loop.wav",
    }


class TestAtomicWriting:
    """Whatever fails, no half file stays and no old one is lost."""

    @pytest.mark.parametrize(
        "what",
        ["no folder", "is a folder", "a file as folder", "too long", "null byte", "pipe", "device", "circle"],
    )
    def test_impossible_paths_fail_early_and_late_alike(self, tmp_path, what):
        path = failing_paths(tmp_path)[what]
        before = names(tmp_path)

        def write():
            with atomic_write(path) as temporary:
                temporary.write_text("new")

        for attempt in (lambda: check_writable(path), write):
            with pytest.raises(OutputError) as error:
                attempt()
            assert "cannot write" in str(error.value)
            assert "\n" not in str(error.value)
        assert names(tmp_path) == before
        assert not Path("/dev/null").is_file()

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_no_permission(self, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        (tmp_path / "a.wav").touch(mode=0o400)
        for path in (tmp_path / "locked" / "a.wav", tmp_path / "a.wav"):
            with pytest.raises(OutputError):
                check_writable(path)
            with pytest.raises(OutputError):
                Audio(tone(), RATE).save(path)

    def test_a_read_only_file_is_not_replaced(self, tmp_path, monkeypatch):
        (tmp_path / "a.wav").write_text("old")
        monkeypatch.setattr(os, "access", lambda path, how: False)  # as for any user but root
        with pytest.raises(OutputError, match="read-only"):
            Audio(tone(), RATE).save(tmp_path / "a.wav")
        assert (tmp_path / "a.wav").read_text() == "old"

    @pytest.mark.parametrize(
        "failure", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")]
    )
    def test_a_failing_block_leaves_the_old_file(self, tmp_path, failure):
        (tmp_path / "a.txt").write_text("old")
        expected = OutputError if isinstance(failure, OSError) else failure
        with pytest.raises(expected), atomic_write(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise failure
        assert (tmp_path / "a.txt").read_text() == "old"
        assert names(tmp_path) == ["a.txt"]

    @pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".npz"])
    def test_a_full_disk_leaves_the_old_file(self, tmp_path, suffix):
        path = tmp_path / f"a{suffix}"
        path.write_text("old")
        noise = np.random.default_rng(0).uniform(-1, 1, 20 * RATE).astype(np.float32)
        audio = Audio(noise, RATE, tokens(2000))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # writes beyond fail, as on a full disk
        try:
            with pytest.raises(OutputError) as error:
                audio.save_voice(path) if suffix == ".npz" else audio.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(error.value).endswith(": File too large; choose another path or free some space")
        assert path.read_text() == "old"
        assert names(tmp_path) == [path.name]

    def test_interrupt_while_encoding(self, tmp_path, monkeypatch):
        def interrupt(self, data):
            raise KeyboardInterrupt

        monkeypatch.setattr(soundfile.SoundFile, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Audio(tone(), RATE).save(tmp_path / "a.flac")
        assert names(tmp_path) == []

    def test_an_encoder_that_stores_too_little_is_noticed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(soundfile.SoundFile, "write", lambda self, data: None)
        with pytest.raises(OutputError, match=f"0 of {len(tone())} samples"):
            Audio(tone(), RATE).save(tmp_path / "a.wav")
        assert names(tmp_path) == []

    def test_modes_are_those_of_an_ordinary_file(self, tmp_path):
        (tmp_path / "plain").touch()
        (tmp_path / "old.wav").touch()
        (tmp_path / "old.wav").chmod(0o640)
        for name in ("new.wav", "old.wav"):
            Audio(tone(), RATE).save(tmp_path / name)
        mode = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names(tmp_path)}
        assert mode["new.wav"] == mode["plain"]
        assert mode["old.wav"] == 0o640

    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "deep").mkdir()
        (tmp_path / "a.wav").symlink_to(Path("deep") / "b.wav")
        Audio(tone(), RATE).save(tmp_path / "a.wav")
        assert (tmp_path / "a.wav").is_symlink()
        assert soundfile.info(tmp_path / "deep" / "b.wav").frames == len(tone())

    def test_the_longest_name_the_disk_allows(self, tmp_path):
        Audio(tone(), RATE).save(tmp_path / ("n" * 251 + ".wav"))
        assert len(names(tmp_path)) == 1

    def test_checking_leaves_nothing_and_touches_nothing(self, tmp_path):
        (tmp_path / "old.wav").write_text("old")
        for name in ("new.wav", "old.wav"):
            check_audio_path(tmp_path / name)
        assert names(tmp_path) == ["old.wav"]
        assert (tmp_path / "old.wav").read_text() == "old"


class TestVoiceFile:
    """Tokens on disk."""

    def test_tokens_come_back(self, tmp_path):
        saved = tokens()
        Audio(tone(), RATE, saved).save_voice(tmp_path / "me.npz")
        with np.load(tmp_path / "me.npz", allow_pickle=False) as back:
            assert sorted(back.files) == ["coarse_prompt", "fine_prompt", "semantic_prompt"]
            for key in ("semantic", "coarse", "fine"):
                np.testing.assert_array_equal(back[f"{key}_prompt"], getattr(saved, key))
                assert back[f"{key}_prompt"].dtype == np.int64

    @pytest.mark.parametrize("given_tokens", [None, tokens(0), tokens(1), tokens(3)])
    def test_too_little_for_a_voice_is_refused(self, tmp_path, given_tokens):
        with pytest.raises(OutputError, match=r"no tokens|is not the 1\.5 to 1"):
            Audio(tone(), RATE, given_tokens).save_voice(tmp_path / "me.npz")
        assert names(tmp_path) == []

    def test_a_suffix_suno_does_not_know_is_refused(self, tmp_path):
        with pytest.raises(OutputError, match=r"\.npz"):
            Audio(tone(), RATE, tokens()).save_voice(tmp_path / "me")


class TestAudio:
    """The object itself."""

    def test_duration_and_repr(self):
        audio = Audio(tone(0.5), RATE, tokens(25))
        assert audio.duration == 0.5
        assert repr(audio) == "Audio(0.50 s at 24000 Hz, 25 semantic tokens)"
        assert repr(Audio(tone(0.5), RATE)) == "Audio(0.50 s at 24000 Hz, no tokens)"
        assert Audio(tone(), RATE).timings == {}
        assert pickle.loads(pickle.dumps(audio)).duration == 0.5

    def test_the_notebook_player_holds_the_waveform(self):
        samples = tone()
        samples[:3] = [2, -2, np.nan]
        with np.errstate(invalid="raise"):
            html = Audio(samples, RATE)._repr_html_()
        data = re.fullmatch(r'<audio controls src="data:audio/wav;base64,([^"]+)"></audio>', html)
        with wave.open(BytesIO(base64.b64decode(data[1]))) as file:
            assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (RATE, 1, len(samples))
            pcm = np.frombuffer(file.readframes(len(samples)), "<i2")
        assert pcm[:3].tolist() == [32767, -32767, 0]
        np.testing.assert_allclose(pcm[3:] / 32767, samples[3:], atol=1e-4)

    def test_hours_are_not_put_into_a_notebook(self):
        html = Audio(np.zeros(RATE * 1801, np.float32), RATE)._repr_html_()
        assert len(html) < 200 and "save it" in html

    @settings(max_examples=30, deadline=None)
    @given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=5), pause=st.floats(0, 0.01))
    def test_concat_is_parts_and_silence_in_order(self, lengths, pause):
        parts = [
            Audio(np.full(n, i + 1, np.float32), RATE, tokens(n, i), {"coarse": 1.0, f"s{i}": 2.0})
            for i, n in enumerate(lengths)
        ]
        joined = Audio.concat(parts, pause)
        gap = round(pause * RATE)
        expected = [i + 1.0 for i, n in enumerate(lengths) for _ in range(n)]
        assert len(joined.samples) == sum(lengths) + gap * (len(lengths) - 1)
        assert joined.samples[joined.samples != 0].tolist() == expected
        assert joined.samples[: lengths[0]].tolist() == expected[: lengths[0]]
        assert joined.samples.dtype == np.float32
        assert joined.timings == {"coarse": float(len(lengths)), **{f"s{i}": 2.0 for i in range(len(lengths))}}
        assert joined.tokens.semantic.tolist() == [t for p in parts for t in p.tokens.semantic]
        assert joined.tokens.fine.shape == (8, sum(p.tokens.fine.shape[1] for p in parts))

    def test_concat_without_all_tokens_has_none(self):
        assert Audio.concat([Audio(tone(), RATE, tokens()), Audio(tone(), RATE)]).tokens is None

    def test_concat_takes_parts_as_they_come(self):
        parts = [Audio(tone(), RATE, tokens()), Audio(tone(), RATE, tokens())]
        joined, listed = Audio.concat(part for part in parts), Audio.concat(parts)
        assert np.array_equal(joined.samples, listed.samples)
        assert np.array_equal(joined.tokens.fine, listed.tokens.fine)

    def test_concat_refuses_what_does_not_fit(self):
        part = Audio(tone(), RATE)
        for parts, pause in (
            ([], 0), ([part, Audio(tone(), 16_000)], 0), ([part], -1), ([part], float("nan")), ([part], "1"),
            ([part], 1e9),
        ):  # fmt: skip
            with pytest.raises(InvalidInput):
                Audio.concat(parts, pause)


@pytest.mark.parametrize(
    ("samples", "rate", "fault"),
    [
        (np.full(100, 8000, np.int16), RATE, r"samples are int16 \(100,\); they must be floats"),
        (np.zeros((10, 2), np.float32), RATE, r"samples are float32 \(10, 2\)"),
        ([0.0, 0.1], RATE, "samples are a list"),
        (np.zeros(100, np.float32), 0, "sample_rate is 0; it must be a whole number of hertz"),
        (np.zeros(100, np.float32), 24_000.0, r"sample_rate is 24000\.0"),
        (np.zeros(100, np.float32), 2**31, "sample_rate is 2147483648"),
    ],
)
@pytest.mark.parametrize("suffix", [".wav", ".ogg"])
def test_what_is_no_waveform_is_named_and_not_written(tmp_path, samples, rate, fault, suffix):
    with pytest.raises(OutputError, match=fault):
        Audio(samples, rate).save(tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("suffix", "subtype", "rate"),
    [(".ogg", None, 200_001), (".ogg", "OPUS", 22_050), (".mp3", None, 24_001), (".flac", None, 655_351)],
)
def test_a_rate_that_a_format_does_not_take_is_named(tmp_path, suffix, subtype, rate):
    """libsndfile crashes on the first of them."""
    with pytest.raises(
        OutputError, match=rf"sample_rate is {rate}, which \w+ in \w+ does not take; write \.wav"
    ):
        Audio(tone(), rate).save(tmp_path / f"a{suffix}", subtype)
    assert not list(tmp_path.iterdir())
    Audio(tone(), 2**31 - 1).save(tmp_path / "a.wav")


def test_half_floats_are_written(tmp_path):
    Audio(tone().astype(np.float16), RATE).save(tmp_path / "a.wav")
    read, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert np.abs(read - tone()).max() < 1e-3


def test_numbers_of_numpy_are_numbers(tmp_path):
    audio = Audio(tone(), np.int64(RATE))
    audio.save(tmp_path / "a.wav")
    assert soundfile.info(tmp_path / "a.wav").samplerate == RATE
    assert Audio.concat([audio, audio], pause=np.float32(0.5)).duration == pytest.approx(1.5)


def test_a_home_is_a_home_when_saving_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Audio(tone(), RATE).save("~/a.wav")
    assert (tmp_path / "a.wav").exists()
    with pytest.raises(OutputError, match=r"cannot write ~nobody-of-this-name/a\.wav"):
        Audio(tone(), RATE).save("~nobody-of-this-name/a.wav")
