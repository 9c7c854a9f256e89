"""Checking weights and bringing them to their device and dtype, slice by slice, out of mapped files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from bark_fast.checkpoint.files import MappedPages
from bark_fast.checkpoint.names import Shape, decoder_convs, gpt_shapes, lstm_shapes, tied
from bark_fast.config import CodecConfig, GPTConfig
from bark_fast.errors import CheckpointError

SLICE_BYTES = 16 << 20
Report = Callable[[int], object]
_AGAIN = "download the checkpoint again"


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def check_names(found: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """CheckpointError unless exactly the `wanted` parameters are there."""
    found, wanted = set(found), set(wanted)
    if missing := wanted - found:
        raise CheckpointError(f"{where} lacks {len(missing)} parameter(s): {_some(missing)}; {_AGAIN}")
    if extra := found - wanted:
        raise CheckpointError(
            f"{where} has {len(extra)} parameter(s) its configuration has no place for: {_some(extra)}; "
            "take configuration and weights from the same checkpoint"
        )


def check_shape(tensor: torch.Tensor, shape: Shape, name: str, where: str) -> None:
    """CheckpointError unless `tensor` is floating and of `shape`."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{where}: {name} has shape {tuple(tensor.shape)}; the configuration asks for {shape}: "
            "take configuration and weights from the same checkpoint"
        )
    if not tensor.is_floating_point():
        raise CheckpointError(f"{where}: {name} has dtype {tensor.dtype}; a floating dtype is wanted; {_AGAIN}")


