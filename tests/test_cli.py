"""The command line as a person meets it: real files, exit codes, one-line errors, and mostly real processes.

Options and errors that need no process of their own share the tests', which has torch imported already.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import click
import numpy as np
import pytest

from bark_fast import extension
from bark_fast.cli import main
from bark_fast.engine.capture import Capture
from bark_fast.errors import HubUnreachable, InvalidInput
from bark_fast.pipeline import Bark
from bark_fast.voices import VoiceLibrary, load_voice

soundfile = pytest.importorskip("soundfile")

COMMAND = [sys.executable, "-m", "bark_fast.cli"]


def environment(cache: Path) -> dict[str, str]:
    """Offline, with a cache of its own."""
    return os.environ | {
        "XDG_CACHE_HOME": str(cache), "HF_HOME": str(cache / "hf"), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Run `bark-fast` in an empty folder; returns the finished process."""
    work = tmp_path / "work"
    work.mkdir()

    def call(*arguments, stdin=None):
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            cwd=work, env=environment(tmp_path / "cache"), input=stdin, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip

    call.folder = work
    return call


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """As `run`, in this process."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        stdout, stderr = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=stdout, stderr=stderr)

    call.folder = work
    return call


@pytest.fixture
def handlers():
    """Puts signals' handlers back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def of_tiny_model(run, tiny_suno_dir):
    """`bark-fast say` with the tiny model and half a second of speech."""

    def call(*arguments, **options):
        fixed = ("--model", tiny_suno_dir, "--max-seconds", "0.5", "--seed", "1")
        return run("say", *fixed, *arguments, **options)

    call.folder = run.folder
    return call


@pytest.fixture
def say(run, tiny_suno_dir):
    """`say` in a process of its own."""
    return of_tiny_model(run, tiny_suno_dir)


@pytest.fixture
def say_here(run_here, tiny_suno_dir):
    """`say` in this process."""
    return of_tiny_model(run_here, tiny_suno_dir)


def unreachable(*arguments):
    raise HubUnreachable("the hub cannot be reached")


def assert_one_line_error(done, *words):
    """Exit 1 with one line that starts with the program's name and holds `words`; no traceback."""
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("bark-fast: ")
    for word in words:
        assert str(word) in lines[0]


