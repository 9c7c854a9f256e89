"""The command line: `bark-fast say | doctor | make-checkpoint`."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bark_fast import __version__
from bark_fast.errors import (
    BarkFastError,
    CheckpointError,
    HubUnreachable,
    InvalidInput,
    OutputError,
    is_of_memory,
    shortage,
)
from bark_fast.sampling import SamplingParams

if TYPE_CHECKING:
    from bark_fast.audio import Audio
    from bark_fast.pipeline import Bark

DEFAULT_MODEL = "suno/bark-small"
INTERRUPTED = 130


def _terminated(number: int, frame: object) -> None:
    """End as Ctrl-C does, leaving nothing half written; Python's own way would be to stop where it is."""
    raise SystemExit(128 + number)


def _say(message: object) -> None:
    """One line on stderr, whatever a path in it may hold."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))
    click.echo(f"bark-fast: {line}", err=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one line on stderr for every error but those of usage, and a non-zero exit."""
    with suppress(ValueError):  # signals are the main thread's
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP, and nohup wants it ignored
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _terminated)
    try:
        status = cli.main(args=arguments, prog_name="bark-fast", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        click.echo("\nbark-fast: interrupted; no file was left half written", err=True)
        status = INTERRUPTED
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except BarkFastError as error:
        _say(error)
        status = 1
    except (RuntimeError, MemoryError) as error:  # torch's and numpy's
        if not is_of_memory(error):
            raise
        _say(
            f"there is not enough memory ({shortage(error)}); close other programs, or choose a smaller "
            f"dtype or checkpoint"
        )
        status = 1
    except OSError as error:  # of stdout: files have errors of their own
        with suppress(OSError):
            _say(f"cannot write the output ({error.strerror or error})")
        sys.stdout = None  # or Python would say the same once more
        status = 1
    sys.exit(status if isinstance(status, int) else 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bark-fast")
def cli() -> None:
    """Fast, exact inference for Bark, suno's text-to-speech model."""


@cli.command()
@click.argument("text", required=False)
@click.option(
    "-f",
    "--file",
    "text_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Read the text from this file ('-' is stdin).",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.wav"),
    show_default=True,
    help="Audio file: .wav, .flac, .ogg or .mp3.",
)
@click.option(
    "-m", "--model", help=f"Checkpoint folder, hub id, or suno (its own cache).  [default: {DEFAULT_MODEL}]"
)
@click.option("--revision", help="Branch, tag or commit of the hub id.")
@click.option("-v", "--voice", help="Preset name (v2/en_speaker_6) or .npz file.")
@click.option("--seed", type=int, help="Same seed, same speech.  [default: a fresh one]")
@click.option(
    "--rng",
    type=click.Choice(["philox", "torch"]),
    default="philox",
    show_default=True,
    help="torch: draw exactly as suno and Hugging Face do.",
)
@click.option(
    "--dialect", type=click.Choice(["suno", "hf"]), help="Order of sampling steps.  [default: the checkpoint's]"
)
@click.option("--temperature", type=float, help="Semantic and coarse temperature; 0 is greedy.")
@click.option("--fine-temperature", type=float, help="Fine temperature; 0 is argmax.")
@click.option("--top-k", type=int, help="Keep the k likeliest semantic and coarse tokens.")
@click.option(
    "--top-p", type=float, help="Keep the likeliest semantic and coarse tokens up to this probability."
)
@click.option("--min-eos-p", type=float, help="End once the end token is this likely.")
@click.option("--max-seconds", type=float, help="Stop each chunk of speech at this length.")
@click.option("--long-form", is_flag=True, help="Split long texts at sentences.")
@click.option(
    "--tokens",
    "tokens_file",
    type=click.Path(path_type=Path),
    help="Write the tokens (.npz, usable as a voice).",
)
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="No progress bar, no summary.")
def say(text: str | None, text_file: Path | None, output: Path, model: str | None, voice: str | None,
        tokens_file: Path | None, quiet: bool, **options: Any) -> None:  # fmt: skip
    """Speak TEXT (or a file, or stdin) into an audio file."""
    from bark_fast.audio import check_audio_path, check_voice_path
    from bark_fast.options import check_max_seconds
    from bark_fast.randomness import check_seeds
    from bark_fast.voices import VoiceLibrary, load_voice

    words = _read_text(text, text_file)
    if not words.strip():
        raise InvalidInput("the text is empty and has nothing to say; give at least one visible character")
    # minutes of work must not end in a path that cannot be written, nor loading in an option that cannot be
    check_audio_path(output)
    if tokens_file is not None:
        check_voice_path(tokens_file)
    if voice is not None and voice.endswith(".npz"):
        load_voice(voice, VoiceLibrary())
    check_seeds(options["seed"], 1)
    check_max_seconds(options["max_seconds"])
    loading = {name: options.pop(name) for name in ("device", "dtype", "dialect", "revision")}
    if not options["long_form"]:
        loading["max_batch"] = 1  # one text needs no caches of others
    generating = _generate_options(options)
    bark, load_seconds = _load(model, loading, quiet)
    started = time.perf_counter()
    audio = bark.generate(words, voice=voice, progress=not quiet, **generating)
    seconds = time.perf_counter() - started
    _save(audio, output, tokens_file)
    if not quiet:
        with suppress(OSError):  # stderr may be full, or nobody reads it: what was to be done is done
            _summarize(bark, audio, output, seconds, load_seconds)


def _summarize(bark: Bark, audio: Audio, output: Path, seconds: float, load_seconds: float) -> None:
    """One line of what was spoken and how fast, and another of the graphs captured meanwhile."""
    # the sum is more than was waited where chunks are spoken side by side
    share = seconds / max(seconds, sum(audio.timings.values()))
    stages = ", ".join(f"{stage} {spent * share:.1f}" for stage, spent in audio.timings.items())
    click.echo(
        f"{output}: {audio.duration:.1f} s of audio in {seconds:.1f} s "
        f"(real-time factor {seconds / audio.duration:.2f}; {stages}; loading {load_seconds:.1f})",
        err=True,
    )
    if captures := bark.captures:
        click.echo(
            f"CUDA graphs of decode steps: {len(captures)} captured, once for this process, in "
            f"{sum(one.seconds for one in captures):.1f} s of these; they hold "
            f"{sum(one.bytes for one in captures) / 2**20:.0f} MiB",
            err=True,
        )


@cli.command()
def doctor() -> None:
    """Print versions, device, and which backends are in use and why others are not."""
    import platform

    import torch

    from bark_fast.backend_report import backends, installed_version

    click.echo(f"bark_fast     {__version__}")
    click.echo(f"python        {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "numpy", "safetensors", "tokenizers", "huggingface-hub", "soundfile"):
        click.echo(f"{package:<13} {installed_version(package) or 'not installed'}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            click.echo(
                f"device        cuda:{index} {properties.name}, compute capability "
                f"{properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
            )
    else:
        click.echo(f"device        cpu, {torch.get_num_threads()} threads; no CUDA GPU is visible to torch")
    for backend in backends():
        click.echo(f"backend       {backend.name}: {'in use' if backend.active else 'off'}, {backend.reason}")


@cli.command("make-checkpoint")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--size", type=click.Choice(["tiny", "small", "large"]), default="tiny", show_default=True)
@click.option("--format", "layout", type=click.Choice(["suno", "hf"]), default="hf", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def make_checkpoint_command(folder: Path, size: Any, layout: Any, seed: int, quiet: bool) -> None:
    """Write a complete checkpoint of random weights into FOLDER: it speaks noise."""
    from bark_fast.random_checkpoint import make_checkpoint

    written = make_checkpoint(folder, size=size, format=layout, seed=seed, progress=not quiet)
    click.echo(f"{written}: random weights ({size}, {layout} format); what they speak is noise")


def _save(audio: Audio, output: Path, tokens_file: Path | None) -> None:
    """Both files, or as many as can be written: the error tells of each that cannot."""
    failed: OutputError | None = None
    try:
        audio.save(output)
    except OutputError as error:
        failed = error
    finally:  # on a full disk there may be room for the tokens, of which the audio can be made again
        if tokens_file is not None and audio.tokens is not None:
            try:
                audio.tokens.save(tokens_file)
            except OutputError as error:
                failed = error if failed is None else OutputError(f"{failed}; {error}")
    if failed is not None:
        raise failed


def _read_text(text: str | None, text_file: Path | None) -> str:
    if text is not None and text_file is not None:
        raise InvalidInput("both a text and --file were given; give one of them")
    if text_file is not None and str(text_file) != "-":
        try:
            return text_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise InvalidInput(f"cannot read {text_file}: {reason}; give a readable UTF-8 file") from None
    if text is None and text_file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise InvalidInput("no text was given; pass it as an argument, with --file, or on stdin")
    if text is None or text == "-":
        if sys.stdin is None:
            raise InvalidInput("stdin is closed; pass the text as an argument or with --file")
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidInput("stdin is not UTF-8 text; convert it first (iconv -t utf-8)") from None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInput("the text is not UTF-8; convert it first (iconv -t utf-8), or set LC_ALL") from None
    return text


def _load(model: str | None, options: dict[str, Any], quiet: bool) -> tuple[Bark, float]:
    """The model asked for; without one suno/bark-small, and where no hub can be reached noise, said plainly."""
    from bark_fast.pipeline import Bark

    started = time.perf_counter()
    options = options | {"progress": not quiet}
    try:
        bark = Bark.from_pretrained(DEFAULT_MODEL if model is None else model, **options)
    except HubUnreachable as error:
        if model is not None or options["revision"] is not None:
            raise
        folder = _noise_checkpoint(quiet)
        _say(error)
        _say(
            f"using random weights from {folder} instead: WHAT YOU WILL HEAR IS NOISE, not speech, until you "
            f"give real weights with --model"
        )
        try:
            bark = Bark.from_pretrained(folder, **options)
        except CheckpointError as damaged:
            raise CheckpointError(
                f"the random weights cannot be read ({damaged}); delete {folder}, and they are made anew"
            ) from None
    return bark, time.perf_counter() - started


def _noise_checkpoint(quiet: bool) -> Path:
    """A tiny random checkpoint in the user's cache, made when it is not there yet."""
    from bark_fast.random_checkpoint import make_checkpoint

    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bark_fast"
    except RuntimeError:
        raise OutputError(
            "there is no home to keep random weights in; set XDG_CACHE_HOME to a writable folder, or give "
            "--model"
        ) from None
    folder = cache / f"random-tiny-{__version__}"
    if not folder.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make {cache} ({error.strerror}); set XDG_CACHE_HOME to a writable folder, or give "
                f"--model"
            ) from None
        try:
            make_checkpoint(folder, size="tiny", format="hf", seed=0, progress=not quiet)
        except OutputError:
            if not (folder / "config.json").exists():  # else another process made it meanwhile
                raise
    return folder


def _generate_options(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `Bark.generate` from the command's options; what was not given is left out."""
    names = ("temperature", "top_k", "top_p")
    drawn = {name: options.pop(name) for name in names}
    drawn = {name: value for name, value in drawn.items() if value is not None}
    min_eos_p, fine_temperature = options.pop("min_eos_p"), options.pop("fine_temperature")
    semantic = dict(drawn) if min_eos_p is None else drawn | {"min_eos_p": min_eos_p}
    fine = {} if fine_temperature is None else {"temperature": fine_temperature}
    return options | {
        "semantic": SamplingParams(**semantic),
        "coarse": SamplingParams(**drawn),
        "fine": SamplingParams(**fine),
    }


if __name__ == "__main__":
    main()
