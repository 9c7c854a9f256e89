"""The causal transformer of Bark's semantic and coarse stages, over packed sequences with a key-value cache."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from torch import Tensor, nn

from bark_fast.config import GPTConfig
from bark_fast.modules.layer import Embedding, Layer, LayerNorm, Linear
from bark_fast.ops import reference as ops
from bark_fast.ops.embedding import embed


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

    def forward(
        self, ids: Tensor, positions: Tensor, attend: AttendLayer, extra_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states (rows, n_embd) before the final norm.

        ids, positions: (rows,) int64. extra_ids: (rows,) int64, tokens whose embeddings are added to those of
        `ids`, `ops.embedding.NO_TOKEN` where there is none (Bark's semantic prompt sums text and history).
        """
        x = embed(ids, positions, self.wte.weight, self.wpe.weight, extra_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, partial(attend, index))
        return x

    def logits(self, hidden: Tensor, low: int, high: int) -> Tensor:
        """Rows [low, high) of the head for hidden states (rows, n_embd): (rows, high - low)."""
        return ops.linear(self.ln_f(hidden), self.head.weight[low:high])
