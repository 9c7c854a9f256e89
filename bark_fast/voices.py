"""Voices: where they are found, and the proof that one is sound before the models see it."""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from bark_fast.audio import Audio, ratio_fits
from bark_fast.bars import hidden_hub_bar
from bark_fast.config import Layout
from bark_fast.errors import InvalidVoice
from bark_fast.work import IntArray

KEYS = ("semantic_prompt", "coarse_prompt", "fine_prompt")
INDEX_NAME = "speaker_embeddings_path.json"
MAX_ARRAY_BYTES = 1 << 28  # ten hours of fine tokens are 173 MB; a header that claims more is damage or malice
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*){0,7}")
_HOW_TO_LIST = "bark.voices.names() lists them, and a path to a voice file must end in .npz"


@dataclass(frozen=True, eq=False)
class Voice:
    """A history prompt, int64: semantic (n,) in [0, 10000), coarse (2, m) and fine (8, k) in [0, 1024)."""

    semantic: IntArray
    coarse: IntArray
    fine: IntArray
    name: str = ""

    def __repr__(self) -> str:
        return f"Voice({self.name!r}, {len(self.semantic)} semantic tokens, {self.fine.shape[1]} frames)"


class _NotDownloaded(InvalidVoice):
    """A voice's file could not be had from the hub, which says nothing of the voice itself."""


