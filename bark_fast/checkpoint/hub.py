"""Files that are not in a local folder: the Hugging Face hub, and EnCodec's weights from their own site."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import torch

from bark_fast.bars import hidden_hub_bar
from bark_fast.checkpoint.hf import is_complete
from bark_fast.errors import CheckpointError, HubUnreachable

ENCODEC_URL = "https://dl.fbaipublicfiles.com/encodec/v0/"
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.txt", "speaker_embeddings_path.json",
)  # fmt: skip
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
_BIN = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_VOCABULARY_REPOS = ("suno/bark", "suno/bark-small", "bert-base-multilingual-cased",
                     "google-bert/bert-base-multilingual-cased")  # fmt: skip
_REMEDY = "name a local folder, or write random weights with `bark-fast make-checkpoint`"


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form `owner/name` of a hub id."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160].rstrip('.')}" if lines else type(error).__name__


def _translate(error: Exception, what: str) -> CheckpointError:
    """`error` of a download as one of ours: what is wrong here or with the name, or an unreachable site."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachable(f"{what} is not cached and HF_HUB_OFFLINE is set; unset it, {_REMEDY}")
    if isinstance(error, GatedRepoError):
        return CheckpointError(f"{what} needs its licence accepted on huggingface.co and `hf auth login`")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return CheckpointError(
            f"{what} is not on the Hugging Face hub, or is private (then `hf auth login`), nor is there such a "
            f"folder here; published are suno/bark and suno/bark-small"
        )
    if isinstance(error, HfHubHTTPError) and (status := error.response.status_code) < 500:
        remedy = {401: "run `hf auth login`, or unset HF_TOKEN", 403: "run `hf auth login` with an account "
                  "that may read it", 429: "try again later"}  # fmt: skip
        return CheckpointError(
            f"{what}: the hub answered {status} ({_reason(error)}); {remedy.get(status, _REMEDY)}"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS):
        return CheckpointError(f"{what} cannot be stored ({error.strerror}); set HF_HOME to a folder with room")
    return HubUnreachable(
        f"{what} is not cached and the site cannot be reached ({_reason(error)}); "
        f"set HTTPS_PROXY if there is a proxy, {_REMEDY}"
    )


def _file_names(repo: str, revision: str | None = None) -> list[str]:
    """Files of hub model `repo`, in one request: the client's downloads retry for half a minute."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision, timeout=15)
    return [sibling.rfilename for sibling in info.siblings or []]


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The hub cache's folder of `repo`, when everything needed is in it."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=["config.json"], local_files_only=True)
        )
    except Exception:  # not cached, or not even the configuration
        return None
    return folder if is_complete(folder) else None


def fetch_repo(repo: str, progress: bool = False, revision: str | None = None) -> Path:
    """The local folder of hub model `repo`: cached, else downloaded; safetensors where there are any.

    revision: a branch, tag or commit; None for the main branch.

    Never fetches suno's own .pt files nor the speaker embeddings that lie in the same repository.
    """
    from huggingface_hub import snapshot_download

    try:
        if folder := _cached_snapshot(repo, revision):
            return folder
        names = _file_names(repo, revision)
        safe = any(name.startswith("model") and name.endswith(".safetensors") for name in names)
        patterns = [*_SMALL_FILES, *(_SAFETENSORS if safe else _BIN)]
        bar = {} if progress else hidden_hub_bar(snapshot_download)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, **bar))
    except Exception as error:  # the hub's client raises its HTTP library's own errors too
        raise _translate(error, repo if revision is None else f"revision {revision!r} of {repo}") from None


def fetch_vocabulary() -> Path:
    """vocab.txt of Bark's tokenizer (multilingual BERT's), cached or downloaded from suno/bark."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    for repo in _VOCABULARY_REPOS:
        cached = try_to_load_from_cache(repo, "vocab.txt")
        if isinstance(cached, str):
            return Path(cached)
    try:
        _file_names("suno/bark")
        return Path(hf_hub_download("suno/bark", "vocab.txt", **hidden_hub_bar(hf_hub_download)))
    except Exception as error:
        what = "vocab.txt (looked for beside the model files; from huggingface.co/suno/bark)"
        raise _translate(error, what) from None


def fetch_encodec(name: str, progress: bool = False) -> Path:
    """EnCodec's weights from torch hub's cache, downloaded there when missing; the name carries the hash."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = name.removesuffix(".th").rpartition("-")[2]
        torch.hub.download_url_to_file(ENCODEC_URL + name, str(path), hash_prefix=digest, progress=progress)
    except Exception as error:
        what = f"{name} (looked for beside the model files and as {path}; from {ENCODEC_URL}{name})"
        raise _translate(error, what) from None
    return path
