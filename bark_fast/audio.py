"""What Bark returns, a waveform with its tokens and timings, and how it gets to disk: whole or not at all."""

from __future__ import annotations

import base64
import errno
import io
import os
import secrets
import stat
import wave
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bark_fast.config import Layout
from bark_fast.errors import InvalidInput, OutputError
from bark_fast.numeric import is_number, is_whole
from bark_fast.work import FloatArray, IntArray

# suffix: libsndfile's format and the subtypes that may be asked for, the default first
AUDIO_FORMATS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    ".wav": ("WAV", ("PCM_16", "PCM_24", "PCM_32", "FLOAT")),
    ".flac": ("FLAC", ("PCM_16", "PCM_24")),
    ".ogg": ("OGG", ("VORBIS", "OPUS")),
    ".mp3": ("MP3", ("MPEG_LAYER_III",)),
}
_RATES: Mapping[str, Container[int]] = {  # hertz that formats take, as tried; beyond them they fail, or crash
    "FLAC": range(1, 655_351),
    "VORBIS": range(1, 200_001),
    "OPUS": (8_000, 12_000, 16_000, 24_000, 48_000),
    "MPEG_LAYER_III": (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BLOCK = 1 << 16  # libsndfile's Vorbis encoder overflows the stack on a single write of minutes
MAX_INLINE_SECONDS = 1800  # a notebook cell beyond this (over 100 MB of base64) stops the browser


def _fail(path: Path, error: BaseException) -> NoReturn:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    reason = " ".join(str(reason).split())
    full = getattr(error, "errno", None) in _FULL
    remedy = "free some space" if full else "make this one writable"
    raise OutputError(f"cannot write {path}: {reason}; choose another path or {remedy}") from error


def _target(path: str | Path) -> tuple[Path, int | None]:
    """The file that writing to `path` would replace, symbolic links followed, and its mode if it exists."""
    path = Path(path)
    try:
        target = Path(os.path.realpath(path.expanduser()))
        try:
            mode = target.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            mode = None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~ of no such user
        _fail(path, error)
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {target.parent}; create it first")
    if mode is not None and stat.S_ISDIR(mode):
        raise OutputError(f"cannot write {path}: it is a folder; add a file name")
    if mode is not None and not stat.S_ISREG(mode):
        # Renaming onto it would put a file in its place: as root, in that of /dev/null.
        raise OutputError(f"cannot write {path}: it is not a regular file; choose another path")
    if mode is not None and not os.access(target, os.W_OK):
        raise OutputError(
            f"cannot write {path}: the file is read-only; choose another path or make it writable"
        )
    return target, mode


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`; it takes the place of `path` if the block ends well.

    If the block fails, by KeyboardInterrupt too, the temporary file goes and an existing `path` stays as it
    was. Raises OutputError for whatever the file system refuses, in the block as well.
    """
    target, mode = _target(path)
    temporary = target.parent / f".{secrets.token_hex(8)}.part"  # short: the name of `path` may be at the limit
    try:
        try:
            # os.open, not tempfile: the file gets the mode that an ordinary open() would give it
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            if mode is not None:
                temporary.chmod(stat.S_IMODE(mode))
            yield temporary
            temporary.replace(target)
        except OutputError:
            raise
        except OSError as error:
            _fail(Path(path), error)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _write_more(temporary: Path) -> None:
    """Raise the OSError, if there is one, for which no more can be written."""
    with temporary.open("ab") as file:
        file.write(bytes(BLOCK))
        file.flush()
        os.fsync(file.fileno())


def check_writable(path: str | Path) -> None:
    """Raise OutputError now if `atomic_write(path)` would fail after minutes of work. Leaves nothing behind."""
    target, _ = _target(path)
    probe = target.parent / f".{secrets.token_hex(8)}.part"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        probe.unlink()
    except OSError as error:
        _fail(Path(path), error)


def check_audio_path(path: str | Path) -> None:
    """`check_writable`, and that `path` has a suffix that this machine can encode."""
    _encoding(Path(path), None)
    check_writable(path)


def check_voice_path(path: str | Path) -> None:
    """`check_writable`, and that `path` ends as voices must."""
    _require_npz(path)
    check_writable(path)


def _require_npz(path: str | Path) -> None:
    if Path(path).suffix != ".npz":
        raise OutputError(f"cannot write {path}: suno's bark reads voices from .npz files; end it in .npz")


def _encoding(path: Path, subtype: str | None) -> tuple[str, str]:
    """libsndfile's (format, subtype) for `path`."""
    suffix = path.suffix.lower()
    if suffix not in AUDIO_FORMATS:
        raise OutputError(
            f"cannot write {path}: its suffix is {suffix!r}; use one of {', '.join(AUDIO_FORMATS)}"
        )
    container, subtypes = AUDIO_FORMATS[suffix]
    chosen = subtypes[0] if subtype is None else subtype
    if chosen not in subtypes:
        raise OutputError(f"cannot write {path}: subtype is {subtype!r}; use one of {', '.join(subtypes)}")
    soundfile = _soundfile(path)
    if chosen not in soundfile.available_subtypes(container):
        raise OutputError(
            f"cannot write {path}: libsndfile {soundfile.__libsndfile_version__} cannot encode {container} "
            f"{chosen} (MP3 needs 1.1); upgrade it (pip install -U soundfile) or write .wav or .flac"
        )
    return container, chosen


def _soundfile(path: Path) -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, the C library is not
        raise OutputError(
            f"cannot write {path}: soundfile does not load ({error}); pip install soundfile"
        ) from error
    return soundfile


def _check_waveform(path: Path, samples: object, rate: object, container: str, subtype: str) -> None:
    """Raise OutputError for what libsndfile would write as something else, or crash on."""
    fault = None
    if not isinstance(samples, np.ndarray):
        fault = f"samples are a {type(samples).__name__}; they must be a float array (n,) in [-1, 1]"
    elif samples.ndim != 1 or samples.dtype.kind != "f":
        fault = f"samples are {samples.dtype} {samples.shape}; they must be floats (n,) in [-1, 1]"
    elif not len(samples):
        fault = "there are no samples; generate the audio again"
    elif bad := len(samples) - int(np.isfinite(samples).sum()):
        fault = f"{bad} of {len(samples)} samples are NaN or infinite; generate the audio again"
    elif not is_whole(rate) or not 1 <= rate < 2**31:
        fault = f"sample_rate is {rate!r}; it must be a whole number of hertz"
    elif rate not in _RATES.get(subtype, _RATES.get(container, range(2**31))):
        fault = f"sample_rate is {rate}, which {subtype} in {container} does not take; write .wav, or resample"
    if fault is not None:
        raise OutputError(f"cannot write {path}: {fault}")


def ratio_fits(coarse_frames: int, semantic_tokens: int, layout: Layout) -> bool:
    """suno's test that the two belong together: frames per token, to one decimal, is 75 / 49.9, that is 1.5."""
    wanted = round(layout.coarse_rate_hz / layout.semantic_rate_hz, 1)
    return round(coarse_frames / semantic_tokens, 1) == wanted


@dataclass(frozen=True, eq=False)
class Tokens:
    """What the three stages drew, int64: semantic (n,) in [0, 10000), coarse (2, frames) and fine (8, frames)
    in [0, 1024). n runs at 49.9 Hz, frames at 75 Hz."""

    semantic: IntArray
    coarse: IntArray
    fine: IntArray

    def save(self, path: str | Path) -> None:
        """Write an .npz with the keys of suno's `save_as_prompt`; OutputError when that cannot be done."""
        _require_npz(path)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, semantic_prompt=self.semantic, coarse_prompt=self.coarse, fine_prompt=self.fine)


@dataclass(frozen=True, eq=False)
class Audio:
    """A waveform in [-1, 1], float32 (n,), `sample_rate` in hertz.

    tokens: what it was decoded from, None when that is unknown. timings: seconds spent, by stage.
    """

    samples: FloatArray
    sample_rate: int
    tokens: Tokens | None = None
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.samples) / self.sample_rate

    def save(self, path: str | Path, subtype: str | None = None) -> None:
        """Write .wav, .flac, .ogg or .mp3, by suffix. An existing file is replaced once the new one is whole.

        subtype: libsndfile's name of the sample format (AUDIO_FORMATS); None is 16-bit PCM, Vorbis or MP3.
        Samples beyond ±1 are clipped, except in the subtype FLOAT. Raises OutputError when a sample is not
        finite, there are none, the suffix is unknown, or the file cannot be written.
        """
        path = Path(path)
        container, subtype = _encoding(path, subtype)
        _check_waveform(path, self.samples, self.sample_rate, container, subtype)
        exact = self.samples.dtype in (np.float32, np.float64)
        soundfile = _soundfile(path)
        with atomic_write(path) as temporary:
            try:
                with soundfile.SoundFile(
                    temporary, "w", self.sample_rate, 1, subtype=subtype, format=container
                ) as file:
                    for start in range(0, len(self.samples), BLOCK):
                        block = self.samples[start : start + BLOCK]
                        block = block if exact else block.astype(np.float64)
                        file.write(block if subtype == "FLOAT" else block.clip(-1, 1))
                written = soundfile.info(temporary).frames
            except (RuntimeError, AssertionError, ValueError) as error:  # soundfile asserts on a short write
                _write_more(temporary)  # libsndfile says "System error"
                _fail(path, error)
            if written < len(self.samples):  # libsndfile does not report what fails while it closes the file
                raise OutputError(
                    f"cannot write {path}: {written} of {len(self.samples)} samples were stored; "
                    "is the disk full, or the file over 4 GiB?"
                )

    def save_voice(self, path: str | Path) -> None:
        """Write the tokens as a voice (.npz) that bark_fast and suno's bark read as a history prompt.

        Raises OutputError when there are no tokens, or too few for suno's check of their ratio.
        """
        tokens = self.tokens
        if tokens is None or not len(tokens.semantic):
            raise OutputError(
                f"cannot write {path}: this audio has no tokens; save a voice from generated audio"
            )
        if not ratio_fits(tokens.coarse.shape[1], len(tokens.semantic), Layout()):
            raise OutputError(
                f"cannot write {path}: {tokens.coarse.shape[1]} frames to {len(tokens.semantic)} semantic "
                "tokens is not the 1.5 to 1 that Bark asks of a voice; use a longer utterance"
            )
        tokens.save(path)

    @staticmethod
    def concat(parts: Iterable[Audio], pause: float = 0.0) -> Audio:
        """Join `parts` in order with `pause` seconds of silence between them.

        Tokens are joined too, without the pauses (None when a part has none), and timings summed by stage.
        Raises InvalidInput for no parts, different sample rates, or a pause that is not 0 to 3600 s.
        """
        parts = list(parts)
        rates = sorted({part.sample_rate for part in parts})
        if len(rates) != 1:
            raise InvalidInput(f"parts have the sample rates {rates}; give at least one part, all of one rate")
        if not is_number(pause) or not 0 <= pause <= 3600:
            raise InvalidInput(f"pause is {pause!r}; it must be 0 to 3600 seconds")
        silence = np.zeros(round(float(pause) * rates[0]), dtype=np.float32)
        pieces = [piece for part in parts for piece in (silence, part.samples)][1:]
        timings: dict[str, float] = {}
        for part in parts:
            for stage, seconds in part.timings.items():
                timings[stage] = timings.get(stage, 0.0) + seconds
        tokens = [part.tokens for part in parts if part.tokens is not None]
        joined = None
        if len(tokens) == len(parts):
            joined = Tokens(
                np.concatenate([each.semantic for each in tokens]),
                np.concatenate([each.coarse for each in tokens], axis=1),
                np.concatenate([each.fine for each in tokens], axis=1),
            )
        return Audio(np.concatenate(pieces), rates[0], joined, timings)

    def __repr__(self) -> str:
        tokens = "no tokens" if self.tokens is None else f"{len(self.tokens.semantic)} semantic tokens"
        return f"Audio({self.duration:.2f} s at {self.sample_rate} Hz, {tokens})"

    def _repr_html_(self) -> str:
        """A player for notebooks: the waveform as 16-bit WAV inside the page."""
        if self.duration > MAX_INLINE_SECONDS:
            return f"<p>{self!r}: over {MAX_INLINE_SECONDS // 60} minutes, save it to listen</p>"
        pcm = (np.nan_to_num(self.samples).clip(-1, 1) * 32767).round().astype("<i2")
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self.sample_rate)
            file.writeframes(pcm.tobytes())
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'