@dataclass(frozen=True)
class Mover:
    """Copies file tensors to `device`; holds what every copy needs."""

    device: torch.device
    pages: MappedPages
    report: Report

    def move(self, tensor: torch.Tensor, dtype: torch.dtype, name: str, where: str) -> torch.Tensor:
        """A copy of `tensor` on the device in `dtype`. Raises CheckpointError where a value is not finite.

        Goes in slices along the first dimension and returns each slice's file pages, so that the resident
        memory holds the result and one slice.
        """
        out = torch.empty(tensor.shape, dtype=dtype, device=self.device)
        row_bytes = max(1, tensor[:1].numel() * tensor.element_size())
        rows = max(1, SLICE_BYTES // row_bytes)
        for start in range(0, tensor.shape[0], rows):
            part, target = tensor[start : start + rows], out[start : start + rows]
            # convert before the transfer: half the bytes cross the bus
            converted = target.copy_(part) if self.device.type == "cpu" else part.to(dtype)
            check_finite(converted, part, name, where)
            if self.device.type != "cpu":
                target.copy_(converted)
            self.pages.drop(part)
            self.report(part.numel() * part.element_size())
        return out


def check_finite(converted: torch.Tensor, original: torch.Tensor, name: str, where: str) -> None:
    """CheckpointError where `converted` is not finite, saying whether the file or the dtype is at fault."""
    # A sum is finite only if all its terms are, and takes one pass; finite terms may overflow it, though.
    if math.isfinite(converted.sum().item()) or bool(torch.isfinite(converted).all()):
        return
    if not bool(torch.isfinite(original).all()):
        raise CheckpointError(f"{where}: {name} holds NaN or infinite values; {_AGAIN}")
    raise CheckpointError(
        f"{where}: {name} reaches {original.abs().max().item():.3g}; "
        f"{converted.dtype} ends at {torch.finfo(converted.dtype).max:.3g}: choose float32 or bfloat16"
    )


def move_gpt(
    raw: Mapping[str, torch.Tensor],
    config: GPTConfig,
    theirs: Callable[[str], str],
    dtype: torch.dtype,
    mover: Mover,
    where: str,
    tie: bool = True,
) -> dict[str, torch.Tensor]:
    """The weights of one transformer under our names. `theirs` turns our name into the file's.

    With `tie`, a fine head and its embedding are one tensor; the file may hold either name or both, equal.
    """
    shapes = gpt_shapes(config)
    source: dict[str, str] = {name: theirs(name) for name in shapes}
    partners = {name: partner for name in shapes if tie and (partner := tied(name))}
    for head, embedding in partners.items():
        if source[embedding] not in raw and source[head] in raw:
            source[embedding] = source[head]
        elif source[head] not in raw:
            source[head] = source[embedding]
    check_names(raw, source.values(), where)
    for name, shape in shapes.items():
        check_shape(raw[source[name]], shape, source[name], where)
    weights: dict[str, torch.Tensor] = {}
    for name in shapes:
        if partner := partners.get(name):
            _check_tied(raw, source[name], source[partner], where)
            weights[name] = weights[partner]
        else:
            weights[name] = mover.move(raw[source[name]], dtype, source[name], where)
    return weights


def _check_tied(raw: Mapping[str, torch.Tensor], head: str, embedding: str, where: str) -> None:
    one, other = raw[head], raw[embedding]
    if one.shape != other.shape or (one.data_ptr() != other.data_ptr() and not torch.equal(one, other)):
        raise CheckpointError(
            f"{where}: {head} and {embedding} differ; Bark shares one weight between them: {_AGAIN}, or, if "
            f"they are meant to differ, set tie_word_embeddings to false in config.json's fine_acoustics_config"
        )


def codec_sources(config: CodecConfig, hf: bool) -> dict[str, Shape]:
    """File names (weight norm as `weight_g`, `weight_v`) and shapes of what the codec's decoder needs."""
    shapes: dict[str, Shape] = {}
    for conv in decoder_convs(config):
        name = conv.hf_name() if hf else conv.suno_name()
        shapes[f"{name}.weight_g"] = (conv.shape[0], 1, 1)
        shapes[f"{name}.weight_v"] = conv.shape
        shapes[f"{name}.bias"] = (conv.bias,)
    for name, shape in lstm_shapes(config).items():
        shapes[f"codec_model.decoder.layers.1.lstm.{name}" if hf else f"decoder.model.1.lstm.{name}"] = shape
    for q in range(config.num_codebooks):
        shapes[_codebook(q, hf)] = (config.codebook_size, config.hidden_size)
    return shapes


def _codebook(q: int, hf: bool) -> str:
    if hf:
        return f"codec_model.quantizer.layers.{q}.codebook.embed"
    return f"quantizer.vq.layers.{q}._codebook.embed"


def move_codec(
    raw: Mapping[str, torch.Tensor], config: CodecConfig, hf: bool, mover: Mover, where: str
) -> dict[str, torch.Tensor]:
    """The codec's decoder under our names in float32, weight norm folded: w = g * v / ||v|| per first index."""
    shapes = codec_sources(config, hf)
    prefix = "codec_model." if hf else ""
    # the encoder and the quantizers' training statistics are of no use for decoding
    unused = (f"{prefix}encoder.", f"{prefix}quantizer.")
    check_names((name for name in raw if name in shapes or not name.startswith(unused)), shapes, where)
    for name, shape in shapes.items():
        check_shape(raw[name], shape, name, where)
    host = Mover(torch.device("cpu"), mover.pages, mover.report)

    def read(name: str) -> torch.Tensor:
        return host.move(raw[name], torch.float32, name, where)

    weights = {"codebooks": torch.stack([read(_codebook(q, hf)) for q in range(config.num_codebooks)])}
    for conv in decoder_convs(config):
        name = conv.hf_name() if hf else conv.suno_name()
        # the operator that torch.nn.utils.weight_norm calls: the same bits as both reference implementations
        folded = torch._weight_norm(read(f"{name}.weight_v"), read(f"{name}.weight_g"), 0)
        check_finite(folded, folded, f"{name}.weight_v", where)
        weights[f"{conv.ours}.weight"] = folded
        weights[f"{conv.ours}.bias"] = read(f"{name}.bias")
    lstm = "codec_model.decoder.layers.1.lstm." if hf else "decoder.model.1.lstm."
    for name in lstm_shapes(config):
        weights[f"lstm.{name}"] = read(lstm + name)
    return {name: weight.to(mover.device) for name, weight in weights.items()}
