"""Writing complete checkpoints with random weights, in suno's and Hugging Face's formats.

They stand in for the published ones in tests and benchmarks: the same files, names and shapes, made from our
own shape tables without suno's, EnCodec's or Hugging Face's code.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from bark_fast.bars import make_bar
from bark_fast.checkpoint.names import Shape, gpt_shapes, hf_name, suno_name, tied
from bark_fast.checkpoint.random_weights import codec_weights, gpt_names, gpt_weight
from bark_fast.checkpoint.suno import ENCODEC_FILE, LARGE_FILES, SMALL_FILES
from bark_fast.checkpoint.wordpiece import tokenizer_files, vocabulary
from bark_fast.config import BarkConfig, CodecConfig, FineConfig, GPTConfig, ModelName, published_config
from bark_fast.errors import InvalidInput, OutputError
from bark_fast.numeric import is_whole

Size = Literal["tiny", "small", "large"]
Format = Literal["suno", "hf"]
Report = Callable[[int], object]
_TRANSFORMERS: tuple[ModelName, ...] = ("semantic", "coarse", "fine")


def make_checkpoint(
    folder: str | Path, size: Size, format: Format, seed: int = 0, progress: bool = False
) -> Path:
    """Write a random-weight checkpoint to `folder` and return that path.

    The weights depend on `size` and `seed` only, not on `format`. `folder` must not exist or be empty; it
    appears complete or not at all. `progress` shows a bar on stderr.
    Raises InvalidInput for an unknown size or format, OutputError where nothing can be written.
    """
    config = published_config(size)
    return write_checkpoint(folder, config, format, seed, progress=progress, large=size == "large")


def write_checkpoint(
    folder: str | Path,
    config: BarkConfig,
    format: Format,
    seed: int = 0,
    *,
    progress: bool = False,
    large: bool = False,
) -> Path:
    """`make_checkpoint` for any configuration; `large` picks suno's file names for large models."""
    if format not in get_args(Format):
        raise InvalidInput(f"format is {format!r}; choose one of {', '.join(get_args(Format))}")
    if not is_whole(seed):
        raise InvalidInput(f"seed is {seed!r}; it must be an integer")
    try:
        target = Path(folder).expanduser()
    except RuntimeError:
        raise OutputError(
            f"{folder} cannot be written (there is no such home); name a folder you may write to"
        ) from None
    with _atomically(target) as work, _progress(config, progress) as report:
        if format == "suno":
            _write_suno(work, config, seed, report, large)
        else:
            _write_hf(work, config, seed, report)
    return target