class VoiceLibrary:
    """Where names such as `v2/en_speaker_6` are looked up. Nothing is read before the first look-up.

    In this order: `speaker_embeddings`, a folder with speaker_embeddings_path.json (or that file) as on the
    Hugging Face Hub; `folder`, with the same index or with `<name>.npz` in it, in its prompts/ or
    assets/prompts/; `hub_id`, a repository on the Hub, from which the three arrays of a voice are downloaded
    when it is asked for, of the commit that `folder` is a snapshot of; the prompts of an installed suno bark,
    with a warning where the hub could not be asked.
    """

    def __init__(
        self,
        folder: Path | None = None,
        speaker_embeddings: Path | None = None,
        hub_id: str | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.layout = layout or Layout()
        self._hub_id = hub_id
        self._indices = []
        if speaker_embeddings is not None:
            given = Path(speaker_embeddings)
            self._indices.append(given if given.suffix == ".json" else given / INDEX_NAME)
            if not self._indices[0].is_file():
                raise InvalidVoice(f"there is no {self._indices[0]}; give a folder that holds {INDEX_NAME}")
        self._prompt_folders = []
        self._revision: str | None = None
        if folder is not None:
            folder = Path(folder)
            if (folder / INDEX_NAME).is_file():
                self._indices.append(folder / INDEX_NAME)
            self._prompt_folders += [folder, folder / "prompts", folder / "assets" / "prompts"]
            if folder.parent.name == "snapshots":  # of the hub's cache, by its commit
                self._revision = folder.name

    def names(self) -> list[str]:
        """Every name that `get` knows, sorted.

        With `hub_id` this may download the hub's index; without a connection the local names are returned, and
        InvalidVoice is raised only if there are none.
        """
        found = set(self._local_names())
        if self._hub_id is not None:
            try:
                index = self._download(INDEX_NAME)
                found.update(_sound_names(index))
            except InvalidVoice:
                if not found:
                    raise
        return sorted(found)

    def get(self, name: str) -> Voice:
        """The checked voice called `name`; InvalidVoice when there is none or it is not sound."""
        if not isinstance(name, str) or len(name) > 100 or not _NAME.fullmatch(name):
            raise InvalidVoice(
                f"voice name is {_short(name)}; names look like 'v2/en_speaker_6'. {_HOW_TO_LIST}"
            )
        for path in self._indices:
            files = _entry(path, _read_index(path), name)
            if files and all(_is_file(path.parent / file) for file in files.values()):
                arrays = {key: _read_npy(path.parent / files[key]) for key in KEYS}
                return check_voice(arrays, name, self.layout)
        for prompts in self._prompt_folders:
            if (prompts / f"{name}.npz").is_file():
                return _read_npz(prompts / f"{name}.npz", name, self.layout)
        stand_in = next((p for p in _installed_prompts() if (p / f"{name}.npz").is_file()), None)
        if self._hub_id is not None:
            try:
                index = self._download(INDEX_NAME)
                if files := _entry(index, _read_index(index), name):
                    arrays = {key: _read_npy(self._download(files[key])) for key in KEYS}
                    return check_voice(arrays, name, self.layout)
            except _NotDownloaded as error:
                if stand_in is None:
                    raise
                warnings.warn(
                    f"{error}. Meanwhile the voice of that name in suno's installed package speaks",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if stand_in is not None:
            return _read_npz(stand_in / f"{name}.npz", name, self.layout)
        close = difflib.get_close_matches(name, self.names(), n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise InvalidVoice(f"there is no voice {_short(name)}; {hint}{_HOW_TO_LIST}")

    def _local_names(self) -> Iterator[str]:
        for path in self._indices:
            for name, files in _sound_names(path).items():
                if all(_is_file(path.parent / file) for file in files.values()):
                    yield name
        for prompts in (*self._prompt_folders, *_installed_prompts()):
            for pattern in ("*.npz", "v2/*.npz"):
                for file in prompts.glob(pattern):
                    name = file.relative_to(prompts).with_suffix("").as_posix()
                    if _NAME.fullmatch(name):
                        yield name

    def _download(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        assert self._hub_id is not None
        bar = hidden_hub_bar(hf_hub_download)  # of some KB
        try:
            return Path(hf_hub_download(self._hub_id, file, revision=self._revision, **bar))
        except Exception as error:  # no connection, no such file, full disk: dozens of types in three packages
            raise _NotDownloaded(
                f"cannot download {file} of {self._hub_id}: {_reason(error)}; "
                "connect to the Hub or use an .npz file"
            ) from error


def load_voice(
    voice: str | Path | Mapping[str, Any] | Voice | Audio | None, library: VoiceLibrary
) -> Voice | None:
    """Whatever a caller may mean by a voice, checked; None stays None.

    voice: a name in `library`; the path of an .npz (a str is one if it ends so); a mapping with the keys
    semantic_prompt, coarse_prompt and fine_prompt (numpy arrays, torch tensors or lists); a Voice; an Audio
    with tokens. Raises InvalidVoice for anything else and for anything that `check_voice` refuses.
    """
    if voice is None:
        return None
    if isinstance(voice, Voice):
        arrays = dict(zip(KEYS, (voice.semantic, voice.coarse, voice.fine), strict=True))
        return check_voice(arrays, voice.name, library.layout)
    if isinstance(voice, Audio):
        if voice.tokens is None:
            raise InvalidVoice("the audio given as voice has no tokens; give audio that bark_fast generated")
        tokens = voice.tokens
        arrays = dict(zip(KEYS, (tokens.semantic, tokens.coarse, tokens.fine), strict=True))
        return check_voice(arrays, "audio", library.layout)
    if isinstance(voice, Mapping):
        return check_voice(voice, "mapping", library.layout)
    if isinstance(voice, Path) or (isinstance(voice, str) and voice.endswith(".npz")):
        return _read_npz(Path(voice), str(voice), library.layout)
    if isinstance(voice, str):
        return library.get(voice)
    raise InvalidVoice(
        f"voice is a {type(voice).__name__}; give a name, an .npz path, a dict with {', '.join(KEYS)}, "
        "a Voice or an Audio"
    )


def check_voice(arrays: Mapping[str, Any], name: str, layout: Layout) -> Voice:
    """The voice in `arrays`, as int64, if it passes what suno's `generate_*` functions assert.

    Integers of any width, or whole numbers in float32 or float64; semantic (n,), coarse (2, m), fine (8, k),
    none empty; ids in their vocabularies; m/n is 1.5 when rounded to one decimal. Raises InvalidVoice.
    """
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise InvalidVoice(
            f"voice {_short(name)} has no {' and no '.join(missing)}; it needs {', '.join(KEYS)}"
        )
    rows_and_ids = (
        (None, layout.semantic_vocab_size),
        (layout.n_coarse_codebooks, layout.codebook_size),
        (layout.n_fine_codebooks, layout.codebook_size),
    )
    semantic, coarse, fine = (
        _check_array(arrays, key, rows, ids, _short(name))
        for key, (rows, ids) in zip(KEYS, rows_and_ids, strict=True)
    )
    if not ratio_fits(coarse.shape[1], len(semantic), layout):
        raise InvalidVoice(
            f"voice {_short(name)} has {coarse.shape[1]} coarse frames to {len(semantic)} semantic tokens; "
            f"Bark needs {layout.coarse_rate_hz / layout.semantic_rate_hz:.1f} to 1: take both from one stretch"
        )
    return Voice(semantic, coarse, fine, name)


def _check_array(arrays: Mapping[str, Any], key: str, rows: int | None, ids: int, name: str) -> IntArray:
    """`arrays[key]` as (n,) int64, or (rows, n), with every value in [0, ids)."""
    where = f"{key} of voice {name}"
    try:
        value = arrays[key]
        if hasattr(value, "detach"):  # a torch tensor, perhaps on a GPU, perhaps with a gradient
            value = value.detach().cpu()
        array = np.asarray(value)
    except Exception as error:  # ragged lists, bfloat16 tensors, a damaged NpzFile
        raise InvalidVoice(f"{where} is not an array: {_reason(error)}; give an array of integers") from error
    shape = "(n,)" if rows is None else f"({rows}, n)"
    if array.ndim != (1 if rows is None else 2) or (rows is not None and array.shape[0] != rows):
        raise InvalidVoice(f"{where} has the shape {array.shape}; it must be {shape}")
    if not array.size:
        raise InvalidVoice(f"{where} is empty; it must be {shape} with at least one token")
    if array.dtype.kind == "f" and array.itemsize >= 4:  # suno's code takes them; half a float has no large ids
        whole = np.isfinite(array) & (array == np.trunc(array))
        if not whole.all():
            raise InvalidVoice(f"{where} has the value {array[~whole][0]}; it must be of whole numbers")
    elif array.dtype.kind not in "iu":
        raise InvalidVoice(
            f"{where} is of {array.dtype}; it must be of integers: cast it with .astype(np.int64)"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= ids:
        raise InvalidVoice(f"{where} has the value {low if low < 0 else high}; it must be from 0 to {ids - 1}")
    return array.astype(np.int64)


def _installed_prompts() -> list[Path]:
    """The prompts folder of suno's package, found without importing it (that would import torch)."""
    try:
        spec = importlib.util.find_spec("bark")
    except ValueError:  # a stand-in without __spec__ in sys.modules
        return []
    locations = (spec.submodule_search_locations if spec else None) or []
    # PyPI's `bark` is another package: then there is no such folder, and nothing is found in it.
    return [Path(location) / "assets" / "prompts" for location in locations]


def _read_index(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> key -> what the index gives as the path relative to it; InvalidVoice if it is damaged."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return {name: dict(files) for name, files in index.items() if name != "repo_or_path"}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidVoice(f"cannot read {path}: {_reason(error)}; download it again") from error


def _entry(path: Path, index: dict[str, dict[str, Any]], name: str) -> dict[str, str]:
    """Key -> path of one voice, empty if it is not in the index; InvalidVoice if a path leads elsewhere.

    Entries that nobody asks for may be as they like: transformers does not look at them either.
    """
    if name not in index:
        return {}
    found = {}
    for key in KEYS:
        file = index[name].get(key)
        # By its text alone: files in the Hub's cache are symbolic links to outside the folder.
        if not isinstance(file, str) or not file or "\0" in file:
            raise InvalidVoice(f"{path} gives {_short(file)} as {key} of {_short(name)}; it must be a path")
        found[key] = file.replace("\\", "/")  # written on Windows, perhaps
        parts = PurePosixPath(found[key])
        if parts.is_absolute() or PureWindowsPath(file).drive or ".." in parts.parts:
            raise InvalidVoice(f"{path} leads to {_short(file)}; voices must lie beside the index")
    return found


def _sound_names(path: Path) -> dict[str, dict[str, str]]:
    """The index's entries that can be looked up."""
    index, found = _read_index(path), {}
    for name in index:
        with suppress(InvalidVoice):
            found[name] = _entry(path, index, name)
    return found


def _read_npz(path: Path, name: str, layout: Layout) -> Voice:
    if path.suffix != ".npz":
        raise InvalidVoice(f"voice file is {_short(str(path))}; it must be an .npz. {_HOW_TO_LIST}")
    with suppress(RuntimeError):  # ~nobody/: there is no such user, so the file will not be there either
        path = path.expanduser()
    if not _is_file(path):
        raise InvalidVoice(
            f"there is no voice file {_short(str(path))}; check the path, or give a name without .npz"
        )
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for key in KEYS:
                if f"{key}.npy" in archive.namelist():
                    with archive.open(f"{key}.npy") as file:
                        size = archive.getinfo(f"{key}.npy").file_size
                        arrays[key] = _parse_npy(file, size, f"{key} in {path}")
    except InvalidVoice:
        raise
    except Exception as error:  # zipfile and zlib raise a dozen types on damaged archives
        raise InvalidVoice(f"cannot read {path}: {_reason(error)}; save the voice again") from error
    return check_voice(arrays, name, layout)


def _read_npy(path: Path) -> npt.NDArray[Any]:
    try:
        with path.open("rb") as file:
            return _parse_npy(file, path.stat().st_size, str(path))
    except InvalidVoice:
        raise
    except Exception as error:
        raise InvalidVoice(f"cannot read {path}: {_reason(error)}; download it again") from error


def _parse_npy(file: IO[bytes], size: int, where: str) -> npt.NDArray[Any]:
    """An array in .npy format of `size` bytes. np.load allocates what the header claims before it looks."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise InvalidVoice(f"{where} is of .npy version {version}; save it again with np.save")
    if dtype.kind not in "biufc":
        raise InvalidVoice(f"{where} is of {dtype}; it must be of integers: cast it with .astype(np.int64)")
    claimed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or claimed > min(size, MAX_ARRAY_BYTES):
        raise InvalidVoice(
            f"{where} claims the shape {shape}, {claimed} bytes, in a file of {size}; it must fit the file and "
            f"{MAX_ARRAY_BYTES} bytes: save it again"
        )
    return np.frombuffer(file.read(claimed), dtype=dtype).reshape(shape, order="F" if fortran_order else "C")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, a null byte
        return False


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
