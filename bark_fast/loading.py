"""From a checkpoint to a runner: where each model goes, and how much its caches may take."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from bark_fast.checkpoint import Checkpoint, load_checkpoint
from bark_fast.config import ModelName
from bark_fast.device import pick_device
from bark_fast.engine.graph_runner import GraphRunner
from bark_fast.engine.memory import context_bytes, storage_bytes
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.speculative_runner import SpeculativeRunner
from bark_fast.errors import InvalidInput, is_of_memory, shortage
from bark_fast.modules.codec import Codec
from bark_fast.modules.draft import DraftGPT
from bark_fast.modules.fine import FineGPT
from bark_fast.modules.gpt import GPT
from bark_fast.ops.dispatch import preferred
from bark_fast.ops.gpus import number_of, triton_fault

MODELS: tuple[ModelName, ...] = get_args(ModelName)


def load_models(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    devices: Mapping[str, str | int | torch.device] | None,
    offload: bool,
    progress: bool,
    revision: str | None = None,
) -> Checkpoint:
    """Load the models named in `devices` there, the others on `device`; all on the host to be offloaded."""
    if devices is not None and not isinstance(devices, Mapping):
        raise InvalidInput(
            f"devices is {devices!r}; give a dict from {', '.join(MODELS)} to a device, or replicas for copies "
            f"of the whole model"
        )
    named = dict(devices or {})
    if unknown := named.keys() - set(MODELS):
        raise InvalidInput(
            f"devices has {', '.join(sorted(map(repr, unknown)))}; choose from {', '.join(MODELS)}"
        )
    if offload and named:
        raise InvalidInput(
            "offload=True brings one model at a time to one device; leave devices out, or offload"
        )
    places: dict[torch.device, list[ModelName]] = {}
    for model in MODELS:
        where = torch.device("cpu") if offload else pick_device(named[model]) if model in named else device
        places.setdefault(where, []).append(model)
    with _memory_for("the weights", "choose a smaller dtype or checkpoint, or offload=True"):
        parts = [
            load_checkpoint(
                source, device=where, dtype=dtype, models=models, progress=progress, revision=revision
            )
            for where, models in places.items()
        ]
    return replace(
        parts[0], weights={name: weights for part in parts for name, weights in part.weights.items()}
    )


@contextmanager
def _memory_for(what: str, remedy: str) -> Iterator[None]:
    """Say for what there was no memory, and what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's, of a CPU or a GPU, and numpy's
        if not is_of_memory(error):
            raise
        raise InvalidInput(f"there is no memory for {what} ({shortage(error)}); {remedy}") from error


def copied_to(checkpoint: Checkpoint, device: torch.device) -> Checkpoint:
    """The same weights on `device`: tied ones stay tied, and those that are there already are shared."""
    moved: dict[int, torch.Tensor] = {}
    weights: dict[ModelName, dict[str, torch.Tensor]] = {model: {} for model in checkpoint.weights}
    with _memory_for(f"the weights of a replica on {device}", "choose fewer, or a smaller dtype or checkpoint"):
        for model, tensors in checkpoint.weights.items():
            for name, tensor in tensors.items():
                if tensor.data_ptr() not in moved:
                    moved[tensor.data_ptr()] = tensor.to(device)
                weights[model][name] = moved[tensor.data_ptr()]
    return replace(checkpoint, weights=weights)


def make_runner(
    checkpoint: Checkpoint,
    device: torch.device,
    max_batch: int,
    max_memory: int | None,
    offload: bool,
    speculative: bool = True,
) -> EagerRunner:
    """The models with their weights, and caches for `max_batch` utterances, or within `max_memory`.

    speculative: with draft models where they help and, beside one utterance's caches, fit.
    """
    config, weights = checkpoint.config, checkpoint.weights
    with torch.device("meta"):
        semantic, coarse = GPT(config.semantic), GPT(config.coarse)
        fine, codec = FineGPT(config.fine), Codec(config.codec)
    room = None if max_memory is None else _room_for_caches(checkpoint, max_memory, offload)
    drafts = speculative and not offload and _leaves_room_for_drafts(checkpoint, room)
    decoding = [weight for name in ("semantic", "coarse") for weight in weights[name].values()]
    fastest = next((weight.device for weight in decoding if weight.is_cuda), device)
    with _memory_for("Triton's kernels", "choose a smaller dtype or checkpoint, or offload=True"):
        kind = runner_kind(device if offload else fastest, decoding[0].dtype, drafts)
    if kind is SpeculativeRunner and room is not None:
        room -= _draft_bytes(checkpoint)
    modules: dict[ModelName, nn.Module] = {"semantic": semantic, "coarse": coarse, "fine": fine, "codec": codec}
    for name, module in modules.items():
        module.load_state_dict(weights[name], assign=True)  # it was built without
        module.requires_grad_(False).eval()
    caches = f"the caches of max_batch={max_batch} utterances"
    with _memory_for(caches, "choose a smaller max_batch, max_memory, dtype or checkpoint"):
        runner = kind(semantic, coarse, fine, codec, max_batch, room, device if offload else None)
    if not offload:
        codec.lstm.flatten_parameters()
    for gpu in {place for place in runner.devices.values() if place.type == "cuda"}:
        torch.cuda.current_stream(gpu).synchronize()  # the first step may be on another thread's stream
    return runner


def runner_kind(device: torch.device, dtype: torch.dtype, speculative: bool = False) -> type[EagerRunner]:
    """The runner for models that decode on `device` in `dtype`. Says so where a GPU gets the slow one.

    speculative: whether those on a CPU may have draft models.
    """
    if device.type != "cuda" or preferred() == "torch":
        return SpeculativeRunner if speculative else EagerRunner
    gpu = number_of(device)
    if fault := triton_fault(gpu, dtype):  # a step of sampling then needs the host: a burst would gain nothing
        warnings.warn(
            f"on cuda:{gpu} steps are launched one operation at a time by torch, without CUDA graphs, which is "
            f"slower: {fault}",
            RuntimeWarning,
            stacklevel=2,
        )
        return EagerRunner
    return GraphRunner


def _room_for_caches(checkpoint: Checkpoint, max_memory: int, offload: bool) -> int:
    """Bytes that `max_memory` leaves beside the weights; at least one utterance's."""
    sizes = [storage_bytes(tensors.values()) for tensors in checkpoint.weights.values()]
    taken = max(sizes) if offload else sum(sizes)
    one = _least_caches(checkpoint)
    if max_memory < taken + one:
        raise InvalidInput(
            f"max_memory is {max_memory} bytes; the weights take {taken} and the caches of one utterance "
            f"{one}: give at least {taken + one}, or choose a smaller dtype or checkpoint, or offload=True"
        )
    return max_memory - taken


def _least_caches(checkpoint: Checkpoint) -> int:
    """Bytes of one utterance's caches."""
    config, dtype = checkpoint.config, _decoding_dtype(checkpoint)
    return sum(context_bytes(gpt, dtype) for gpt in (config.semantic, config.coarse))


def _decoding_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return next(iter(checkpoint.weights["semantic"].values())).dtype


def _draft_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the draft models that a speculative runner will make."""
    config, dtype = checkpoint.config, _decoding_dtype(checkpoint)
    models = (config.semantic, config.coarse)
    return sum(DraftGPT.bytes_of(gpt) for gpt in models if SpeculativeRunner.gains_from_a_draft(gpt, dtype))


def _leaves_room_for_drafts(checkpoint: Checkpoint, room: int | None) -> bool:
    return room is None or room >= _draft_bytes(checkpoint) + _least_caches(checkpoint)