@contextmanager
def _atomically(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends well, and is removed otherwise."""
    try:
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target} is a file; name a folder that does not exist yet")
        if target.is_dir() and any(target.iterdir()):
            raise OutputError(f"{target} is not empty; name a folder that does not exist yet")
        within = target.is_dir()  # one that is there stays the one it is: a mount, a link, where one stands
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target if within else target.parent))
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written ({error.strerror}); name a folder you may write to"
        ) from None
    ours: list[Path] = []  # in a folder that was there
    try:
        yield work
        if within:
            for path in list(work.iterdir()):
                if (target / path.name).exists():
                    raise OutputError(f"{target / path.name} is there by now; name a folder that is empty")
                ours.append(target / path.name)
                path.replace(ours[-1])
            work.rmdir()
        else:
            mask = os.umask(0)
            os.umask(mask)
            work.chmod(0o777 & ~mask)  # mkdtemp's folders are private
            work.replace(target)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        shutil.rmtree(work, ignore_errors=True)
        for path in ours:
            path.unlink(missing_ok=True)
        # torch.save reports a full disk as RuntimeError; an OutputError is one of ours already
        if isinstance(error, OutputError) or not isinstance(error, (OSError, RuntimeError)):
            raise
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(
            f"{target} cannot be written ({reason}); free some space or name another folder"
        ) from None


@contextmanager
def _progress(config: BarkConfig, shown: bool) -> Iterator[Report]:
    if not shown:
        yield lambda amount: None
        return
    shapes = [shape for model in _TRANSFORMERS for shape in gpt_names(getattr(config, model)).values()]
    total = sum(map(_numel, shapes))
    with make_bar(total=4 * total, unit="B", unit_scale=True, unit_divisor=1024, desc="writing weights") as bar:
        yield bar.update


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _gpt_weights(
    config: BarkConfig, model: ModelName, seed: int, report: Report
) -> Iterator[tuple[str, torch.Tensor]]:
    gpt: GPTConfig = getattr(config, model)
    for name, shape in gpt_names(gpt).items():
        weight = gpt_weight(seed, model, name, shape, gpt)
        report(4 * weight.numel())
        yield name, weight


def _write_suno(folder: Path, config: BarkConfig, seed: int, report: Report, large: bool) -> None:
    for model, name in (LARGE_FILES if large else SMALL_FILES).items():
        _write_suno_model(folder / name, config, model, seed, report)  # one model in memory at a time
    torch.save(dict(codec_weights(seed, config.codec, hf=False)), folder / ENCODEC_FILE)
    _write_text(folder / "vocab.txt", "\n".join(vocabulary()) + "\n")


def _write_suno_model(path: Path, config: BarkConfig, model: ModelName, seed: int, report: Report) -> None:
    gpt: GPTConfig = getattr(config, model)
    weights = dict(_gpt_weights(config, model, seed, report))
    for name in gpt_shapes(gpt):
        if embedding := tied(name):
            weights[name] = weights[embedding]  # two names for one tensor
    args: dict[str, Any] = {
        "n_layer": gpt.n_layer, "n_head": gpt.n_head, "n_embd": gpt.n_embd, "block_size": gpt.block_size,
        "bias": gpt.bias, "dropout": 0.0,
        "input_vocab_size": gpt.input_vocab_size, "output_vocab_size": gpt.output_vocab_size,
    }  # fmt: skip
    if isinstance(gpt, FineConfig):
        args |= {"n_codes_total": gpt.n_codes_total, "n_codes_given": gpt.n_codes_given}
    state = {suno_name(name): weight for name, weight in weights.items()}
    # suno's loader calls .item() on the loss
    torch.save({"model": state, "model_args": args, "best_val_loss": torch.tensor(0.0)}, path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_hf(folder: Path, config: BarkConfig, seed: int, report: Report) -> None:
    files = {"config.json": _hf_config(config), "generation_config.json": _hf_generation_config(config)}
    tokens = vocabulary()
    files |= tokenizer_files(tokens)
    for name, content in files.items():
        _write_text(folder / name, json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n")
    _write_text(folder / "vocab.txt", "\n".join(tokens) + "\n")
    _write_safetensors(folder / "model.safetensors", config, seed, report)


def _write_safetensors(path: Path, config: BarkConfig, seed: int, report: Report) -> None:
    """All weights in one file, one tensor in memory at a time (safetensors' `save_file` wants all at once).

    The format: header length (8 bytes, little-endian), a JSON header padded to a multiple of 8, the data.
    """
    shapes: dict[str, tuple[str, Shape, int]] = {}
    for model in _TRANSFORMERS:
        for name, shape in gpt_names(getattr(config, model)).items():
            shapes[hf_name(model, name)] = ("F32", shape, 4 * _numel(shape))
    causal = (("semantic", config.semantic), ("coarse_acoustics", config.coarse))
    masks = {f"{name}.layers.{i}.attn.bias": gpt.block_size for name, gpt in causal for i in range(gpt.n_layer)}
    codec = dict(codec_weights(seed, config.codec, hf=True))
    shapes |= {name: ("F32", tuple(weight.shape), 4 * weight.numel()) for name, weight in codec.items()}
    shapes |= {name: ("BOOL", (1, 1, size, size), size * size) for name, size in masks.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, length) in shapes.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for model in _TRANSFORMERS:
            for _, weight in _gpt_weights(config, model, seed, report):
                file.write(weight.numpy().data)
        for weight in codec.values():
            file.write(weight.numpy().data)
        for size in masks.values():
            file.write(torch.ones(size, size, dtype=torch.bool).tril_().numpy().data)


def _hf_config(config: BarkConfig) -> dict[str, Any]:
    """config.json, in the names of transformers' BarkConfig and EncodecConfig."""

    def gpt(values: GPTConfig, model_type: str) -> dict[str, Any]:
        return {
            "model_type": model_type, "num_layers": values.n_layer, "num_heads": values.n_head,
            "hidden_size": values.n_embd, "block_size": values.block_size, "bias": values.bias, "dropout": 0.0,
            "input_vocab_size": values.input_vocab_size, "output_vocab_size": values.output_vocab_size,
            "initializer_range": 0.02, "use_cache": True,
        }  # fmt: skip

    fine = gpt(config.fine, "fine_acoustics") | {
        "n_codes_total": config.fine.n_codes_total,
        "n_codes_given": config.fine.n_codes_given,
        "tie_word_embeddings": True,
    }
    return {
        "architectures": ["BarkModel"],
        "model_type": "bark",
        "dtype": "float32",
        "initializer_range": 0.02,
        "semantic_config": gpt(config.semantic, "semantic"),
        "coarse_acoustics_config": gpt(config.coarse, "coarse_acoustics"),
        "fine_acoustics_config": fine,
        "codec_config": _hf_codec_config(config.codec),
    }


def _hf_codec_config(codec: CodecConfig) -> dict[str, Any]:
    return {
        "model_type": "encodec", "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0],
        "sampling_rate": codec.sample_rate, "audio_channels": 1,
        "normalize": False, "chunk_length_s": None, "overlap": None,
        "hidden_size": codec.hidden_size, "num_filters": codec.num_filters,
        "num_residual_layers": codec.num_residual_layers, "upsampling_ratios": list(codec.upsampling_ratios),
        "norm_type": "weight_norm",
        "kernel_size": codec.kernel_size, "last_kernel_size": codec.last_kernel_size,
        "residual_kernel_size": codec.residual_kernel_size, "dilation_growth_rate": codec.dilation_growth_rate,
        "use_causal_conv": True, "pad_mode": "reflect", "compress": codec.compress,
        "num_lstm_layers": codec.num_lstm_layers, "trim_right_ratio": 1.0, "codebook_size": codec.codebook_size,
        "codebook_dim": codec.hidden_size, "use_conv_shortcut": True,
    }  # fmt: skip


def _hf_generation_config(config: BarkConfig) -> dict[str, Any]:
    """generation_config.json, sampling as the published checkpoints do."""
    layout = config.layout
    return {
        "model_type": "bark",
        "sample_rate": config.codec.sample_rate,
        "codebook_size": layout.codebook_size,
        "semantic_config": {
            "do_sample": True, "temperature": 0.7, "renormalize_logits": True, "min_eos_p": None,
            "eos_token_id": layout.semantic_pad_token, "max_new_tokens": layout.max_semantic_tokens,
            "text_encoding_offset": layout.text_encoding_offset, "text_pad_token": layout.text_pad_token,
            "semantic_infer_token": layout.semantic_infer_token,
            "semantic_vocab_size": layout.semantic_vocab_size,
            "max_input_semantic_length": layout.max_text_tokens, "semantic_rate_hz": layout.semantic_rate_hz,
        },
        "coarse_acoustics_config": {
            "do_sample": True, "temperature": 0.7, "renormalize_logits": True,
            "coarse_semantic_pad_token": layout.coarse_semantic_pad_token,
            "coarse_rate_hz": layout.coarse_rate_hz,
            "n_coarse_codebooks": layout.n_coarse_codebooks, "coarse_infer_token": layout.coarse_infer_token,
            "max_coarse_input_length": layout.max_coarse_input, "max_coarse_history": layout.max_coarse_history,
            "sliding_window_len": layout.coarse_window,
        },
        "fine_acoustics_config": {
            "temperature": 0.5, "max_fine_history_length": layout.fine_stride,
            "max_fine_input_length": layout.fine_window, "n_fine_codebooks": layout.n_fine_codebooks,
        },
    }  # fmt: skip
