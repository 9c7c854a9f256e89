"""Reading suno's own files: text.pt, coarse.pt, fine.pt (or *_2.pt, the large ones) and EnCodec's weights.

Sources of the format: suno `generation.py` (`_load_model`) and `model.py`, encodec `model.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from bark_fast.checkpoint import hub
from bark_fast.checkpoint.files import open_torch, tensors_of
from bark_fast.checkpoint.opened import Opened, canonical_codec_name
from bark_fast.config import BarkConfig, FineConfig, GPTConfig, ModelName
from bark_fast.errors import CheckpointError, InvalidInput
from bark_fast.sampling import suno_defaults

ENCODEC_FILE = "encodec_24khz-d7cc33bc.th"
LARGE_FILES: dict[ModelName, str] = {"semantic": "text_2.pt", "coarse": "coarse_2.pt", "fine": "fine_2.pt"}
SMALL_FILES: dict[ModelName, str] = {"semantic": "text.pt", "coarse": "coarse.pt", "fine": "fine.pt"}


def cache_folder() -> Path:
    """Where suno's `bark` keeps its downloads: $XDG_CACHE_HOME/suno/bark_v0, by default under ~/.cache."""
    # Path.expanduser raises where there is no home; this leaves the ~
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(base) / "suno" / "bark_v0"


def holds_suno_files(folder: Path) -> bool:
    """Whether `folder` has any of suno's six transformer files."""
    return any((folder / name).is_file() for name in (*LARGE_FILES.values(), *SMALL_FILES.values()))


def model_files(folder: Path) -> dict[ModelName, Path]:
    """The three transformer files: the large ones if all are there, else the small ones, else of either size.

    With SUNO_USE_SMALL_MODELS=True, which suno's package reads too, the small ones come first.
    """
    small_first = os.environ.get("SUNO_USE_SMALL_MODELS", "").lower() in ("true", "1", "t")
    order = (SMALL_FILES, LARGE_FILES) if small_first else (LARGE_FILES, SMALL_FILES)
    there = [{m: folder / n for m, n in names.items() if (folder / n).is_file()} for names in order]
    for found in (*there, {**there[1], **there[0]}):
        if len(found) == len(LARGE_FILES):
            return {model: found[model] for model in LARGE_FILES}
    # report what the more complete size lacks
    sizes = [[n for n in names.values() if not (folder / n).is_file()] for names in (LARGE_FILES, SMALL_FILES)]
    lacking = min(sizes, key=len)
    raise CheckpointError(
        f"{folder} lacks {', '.join(lacking)}; download it from huggingface.co/suno/bark into that folder"
    )


def _is_cache(folder: Path) -> bool:
    return folder.resolve() == cache_folder().resolve()


def _encodec_file(folder: Path, progress: bool) -> Path:
    """EnCodec's weights: in the folder, or for suno's cache, which has none, where encodec keeps them."""
    if (folder / ENCODEC_FILE).is_file():
        return folder / ENCODEC_FILE
    if _is_cache(folder):
        return hub.fetch_encodec(ENCODEC_FILE, progress)
    raise CheckpointError(f"{folder} lacks {ENCODEC_FILE}; download it from {hub.ENCODEC_URL}{ENCODEC_FILE}")


def _tokenizer_file(folder: Path) -> Path:
    for name in ("vocab.txt", "tokenizer.json"):
        if (folder / name).is_file():
            return folder / name
    if _is_cache(folder):
        return hub.fetch_vocabulary()
    raise CheckpointError(
        f"{folder} lacks vocab.txt; download it from huggingface.co/suno/bark into that folder"
    )


def _gpt_config(args: dict[str, Any], fine: bool) -> GPTConfig:
    """The configuration in a file's `model_args`; defaults are those of suno's `GPTConfig`."""
    both = args.get("vocab_size", 10_048)  # old files name one vocabulary for both sides
    shared: dict[str, Any] = {
        "n_layer": args.get("n_layer", 12),
        "n_head": args.get("n_head", 12),
        "n_embd": args.get("n_embd", 768),
        "input_vocab_size": args.get("input_vocab_size", both),
        "output_vocab_size": args.get("output_vocab_size", both),
        "block_size": args.get("block_size", 1024),
        "bias": bool(args.get("bias", True)),
    }
    if not fine:
        return GPTConfig(**shared)
    return FineConfig(
        **shared, n_codes_total=args.get("n_codes_total", 8), n_codes_given=args.get("n_codes_given", 1)
    )


def _open_model(path: Path, fine: bool) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    content = open_torch(path)
    for key in ("model", "model_args"):
        if not isinstance(content.get(key), dict):
            raise CheckpointError(f"{path} has no {key!r}, so it is not one of suno's files; download it again")
    try:
        config = _gpt_config(content["model_args"], fine)
    except (InvalidInput, TypeError) as error:
        raise CheckpointError(f"{path}: {error}; download it again") from None
    tensors = tensors_of(content["model"], path)
    # torch.compile's prefix; the causal mask some versions of suno's code saved
    named = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    return config, {name: tensor for name, tensor in named.items() if not name.endswith(".attn.bias")}


def open_suno(folder: Path, progress: bool = False) -> Opened:
    """Open the suno checkpoint in `folder`. Raises CheckpointError."""
    files = model_files(folder)
    codec, tokenizer = _encodec_file(folder, progress), _tokenizer_file(folder)
    raw: dict[ModelName, dict[str, torch.Tensor]] = {}
    semantic, raw["semantic"] = _open_model(files["semantic"], fine=False)
    coarse, raw["coarse"] = _open_model(files["coarse"], fine=False)
    fine, raw["fine"] = _open_model(files["fine"], fine=True)
    assert isinstance(fine, FineConfig)
    raw["codec"] = {
        canonical_codec_name(name): tensor for name, tensor in tensors_of(open_torch(codec), codec).items()
    }
    try:
        config = BarkConfig(semantic=semantic, coarse=coarse, fine=fine)
    except InvalidInput as error:
        raise CheckpointError(f"{folder}: {error}; download the three files from one place") from None
    files["codec"] = codec
    return Opened(
        folder=folder,
        format="suno",
        config=config,
        defaults=suno_defaults(),
        tokenizer_file=tokenizer,
        speaker_embeddings=None,
        raw=raw,
        where={model: str(path) for model, path in files.items()},
        files=tuple(files.values()),
    )
