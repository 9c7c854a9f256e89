"""Finding a checkpoint, checking it and bringing its weights to a device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from bark_fast.bars import make_bar
from bark_fast.checkpoint import hub
from bark_fast.checkpoint.files import MappedPages
from bark_fast.checkpoint.hf import holds_hf_weights, open_hf
from bark_fast.checkpoint.names import hf_name, suno_name
from bark_fast.checkpoint.opened import Opened
from bark_fast.checkpoint.suno import cache_folder, holds_suno_files, open_suno
from bark_fast.checkpoint.transfer import Mover, Report, codec_sources, move_codec, move_gpt
from bark_fast.config import BarkConfig, ModelName
from bark_fast.errors import CheckpointError, InvalidInput
from bark_fast.sampling import StageDefaults

ALL_MODELS: tuple[ModelName, ...] = get_args(ModelName)
_REMEDY = "name a folder with a Bark checkpoint, `suno`, or a hub id such as suno/bark-small"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    source: what the caller named. hub_id: the same if it is a repository. folder: where its files lie.
    format: decides the sampling dialect.
    weights: for each model our parameter names (see `checkpoint.names`) and tensors on the asked device; the
    transformers in the asked dtype, the codec in float32 with weight norm folded and `codebooks` of shape
    (codebooks, codes, hidden). tokenizer_file: vocab.txt or tokenizer.json. speaker_embeddings:
    speaker_embeddings_path.json, when there is one.
    """

    source: str
    hub_id: str | None
    folder: Path | None
    format: Literal["suno", "hf"]
    config: BarkConfig
    defaults: StageDefaults
    weights: dict[ModelName, dict[str, torch.Tensor]]
    tokenizer_file: Path
    speaker_embeddings: Path | None


def find_folder(source: str | Path, progress: bool = False, revision: str | None = None) -> Path:
    """The local folder that `source` names; a hub id is downloaded unless cached.

    revision: of a hub id, else InvalidInput. Raises CheckpointError.
    """
    folder = _local_folder(source)
    if folder is None:
        return hub.fetch_repo(str(source), progress, revision)
    if revision is not None:
        raise InvalidInput(
            f"revision is {revision!r}, but {folder} is a local folder; leave it out, or name a hub id"
        )
    return folder


def _local_folder(source: str | Path) -> Path | None:
    """None for a hub id."""
    if source == "":  # an unset variable, perhaps; as a path it would be the current folder
        raise CheckpointError(f"'' names no checkpoint (it is empty); {_REMEDY}")
    if source == "suno" and isinstance(source, str):
        folder = cache_folder()
        if not folder.is_dir():
            raise CheckpointError(f"{folder}, the cache of suno's bark, does not exist; {_REMEDY}")
        return folder
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise CheckpointError(f"{path} is a file; name the folder that holds it")
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # too long a name, no such user, no path
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{str(source)[:200]!r} names no checkpoint ({reason}); {_REMEDY}") from None
    if isinstance(source, str) and hub.is_hub_id(source):
        return None
    raise CheckpointError(f"{path} does not exist; {_REMEDY}")


def open_folder(folder: Path, progress: bool = False) -> Opened:
    """Open the checkpoint in `folder`, in whichever format it is; Hugging Face's where both are there."""
    try:
        if holds_hf_weights(folder):
            return open_hf(folder)
        if holds_suno_files(folder):
            return open_suno(folder, progress)
        if (folder / "config.json").is_file():
            return open_hf(folder)  # says which weights it looked for
        if not any(folder.iterdir()):
            raise CheckpointError(f"{folder} is empty; {_REMEDY}")
    except PermissionError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror}); change its permissions") from None
    raise CheckpointError(f"{folder} has neither config.json nor suno's text.pt or text_2.pt; {_REMEDY}")


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Report]:
    """One bar on stderr that counts file bytes, or nothing."""
    if not shown:
        yield lambda amount: None
        return
    with make_bar(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="loading weights") as bar:
        yield bar.update


def _bytes_to_read(opened: Opened, models: Collection[ModelName]) -> int:
    decoder = codec_sources(opened.config.codec, opened.format == "hf")
    sizes: dict[int, int] = {}  # by address: tied weights are read once
    for model in models:
        for name, tensor in opened.raw[model].items():
            if model != "codec" or name in decoder:
                sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def load_checkpoint(
    source: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = False,
    models: Collection[ModelName] = ALL_MODELS,
    revision: str | None = None,
) -> Checkpoint:
    """Load the checkpoint `source`: a folder in suno's or Hugging Face's format, "suno" for suno's own cache
    folder, or a hub id.

    Weights go from memory-mapped files straight to `device` in `dtype` (the codec stays in float32), so host
    memory holds little more than the result. `models` limits which weights are loaded; the configuration is
    complete either way. `revision` is a hub id's branch, tag or commit. `progress` shows bars of downloads and
    loading on stderr. Raises CheckpointError for a checkpoint that is missing, damaged, not finite or not
    Bark's (HubUnreachable when the hub cannot be asked), InvalidInput for a dtype or model name that makes no
    sense, or the revision of a folder.
    """
    if not dtype.is_floating_point:
        raise InvalidInput(f"dtype is {dtype}; choose torch.float32, torch.bfloat16 or torch.float16")
    if unknown := set(models) - set(ALL_MODELS):
        raise InvalidInput(
            f"models has {', '.join(sorted(map(repr, unknown)))}; choose from {', '.join(ALL_MODELS)}"
        )
    opened = open_folder(find_folder(source, progress, revision), progress)
    hf = opened.format == "hf"
    weights: dict[ModelName, dict[str, torch.Tensor]] = {}
    with _progress(_bytes_to_read(opened, models), progress) as report:
        mover = Mover(device, MappedPages(opened.files), report)
        for model in ALL_MODELS:
            raw, where = opened.raw[model], opened.where[model]
            if model not in models:
                continue
            if model == "codec":
                weights[model] = move_codec(raw, opened.config.codec, hf, mover, where)
                continue
            theirs: Callable[[str], str] = partial(hf_name, model) if hf else suno_name
            weights[model] = move_gpt(
                raw, getattr(opened.config, model), theirs, dtype, mover, where, opened.tie
            )
    return Checkpoint(
        source=str(source),
        hub_id=None if source == "suno" or Path(source).expanduser().exists() else str(source),
        folder=opened.folder,
        format=opened.format,
        config=opened.config,
        defaults=opened.defaults,
        weights=weights,
        tokenizer_file=opened.tokenizer_file,
        speaker_embeddings=opened.speaker_embeddings,
    )
