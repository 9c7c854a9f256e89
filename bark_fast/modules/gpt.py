"""The causal transformer of Bark's semantic and coarse stages, over packed sequences with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from bark_fast.config import GPTConfig
from bark_fast.modules.layer import Attend, Embedding, Layer, LayerNorm, Linear
from bark_fast.ops import reference as ops


class LayerCache(Protocol):
    """Keys and values of one sequence, layer by layer."""

    length: int

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (time, heads, head_dim) after `length`; return all keys and values, (heads, keys, head_dim)."""
        ...


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a packed batch belong to the sequence of `cache`."""

    start: int
    stop: int
    cache: LayerCache


class GPT(nn.Module):
    """Bark's causal model. Rows of all sequences are packed: (rows, n_embd), no padding.

    Source of the architecture: suno `bark/model.py` (after nanoGPT).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.input_vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.layers = nn.ModuleList(Layer(config, norm_bias=config.bias) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.bias)
        self.head = Linear(config.n_embd, config.output_vocab_size, bias=False)

    def embed(self, ids: Tensor, merged: Sequence[tuple[int, Tensor]] = ()) -> Tensor:
        """Token embeddings (rows, n_embd) of ids (rows,).

        merged: pairs (row, ids (m,)) whose embeddings are added to rows [row, row + m).
        """
        x: Tensor = self.wte(ids)
        for row, extra in merged:
            x[row : row + len(extra)] += self.wte(extra)
        return x

    def forward(self, x: Tensor, positions: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Hidden states (rows, n_embd) before the final norm.

        x: token embeddings (rows, n_embd). positions: (rows,). Keys and values go into each segment's cache at
        its `length`, which the caller advances afterwards.
        """
        x = x + self.wpe(positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, self._attend(index, segments))
        return x

    def logits(self, hidden: Tensor, low: int, high: int) -> Tensor:
        """Rows [low, high) of the head for hidden states (rows, n_embd): (rows, high - low)."""
        return ops.linear(self.ln_f(hidden), self.head.weight[low:high])

    def _attend(self, layer: int, segments: Sequence[Segment]) -> Attend:
        heads, head_dim = self.config.n_head, self.config.head_dim

        def attend(qkv: Tensor) -> Tensor:
            query, key, value = qkv.view(len(qkv), 3, heads, head_dim).unbind(1)
            merged = []
            for part in segments:
                rows = slice(part.start, part.stop)
                keys, values = part.cache.append(layer, key[rows], value[rows])
                # SDPA's fast paths want a batch dimension
                seen = ops.attention(query[rows].transpose(0, 1)[None], keys[None], values[None], causal=True)
                merged.append(seen[0].transpose(0, 1).reshape(part.stop - part.start, heads * head_dim))
            return merged[0] if len(merged) == 1 else torch.cat(merged)

        return attend
