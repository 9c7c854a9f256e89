"""A checkpoint whose files are open but whose weights have not moved yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bark_fast.config import BarkConfig, ModelName
from bark_fast.sampling import StageDefaults


@dataclass(frozen=True)
class Opened:
    """What the readers of both formats hand to the loader.

    raw: for each model the file's names and (mapped) tensors, of that model only. where: the file or folder to
    name in errors. files: every weight file. tie: fine heads share the embeddings' weights.
    """

    folder: Path
    format: Literal["suno", "hf"]
    config: BarkConfig
    defaults: StageDefaults
    tokenizer_file: Path
    speaker_embeddings: Path | None
    raw: dict[ModelName, dict[str, torch.Tensor]]
    where: dict[ModelName, str]
    files: tuple[Path, ...]
    tie: bool = True


def canonical_codec_name(name: str) -> str:
    """Weight norm's two parametrisations in torch, under the names of the older one."""
    return name.replace(".parametrizations.weight.original0", ".weight_g").replace(
        ".parametrizations.weight.original1", ".weight_v"
    )
