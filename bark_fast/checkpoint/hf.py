"""Reading a Hugging Face folder: config.json, generation_config.json and weights, single or sharded.

Sources of the format: transformers `models/bark` (configuration, generation configuration, modelling) and
`models/encodec`. Values missing in a file take transformers' defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bark_fast.checkpoint.files import open_json, open_safetensors, open_torch, tensors_of
from bark_fast.checkpoint.hf_generation import layout_of, section, stage_defaults
from bark_fast.checkpoint.names import HF_PREFIX
from bark_fast.checkpoint.opened import Opened, canonical_codec_name
from bark_fast.config import BarkConfig, CodecConfig, FineConfig, GPTConfig, Layout, ModelName
from bark_fast.errors import CheckpointError, InvalidInput

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# what our decoder takes for granted, which EncodecConfig could have otherwise
_CODEC_FIXED: dict[str, Any] = {"norm_type": "weight_norm", "use_causal_conv": True, "audio_channels": 1,
                                "use_conv_shortcut": True, "pad_mode": "reflect", "trim_right_ratio": 1.0,
                                "normalize": False, "chunk_length_s": None}  # fmt: skip
_CODEC_SAME_NAME = ("hidden_size", "num_filters", "num_residual_layers", "kernel_size", "last_kernel_size",
                    "residual_kernel_size", "dilation_growth_rate", "compress", "num_lstm_layers",
                    "codebook_size")  # fmt: skip


def holds_hf_weights(folder: Path) -> bool:
    """Whether `folder` has a config.json and weights in one of Hugging Face's forms."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in _WEIGHTS)


def is_complete(folder: Path) -> bool:
    """Whether every file of a download is in `folder`, so that the hub need not be asked."""
    try:
        weight_files(folder)
        _tokenizer_file(folder)
    except CheckpointError:
        return False
    return (folder / "config.json").is_file()


def _gpt_config(values: Mapping[str, Any], fine: bool) -> GPTConfig:
    shared: dict[str, Any] = {
        # each has a second name, which transformers reads too
        "n_layer": values.get("num_layers", values.get("num_hidden_layers", 12)),
        "n_head": values.get("num_heads", values.get("num_attention_heads", 12)),
        "n_embd": values.get("hidden_size", 768),
        "input_vocab_size": values.get("input_vocab_size", 10_048),
        "output_vocab_size": values.get("output_vocab_size", 10_048),
        "block_size": values.get("block_size", 1024),
        "bias": bool(values.get("bias", True)),
    }
    if not fine:
        return GPTConfig(**shared)
    return FineConfig(
        **shared, n_codes_total=values.get("n_codes_total", 8), n_codes_given=values.get("n_codes_given", 1)
    )


def _codec_config(values: Mapping[str, Any], layout: Layout, path: Path) -> CodecConfig:
    fixed = {**_CODEC_FIXED, "codebook_dim": values.get("hidden_size", 128)}
    for name, wanted in fixed.items():
        found = values.get(name, wanted)
        if found != wanted and not (name == "codebook_dim" and found is None):
            raise CheckpointError(
                f"{path}: codec_config.{name} is {found!r}; bark_fast decodes {wanted!r} only"
            )
    chosen: dict[str, Any] = {name: values[name] for name in _CODEC_SAME_NAME if name in values}
    if "sampling_rate" in values:
        chosen["sample_rate"] = values["sampling_rate"]
    if "upsampling_ratios" in values:
        ratios = values["upsampling_ratios"]
        if not isinstance(ratios, list) or not ratios or not all(type(r) is int and r > 0 for r in ratios):
            raise CheckpointError(
                f"{path}: codec_config.upsampling_ratios is {ratios!r}; a list of integers is wanted"
            )
        chosen["upsampling_ratios"] = tuple(ratios)
    return CodecConfig(**chosen, num_codebooks=layout.n_fine_codebooks)


def read_config(folder: Path, generation: dict[str, Any], generation_path: Path) -> tuple[BarkConfig, bool]:
    """The configuration in `folder`, and whether the fine model's heads are tied to its embeddings."""
    path = folder / "config.json"
    content = open_json(path)
    if content.get("model_type", "bark") != "bark":
        raise CheckpointError(f"{path} describes a {content['model_type']!r} model; name a Bark checkpoint")
    layout = layout_of(generation, generation_path)
    fine_values = section(content, "fine_acoustics_config", path)
    try:
        fine = _gpt_config(fine_values, fine=True)
        assert isinstance(fine, FineConfig)
        config = BarkConfig(
            semantic=_gpt_config(section(content, "semantic_config", path), fine=False),
            coarse=_gpt_config(section(content, "coarse_acoustics_config", path), fine=False),
            fine=fine,
            codec=_codec_config(section(content, "codec_config", path), layout, path),
            layout=layout,
        )
    except (InvalidInput, TypeError) as error:
        raise CheckpointError(
            f"{path}: {error}; download config.json and generation_config.json again"
        ) from None
    return config, bool(fine_values.get("tie_word_embeddings", True))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The weight files in `folder`: safetensors before .bin, a single file before shards."""
    for name in _WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return (path,)
        listed = section(open_json(path), "weight_map", path).values()
        # a shard is a file beside its index: never a path that leads elsewhere
        if not listed or not all(isinstance(shard, str) and Path(shard).name == shard for shard in listed):
            raise CheckpointError(f"{path} does not list the weight files beside it; download it again")
        shards = set(listed)
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {name} lists; download it again")
        return tuple(folder / shard for shard in sorted(shards))
    raise CheckpointError(
        f"{folder} has config.json but no weights (looked for {', '.join(_WEIGHTS)}); download them"
    )


def _split(files: tuple[Path, ...], folder: Path) -> dict[ModelName, dict[str, torch.Tensor]]:
    """All tensors in `files` by model. Names outside the four models are a CheckpointError."""
    raw: dict[ModelName, dict[str, torch.Tensor]] = {model: {} for model in HF_PREFIX}
    for path in files:
        content = open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path)
        for name, tensor in tensors_of(content, path).items():
            if name.endswith(".attn.bias"):  # the causal mask, kept as a buffer
                continue
            model = next((model for model, prefix in HF_PREFIX.items() if name.startswith(prefix)), None)
            if model is None:
                raise CheckpointError(f"{folder}: {path.name} has {name!r}, which is no part of a Bark model")
            raw[model][canonical_codec_name(name) if model == "codec" else name] = tensor
    return raw


def _tokenizer_file(folder: Path) -> Path:
    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder} lacks tokenizer.json or vocab.txt; download one from huggingface.co/suno/bark"
    )


def open_hf(folder: Path) -> Opened:
    """Open the Hugging Face checkpoint in `folder`. Raises CheckpointError."""
    generation_path = folder / "generation_config.json"
    generation = open_json(generation_path) if generation_path.is_file() else {}
    config, tie = read_config(folder, generation, generation_path)
    files = weight_files(folder)
    speakers = folder / "speaker_embeddings_path.json"
    where = str(files[0]) if len(files) == 1 else str(folder)
    return Opened(
        folder=folder,
        format="hf",
        config=config,
        defaults=stage_defaults(generation, generation_path),
        tokenizer_file=_tokenizer_file(folder),
        speaker_embeddings=speakers if speakers.is_file() else None,
        raw=_split(files, folder),
        where=dict.fromkeys(HF_PREFIX, where),
        files=files,
        tie=tie,
    )
