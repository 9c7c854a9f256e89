"""The causal transformer of Bark's semantic and coarse stages, over packed sequences with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from bark_fast.config import GPTConfig
from bark_fast.modules.layer import Embedding, Layer, LayerNorm, Linear
from bark_fast.ops import reference as ops


class AttendLayer(Protocol):
    """Attention of all rows of a step in one layer, over whatever cache the engine keeps."""

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Store keys and values of the projection (rows, 3 * n_embd); return merged heads (rows, n_embd)."""
        ...


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

    def forward(self, x: Tensor, positions: Tensor, attend: AttendLayer) -> Tensor:
        """Hidden states (rows, n_embd) before the final norm.

        x: token embeddings (rows, n_embd). positions: (rows,) int64.
        """
        x = x + self.wpe(positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, partial(attend, index))
        return x

    def logits(self, hidden: Tensor, low: int, high: int) -> Tensor:
        """Rows [low, high) of the head for hidden states (rows, n_embd): (rows, high - low)."""
        return ops.linear(self.ln_f(hidden), self.head.weight[low:high])
