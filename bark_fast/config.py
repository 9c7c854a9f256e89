"""Shapes and constants of a Bark checkpoint: the four networks and the token layout they share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from bark_fast.errors import InvalidInput
from bark_fast.numeric import is_whole

ModelName = Literal["semantic", "coarse", "fine", "codec"]


MOST = {"n_layer": 1000, "num_lstm_layers": 100, "num_residual_layers": 100, "sample_rate": 1_000_000}
"""Bounds of what would otherwise take all memory before anything is found missing, or no file could hold."""


def _require_positive(owner: object, *names: str) -> None:
    for name in names:
        value, most = getattr(owner, name), MOST.get(name, math.inf)
        if not is_whole(value) or not 1 <= value <= most:
            bound = "of at least 1" if most == math.inf else f"from 1 to {most}"
            raise InvalidInput(f"{type(owner).__name__}.{name} is {value!r}; it must be an integer {bound}")


@dataclass(frozen=True)
class GPTConfig:
    """One GPT-2-like transformer. The semantic and the coarse model are both of this shape.

    `bias` covers the linear layers and, in causal models, the LayerNorms; Bark's published
    models have none. Head size is `n_embd // n_head` (64 in published models).
    """

    n_layer: int
    n_head: int
    n_embd: int
    input_vocab_size: int
    output_vocab_size: int
    block_size: int = 1024
    bias: bool = False

    def __post_init__(self) -> None:
        _require_positive(
            self, "n_layer", "n_head", "n_embd", "input_vocab_size", "output_vocab_size", "block_size"
        )
        if self.n_embd % self.n_head:
            raise InvalidInput(f"n_embd is {self.n_embd}; it must be a multiple of n_head, {self.n_head}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class FineConfig(GPTConfig):
    """The non-causal fine model: `n_codes_total` codebooks in, one of the last ones out per pass."""

    n_codes_total: int = 8
    n_codes_given: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "n_codes_total", "n_codes_given")
        if self.n_codes_given >= self.n_codes_total:
            raise InvalidInput(
                f"n_codes_given is {self.n_codes_given}; it must be below n_codes_total, {self.n_codes_total}"
            )


@dataclass(frozen=True)
class CodecConfig:
    """EnCodec's decoder (Défossez et al. 2022, arXiv:2210.13438): 75 frames a second at 24 kHz."""

    sample_rate: int = 24_000
    hidden_size: int = 128
    num_filters: int = 32
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 5, 4, 2)
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    compress: int = 2
    num_lstm_layers: int = 2
    codebook_size: int = 1024
    num_codebooks: int = 8

    def __post_init__(self) -> None:
        _require_positive(
            self, "sample_rate", "hidden_size", "num_filters", "num_residual_layers", "kernel_size",
            "last_kernel_size", "residual_kernel_size", "dilation_growth_rate", "compress",
            "num_lstm_layers", "codebook_size", "num_codebooks",
        )  # fmt: skip

    @property
    def hop_length(self) -> int:
        """Samples per frame of codes (320)."""
        return math.prod(self.upsampling_ratios)


@dataclass(frozen=True)
class Layout:
    """How Bark lays text, semantic and audio tokens into its vocabularies (suno `generation.py`).

    Lengths are in tokens, rates in hertz. The defaults are suno's; Hugging Face checkpoints may
    change them through generation_config.json.
    """

    text_encoding_offset: int = 10_048
    text_pad_token: int = 129_595
    semantic_infer_token: int = 129_599
    semantic_vocab_size: int = 10_000
    semantic_pad_token: int = 10_000
    semantic_rate_hz: float = 49.9
    max_text_tokens: int = 256
    max_semantic_tokens: int = 768
    codebook_size: int = 1024
    coarse_rate_hz: float = 75
    n_coarse_codebooks: int = 2
    n_fine_codebooks: int = 8
    coarse_semantic_pad_token: int = 12_048
    coarse_infer_token: int = 12_050
    max_coarse_input: int = 256
    max_coarse_history: int = 630
    coarse_window: int = 60
    fine_window: int = 1024
    fine_stride: int = 512

    @property
    def semantic_to_coarse_ratio(self) -> float:
        """Coarse tokens per semantic token (3.006...)."""
        return self.coarse_rate_hz / self.semantic_rate_hz * self.n_coarse_codebooks

    @property
    def max_semantic_history(self) -> int:
        """Semantic tokens that accompany a full coarse history (209)."""
        return math.floor(self.max_coarse_history / self.semantic_to_coarse_ratio)


@dataclass(frozen=True)
class BarkConfig:
    """The four networks of one checkpoint and their shared token layout."""

    semantic: GPTConfig
    coarse: GPTConfig
    fine: FineConfig
    codec: CodecConfig = field(default_factory=CodecConfig)
    layout: Layout = field(default_factory=Layout)

    def __post_init__(self) -> None:
        layout, codes = self.layout, self.layout.codebook_size
        wanted = (
            ("semantic.input_vocab_size", self.semantic.input_vocab_size,
             1 + max(layout.semantic_infer_token, layout.text_pad_token, layout.semantic_pad_token)),
            ("semantic.output_vocab_size", self.semantic.output_vocab_size, layout.semantic_pad_token + 1),
            ("coarse.input_vocab_size", self.coarse.input_vocab_size,
             1 + max(layout.coarse_infer_token, layout.coarse_semantic_pad_token)),
            ("coarse.output_vocab_size", self.coarse.output_vocab_size,
             layout.semantic_vocab_size + layout.n_coarse_codebooks * codes),
            ("fine.input_vocab_size", self.fine.input_vocab_size, codes + 1),
            ("fine.output_vocab_size", self.fine.output_vocab_size, codes),
            ("fine.n_codes_total", self.fine.n_codes_total, layout.n_fine_codebooks),
            ("codec.codebook_size", self.codec.codebook_size, codes),
            ("codec.num_codebooks", self.codec.num_codebooks, layout.n_fine_codebooks),
            ("semantic.block_size", self.semantic.block_size,
             layout.max_text_tokens + 1 + layout.max_semantic_tokens - 1),
            ("coarse.block_size", self.coarse.block_size,
             layout.max_coarse_input + layout.max_coarse_history + layout.coarse_window),
            ("fine.block_size", self.fine.block_size, layout.fine_window),
            ("the fine stage's window", layout.fine_window, layout.fine_stride),
            ("the number of fine codebooks", layout.n_fine_codebooks, layout.n_coarse_codebooks + 1),
        )  # fmt: skip
        for name, value, least in wanted:
            if value < least:
                raise InvalidInput(f"{name} is {value}; Bark's token layout needs at least {least}")


def published_config(size: Literal["tiny", "small", "large"]) -> BarkConfig:
    """The shapes of suno's small and large models, and a tiny one of the same layout for tests."""
    shapes = {"tiny": (2, 2, 64), "small": (12, 12, 768), "large": (24, 16, 1024)}
    if size not in shapes:
        raise InvalidInput(f"size is {size!r}; choose one of {', '.join(shapes)}")
    n_layer, n_head, n_embd = shapes[size]
    return BarkConfig(
        semantic=GPTConfig(n_layer, n_head, n_embd, input_vocab_size=129_600, output_vocab_size=10_048),
        coarse=GPTConfig(n_layer, n_head, n_embd, input_vocab_size=12_096, output_vocab_size=12_096),
        fine=FineConfig(n_layer, n_head, n_embd, input_vocab_size=1_056, output_vocab_size=1_056),
    )
