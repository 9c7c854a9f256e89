"""The non-causal transformer of Bark's fine stage: one codebook predicted from the sum of those before it."""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor, nn

from bark_fast.config import FineConfig
from bark_fast.modules.layer import Embedding, Layer, LayerNorm, Linear
from bark_fast.ops.attention import attention
from bark_fast.ops.embedding import embed_codes
from bark_fast.ops.norm_linear import norm_linear


class FineGPT(nn.Module):
    """Bark's fine model. Source of the architecture: suno `bark/model_fine.py`.

    LayerNorms have biases whatever `config.bias` says, as in suno's and Hugging Face's code.
    """

    def __init__(self, config: FineConfig) -> None:
        super().__init__()
        self.config = config
        self.wtes = nn.ModuleList(
            Embedding(config.input_vocab_size, config.n_embd) for _ in range(config.n_codes_total)
        )
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.layers = nn.ModuleList(Layer(config, norm_bias=True) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=True)
        self.heads = nn.ModuleList(
            Linear(config.n_embd, config.output_vocab_size, bias=False)
            for _ in range(config.n_codes_given, config.n_codes_total)
        )

    def forward(self, codes: Tensor, codebook: int, start: int = 0) -> Tensor:
        """Hidden states (batch, time - start, n_embd) for predicting `codebook`, before the final norm.

        codes: (batch, time, n_codes_total); codebooks 0..codebook are embedded and summed, the predicted one
        included: it holds the pad code, or an earlier window's prediction. start: the first position wanted.
        """
        tables: list[Tensor] = [wte.get_parameter("weight") for wte in self.wtes[: codebook + 1]]
        x = embed_codes(codes, tables, self.wpe.weight)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, self._attend)
        return cast(Tensor, last(x, partial(self._attend, start=start), slice(start, None)))

    def logits(self, hidden: Tensor, codebook: int, codebook_size: int) -> Tensor:
        """Logits (..., codebook_size) of `codebook` for hidden states (..., n_embd)."""
        head = self.heads[codebook - self.config.n_codes_given]
        weight: Tensor = head.get_parameter("weight")
        return norm_linear(hidden, self.ln_f.weight, self.ln_f.bias, weight[:codebook_size])

    def _attend(self, qkv: Tensor, start: int = 0) -> Tensor:
        batch, time, _ = qkv.shape
        heads, head_dim = self.config.n_head, self.config.head_dim
        query, key, value = qkv.view(batch, time, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        seen = attention(query[:, :, start:], key, value, causal=False)
        return seen.transpose(1, 2).reshape(batch, time - start, heads * head_dim)