class TestSay:
    def test_it_writes_audio_and_tokens_and_says_so(self, say):
        done = say("Hello there.", "-o", "hello.wav", "--tokens", "hello.npz")
        assert done.returncode == 0, done.stderr
        info = soundfile.info(say.folder / "hello.wav")
        assert (info.samplerate, info.channels) == (24_000, 1)
        assert 0.4 < info.duration < 0.6
        assert "hello.wav: 0.5 s of audio" in done.stderr
        assert "real-time factor" in done.stderr
        voice = load_voice(say.folder / "hello.npz", VoiceLibrary())
        assert voice.fine.shape[1] * 320 == info.frames

    def test_quiet_is_quiet(self, say):
        done = say("Hello there.", "-o", "hello.flac", "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert soundfile.info(say.folder / "hello.flac").frames > 0

    def test_text_comes_from_argument_file_or_stdin_alike(self, say):
        (say.folder / "text.txt").write_text("Hello there.\n", encoding="utf-8")
        say("Hello there.", "-o", "a.wav", "-q")
        say("--file", "text.txt", "-o", "b.wav", "-q")
        say("-o", "c.wav", "-q", stdin="Hello there.\n")
        say("-", "-o", "d.wav", "-q", stdin="Hello there.\n")
        a, *others = ((say.folder / f"{name}.wav").read_bytes() for name in "abcd")
        assert all(other == a for other in others)

    def test_options_reach_the_model(self, say_here):
        names = ["plain", "seed", "temperature", "top_k", "top_p", "fine", "rng", "voice"]
        extra = [
            [], ["--seed", "2"], ["--temperature", "0"], ["--top-k", "2"], ["--top-p", "0.2"],
            ["--fine-temperature", "0"], ["--rng", "torch"], ["--voice", "plain.npz"],
        ]  # fmt: skip
        for name, options in zip(names, extra, strict=True):
            done = say_here("Hello there.", "-o", f"{name}.wav", "--tokens", f"{name}.npz", "-q", *options)
            assert done.returncode == 0, done.stderr
        fines = [np.load(say_here.folder / f"{name}.npz")["fine_prompt"] for name in names]
        assert not any(np.array_equal(fines[0], other) for other in fines[1:])

    def test_graphs_that_were_captured_are_told(self, say_here, monkeypatch):
        captures = [Capture("semantic", 1, 0.5, 3 << 20), Capture("coarse", 1, 0.25, 1 << 20)]
        assert "CUDA graphs" not in say_here("Hello there.").stderr
        monkeypatch.setattr(Bark, "captures", captures)
        assert "2 captured, once for this process, in 0.8 s of these; they hold 4 MiB" in say_here("Hi.").stderr
        assert say_here("Hello there.", "-q").stderr == ""

    def test_the_same_seed_gives_the_same_file(self, say):
        for name in ("a", "b"):
            say("Hello there.", "-o", f"{name}.wav", "-q")
        assert (say.folder / "a.wav").read_bytes() == (say.folder / "b.wav").read_bytes()

    def test_long_form(self, say):
        text = "This is a sentence of some length, spoken slowly. " * 8
        assert_one_line_error(say(text * 5, "-q"), "256", "long_form")
        assert say(text, "--long-form", "-o", "long.wav", "-q").returncode == 0
        assert soundfile.info(say.folder / "long.wav").duration > 1.0
        shown = say(text, "--long-form", "--voice", "v2/en_speaker_6", "-o", "long.wav").stderr
        seconds = re.search(
            r"audio in ([\d.]+) s .*; semantic ([\d.]+), coarse ([\d.]+), fine ([\d.]+), codec", shown
        )
        waited, *stages = map(float, seconds.groups())
        assert sum(stages) <= waited + 0.2

    def test_without_a_model_or_a_hub_it_speaks_noise_and_says_so(self, run):
        done = run("say", "Hello.", "--max-seconds", "0.3", "--quiet", "-o", "noise.wav")
        assert done.returncode == 0, done.stderr
        assert "WHAT YOU WILL HEAR IS NOISE" in done.stderr
        assert "--model" in done.stderr
        assert soundfile.info(run.folder / "noise.wav").frames > 0

    def test_a_hub_id_that_cannot_be_fetched_is_an_error(self, run):
        assert_one_line_error(run("say", "Hello.", "--model", "suno/bark", "-q"), "suno/bark")
        # nor does noise stand in for a revision
        assert_one_line_error(run("say", "Hello.", "--revision", "v1", "-q"), "revision 'v1'")
        assert not list(run.folder.iterdir())


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["  "], ["text"]),
            (["Hello.", "--voice", "nobody"], ["nobody"]),
            (["Hello.", "--voice", "missing.npz"], ["missing.npz"]),
            (["Hello.", "-o", "no/such/folder/a.wav"], ["no/such/folder"]),
            (["Hello.", "-o", "a.xyz"], [".xyz", ".wav"]),
            (["Hello.", "--tokens", "tokens.txt"], ["tokens.txt", ".npz"]),
            (["Hello.", "--temperature", "-1"], ["temperature is -1.0", "at least 0"]),
            (["Hello.", "--top-p", "1.5"], ["top_p is 1.5"]),
            (["Hello.", "--top-k", "0"], ["top_k is 0"]),
            (["Hello.", "--seed", "-4"], ["seed is -4"]),
            (["Hello.", "--max-seconds", "0"], ["max_seconds is 0.0"]),
            (["Hello.", "--file", "text.txt"], ["--file"]),
            (["--file", "missing.txt"], ["missing.txt"]),
            (["Hello.", "--device", "cuda:7"], ["cuda:7"]),
            (["Hello.", "--dtype", "int4"], ["int4"]),
        ],
    )
    def test_one_line_and_no_file(self, say_here, arguments, words):
        assert_one_line_error(say_here(*arguments, "-q"), *words)
        assert not list(say_here.folder.iterdir())

    @pytest.mark.parametrize(
        ("option", "words"), [("--seed", "seed is -4"), ("--max-seconds", "max_seconds"), ("--top-k", "top_k")]
    )
    def test_an_option_is_refused_before_anything_is_loaded(self, run_here, option, words):
        assert_one_line_error(run_here("say", "Hello.", "-q", "--model", "nowhere", option, "-4"), words)

    def test_text_and_voice_file_are_looked_at_before_anything_is_loaded(self, run_here):
        assert_one_line_error(run_here("say", "", "-q", "--model", "nowhere"), "nothing to say")
        assert_one_line_error(
            run_here("say", "Hi.", "-q", "--model", "nowhere", "-v", "missing.npz"), "missing.npz"
        )

    def test_it_is_a_module_too(self, run):
        done = subprocess.run(
            [sys.executable, "-m", "bark_fast", "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("bark-fast, version")

    @pytest.mark.parametrize(
        "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore"), MemoryError()]
    )
    def test_no_memory_is_told(self, say_here, monkeypatch, error):
        def full(*arguments, **options):
            raise error

        monkeypatch.setattr(Bark, "generate", full)
        assert_one_line_error(say_here("Hi.", "-q"), "not enough memory (", "smaller dtype or checkpoint")

    @pytest.mark.parametrize(("arguments", "batch"), [([], 1), (["--long-form"], 16)])
    def test_one_text_takes_no_caches_of_others(self, say_here, monkeypatch, arguments, batch):
        asked = []

        def speak(bark, *_, **__):
            asked.append(bark.max_batch)
            raise InvalidInput("enough")

        monkeypatch.setattr(Bark, "generate", speak)
        say_here("Hi.", "-q", *arguments)
        assert asked == [batch]

    def test_a_path_cannot_break_the_line(self, run_here):
        assert_one_line_error(run_here("say", "Hi.", "-q", "-o", "a\n\x1b[1mb.xyz"), r"a\n\x1b[1mb.xyz")

    def test_random_weights_that_were_damaged_can_be_made_anew(self, run):
        cache = run.folder.parent / "cache"
        assert run("say", "Hello.", "--max-seconds", "0.3", "-q").returncode == 0
        (weights,) = cache.rglob("model.safetensors")
        weights.write_bytes(weights.read_bytes()[:100])
        done = run("say", "Hello.", "-q")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.rstrip().endswith(f"; delete {weights.parent}, and they are made anew")

    def test_an_argument_that_is_not_text(self, run_here):
        assert_one_line_error(run_here("say", "caf\udce9", "-q"), "not UTF-8")

    def test_stdin_that_is_not_text(self, tmp_path, tiny_suno_dir):
        done = subprocess.run(
            [*COMMAND, "say", "-m", str(tiny_suno_dir), "-o", str(tmp_path / "a.wav")],
            input=b"\xff\xfe", capture_output=True, env=environment(tmp_path), timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert b"UTF-8" in done.stderr

    def test_an_unknown_option_is_a_usage_error(self, run_here):
        done = run_here("say", "Hello.", "--loud")
        assert done.returncode == 2
        assert "--loud" in done.stderr

    def test_an_empty_model_is_not_the_default_one(self, run_here):
        assert_one_line_error(run_here("say", "Hello.", "-q", "--model", ""), "'' names no checkpoint")

    @pytest.mark.parametrize("model", ["nowhere", "empty"])
    def test_a_missing_checkpoint(self, run_here, tmp_path, model):
        (tmp_path / "empty").mkdir()
        assert_one_line_error(run_here("say", "Hello.", "-q", "--model", tmp_path / model), model)

    def test_an_existing_file_survives_a_failure(self, say_here):
        (say_here.folder / "a.wav").write_bytes(b"precious")
        assert say_here("Hello.", "-o", "a.wav", "--voice", "nobody", "-q").returncode == 1
        assert (say_here.folder / "a.wav").read_bytes() == b"precious"

    @pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
    @pytest.mark.parametrize(
        ("sent", "status", "told"),
        [
            (signal.SIGINT, 130, b"interrupted; no file was left half written"),
            (signal.SIGTERM, 143, b""),
            (signal.SIGHUP, 129, b""),
        ],
    )
    def test_a_signal_leaves_no_file(self, run, tmp_path, tiny_suno_dir, sent, status, told):
        process = subprocess.Popen(
            [*COMMAND, "say", "--model", str(tiny_suno_dir), "--long-form", "Hello there. " * 500],
            cwd=run.folder, env=environment(tmp_path), stderr=subprocess.PIPE,
            # shells start background jobs, and nohup all, with a signal ignored, and children inherit that
            preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),
        )  # fmt: skip
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        shown, deadline = b"", time.monotonic() + 60
        while b"coarse" not in shown and time.monotonic() < deadline:
            shown += process.stderr.read() or b""
            time.sleep(0.05)
        assert b"coarse" in shown
        process.send_signal(sent)
        assert process.wait(timeout=30) == status
        rest = process.stderr.read() or b""
        assert told in rest
        assert b"Traceback" not in rest
        assert not list(run.folder.iterdir())

    def test_what_nohup_ignores_stays_ignored(self, run_here, handlers):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run_here("--version")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL

    def test_a_second_interrupt_does_not_cut_the_first_ones_line(self, say_here, monkeypatch, handlers):
        monkeypatch.setattr(Bark, "generate", Mock(side_effect=KeyboardInterrupt))
        monkeypatch.setattr(click, "echo", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        assert say_here("Hi.", "-q").returncode == 130


class TestOtherCommands:
    def test_doctor_names_versions_device_and_backends(self, run):
        done = run("doctor")
        assert done.returncode == 0, done.stderr
        for word in (
            "bark_fast",
            "torch",
            "device",
            "backend       torch: in use",
            "triton: off",
            f"extension: {'in use' if extension.load() else 'off'}, {extension.describe()}",
        ):
            assert word in done.stdout

    @pytest.mark.parametrize("layout", ["suno", "hf"])
    def test_make_checkpoint_makes_what_say_reads(self, run, layout):
        done = run("make-checkpoint", "model", "--size", "tiny", "--format", layout, "--seed", "3", "-q")
        assert done.returncode == 0, done.stderr
        assert "noise" in done.stdout
        done = run("say", "Hello.", "-m", "model", "--max-seconds", "0.3", "--seed", "1", "-q")
        assert done.returncode == 0, done.stderr
        assert soundfile.info(run.folder / "out.wav").frames > 0

    def test_make_checkpoint_refuses_a_folder_in_use(self, run_here):
        (run_here.folder / "model").mkdir()
        (run_here.folder / "model" / "file").write_text("mine")
        assert_one_line_error(run_here("make-checkpoint", "model", "-q"), "model")
        assert [p.name for p in (run_here.folder / "model").iterdir()] == ["file"]

    def test_there_may_be_no_home(self, run_here, monkeypatch):
        """As for a user of a container that has no entry in its passwd."""
        assert_one_line_error(run_here("make-checkpoint", "~no-such-user/x", "-q"), "~no-such-user/x cannot")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
        assert_one_line_error(run_here("say", "Hi.", "-q", "-m", "suno"), "suno's bark, does not exist")
        monkeypatch.setattr("bark_fast.checkpoint.hub.fetch_repo", unreachable)
        assert_one_line_error(run_here("say", "Hi.", "-q"), "there is no home", "XDG_CACHE_HOME")

    def test_help_and_version(self, run_here):
        assert "say" in run_here("--help").stdout
        assert "--voice" in run_here("say", "-h").stdout
        assert "0.1.0" in run_here("--version").stdout


class TestStreamsThatAreNotThere:
    """Closed, full or read by somebody who leaves: `2>&-`, `2>/dev/full`, `| head`."""

    @pytest.fixture
    def shell(self, tmp_path, tiny_suno_dir):
        """Run a line of sh in which $SAY speaks with the tiny model."""
        say = f"{' '.join(COMMAND)} say --model {tiny_suno_dir} --max-seconds 0.3 --seed 1"

        def call(line):
            return subprocess.run(
                ["bash", "-c", line], cwd=tmp_path, env=environment(tmp_path / "cache") | {"SAY": say},
                capture_output=True, text=True, timeout=120,
            )  # fmt: skip

        call.folder = tmp_path
        return call

    @pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2>&1 | head -c 1"])
    def test_speech_is_worth_more_than_a_bar(self, shell, stderr):
        done = shell(f"set -o pipefail; $SAY Hello -o a.wav {stderr}")
        assert done.returncode == 0, done.stderr
        assert soundfile.info(shell.folder / "a.wav").frames > 0

    def test_no_stdin_is_no_text(self, shell):
        assert_one_line_error(shell("$SAY -o a.wav <&-"), "no text was given")
        assert_one_line_error(shell("$SAY - -o a.wav <&-"), "stdin is closed")

    def test_output_that_cannot_be_written_is_one_line(self, shell):
        done = shell(f"{' '.join(COMMAND)} doctor >/dev/full")
        assert_one_line_error(done, "cannot write the output", "No space left")

    def test_tokens_are_kept_where_there_is_no_room_for_audio(self, shell):
        done = shell("ulimit -f 8; $SAY Hello -q -o a.wav --tokens a.npz")
        assert_one_line_error(done, "cannot write a.wav")
        assert [path.name for path in shell.folder.glob("a.*")] == ["a.npz"]
        again = shell("$SAY Hello -q -o b.wav --voice a.npz")
        assert again.returncode == 0, again.stderr

    def test_both_files_that_cannot_be_written_are_told(self, shell):
        done = shell("ulimit -f 0; $SAY Hello -q -o a.wav --tokens a.npz")
        assert_one_line_error(done, "cannot write a.wav", "cannot write a.npz")
        assert not list(shell.folder.glob("*.*"))

    def test_two_that_make_the_noise_checkpoint_at_once(self, shell):
        say = f"{' '.join(COMMAND)} say Hi -q --max-seconds 0.3"
        done = shell(f"{say} -o 1.wav & {say} -o 2.wav; first=$?; wait $! && exit $first")
        assert done.returncode == 0, done.stderr
        assert {path.name for path in shell.folder.glob("*.wav")} == {"1.wav", "2.wav"}
