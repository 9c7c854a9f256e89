"""Random weights that behave: lively logits, finite and audible waveforms, the same for both file formats.

Each tensor has a generator of its own, seeded from (seed, model, our parameter name), so neither the order of
writing nor the format changes a value. Scales were set so that tests see something: logits have a standard
deviation near 2, attention is not uniform, utterances end by themselves after some hundred tokens, and random
codes decode to a peak of about 0.3.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch

from bark_fast.checkpoint.names import (
    Conv,
    Shape,
    decoder_convs,
    encoder_convs,
    gpt_shapes,
    lstm_shapes,
    seanet_width,
    tied,
)
from bark_fast.config import CodecConfig, FineConfig, GPTConfig, ModelName

N_QUANTIZERS = 32  # EnCodec at 24 kbit/s; Bark decodes the first 8
_LOGIT_STD = 2.0
_TOKEN_GAIN = 3.0  # of token embeddings: each position differs from its context's mean


def normal(seed: int, model: ModelName, name: str, shape: Shape, std: float, mean: float = 0.0) -> torch.Tensor:
    """(shape) float32 drawn from N(mean, std²) by this tensor's own generator."""
    digest = hashlib.sha256(f"{seed}/{model}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator).mul_(std).add_(mean)


def gpt_weight(seed: int, model: ModelName, name: str, shape: Shape, config: GPTConfig) -> torch.Tensor:
    """One parameter of a transformer, by our name. A tied head is its embedding: ask for that one."""
    kind = name.split(".")[-2]
    width = config.n_embd
    # GPT-2's 0.02 is meant for a width of 768: keep the size of activations at other widths
    linear = 0.02 * math.sqrt(768 / width)
    if name.endswith(".bias"):
        return normal(seed, model, name, shape, 0.02)
    if kind in ("ln_1", "ln_2", "ln_f"):
        return normal(seed, model, name, shape, 0.1, mean=1.0)
    if kind == "head":
        return normal(seed, model, name, shape, _LOGIT_STD / math.sqrt(width))
    if isinstance(config, FineConfig) and name.startswith(("wtes.", "heads.")):
        return normal(seed, model, name, shape, _LOGIT_STD / math.sqrt(width))  # tied to a head
    # a sharper attention than GPT-2's at birth, so that it matters which position is read
    gain = {"wte": _TOKEN_GAIN, "qkv": 2.0}.get(kind, 1.0)
    return normal(seed, model, name, shape, gain * linear)


def gpt_names(config: GPTConfig) -> dict[str, Shape]:
    """Names and shapes that need storing: every parameter but the tied heads."""
    return {name: shape for name, shape in gpt_shapes(config).items() if tied(name) is None}


def _conv_gain(conv: Conv, part: str) -> float:
    """g of the weight norm: keeps the signal's size from layer to layer, and ends at a peak of about 0.3."""
    if part == "decoder" and conv.ours == "conv_out":
        return 0.25
    if conv.transposed:
        return math.sqrt(conv.shape[2] / 4)  # each output sample meets 2 of the kernel's 2 * ratio taps
    return 0.7 if "residuals" in conv.ours else 1.0


def _part(seed: int, part: str, config: CodecConfig, hf: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of EnCodec's encoder or decoder."""
    suffix = (
        ("parametrizations.weight.original0", "parametrizations.weight.original1")
        if hf
        else ("weight_g", "weight_v")
    )
    convs = list(decoder_convs(config) if part == "decoder" else encoder_convs(config))
    for conv in convs:
        name = conv.hf_name(part) if hf else conv.suno_name(part)
        key = f"{part}.{conv.path}"
        gain = _conv_gain(conv, part)
        g = normal(seed, "codec", f"{key}.g", (conv.shape[0], 1, 1), 0.1 * gain, mean=gain)
        yield f"{name}.bias", normal(seed, "codec", f"{key}.bias", (conv.bias,), 0.01)
        yield f"{name}.{suffix[0]}", g.abs_()
        yield f"{name}.{suffix[1]}", normal(seed, "codec", f"{key}.v", conv.shape, 1.0)
    place = 1 if part == "decoder" else int(convs[-1].path) - 2
    lstm = f"codec_model.{part}.layers.{place}.lstm." if hf else f"{part}.model.{place}.lstm."
    for name, shape in lstm_shapes(config).items():
        yield (
            lstm + name,
            normal(seed, "codec", f"{part}.lstm.{name}", shape, 0.6 / math.sqrt(seanet_width(config))),
        )


def codec_weights(seed: int, config: CodecConfig, hf: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole EnCodec model, encoder and 32 quantizers too, under encodec's names or Hugging Face's."""
    yield from _part(seed, "encoder", config, hf)
    for q in range(N_QUANTIZERS):
        prefix = f"codec_model.quantizer.layers.{q}.codebook." if hf else f"quantizer.vq.layers.{q}._codebook."
        embed = normal(seed, "codec", f"codebook.{q}", (config.codebook_size, config.hidden_size), 0.8**q)
        yield prefix + "inited", torch.ones(1)
        yield prefix + "cluster_size", torch.ones(config.codebook_size)
        yield prefix + "embed", embed
        yield prefix + "embed_avg", embed.clone()
    yield from _part(seed, "decoder", config, hf)
