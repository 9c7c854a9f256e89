"""The causal transformer of Bark's semantic and coarse stages, over packed sequences with a key-value cache."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Protocol, cast

from torch import Tensor, nn

from bark_fast.config import GPTConfig
from bark_fast.modules.draft import DraftGPT
from bark_fast.modules.layer import Embedding, Layer, LayerNorm, Linear
from bark_fast.ops.decode_layers import LayerWeights, PagedRows, decode_layers
from bark_fast.ops.embedding import embed
from bark_fast.ops.norm_linear import Scratch, norm_linear


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
        self._draft: DraftGPT | None = None

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: AttendLayer,
        extra_ids: Tensor | None = None,
        wanted: Tensor | None = None,
        scratch: Scratch | None = None,
    ) -> Tensor:
        """Hidden states (rows, n_embd), or (len(wanted), n_embd), before the final norm.

        ids, positions: (rows,) int64. extra_ids: (rows,) int64, tokens whose embeddings are added to those of
        `ids`, `ops.embedding.NO_TOKEN` where there is none (Bark's semantic prompt sums text and history).
        wanted: int64, the rows whose hidden states are returned, None for all: in a prefill those that draw.
        scratch: from `ops.norm_linear.linear_scratch`, for steps that are captured.
        """
        x = embed(ids, positions, self.wte.weight, self.wpe.weight, extra_ids)
        *layers, last = self.layers
        for index, layer in enumerate(layers):
            x = layer(x, partial(attend, index), scratch=scratch)

        def attend_last(qkv: Tensor) -> Tensor:
            seen = attend(len(layers), qkv)
            return seen if wanted is None else seen[wanted]

        return cast(Tensor, last(x, attend_last, wanted, scratch))

    def decode(
        self, ids: Tensor, positions: Tensor, cache: PagedRows, extra_ids: Tensor | None = None
    ) -> Tensor:
        """As `forward` for one row a sequence whose keys and values lie in pages, in fewer calls."""
        x = embed(ids, positions, self.wte.weight, self.wpe.weight, extra_ids)
        return decode_layers(x, self.layer_weights, cache)

    @cached_property
    def layer_weights(self) -> LayerWeights:
        # gathering 12 tensors a layer takes longer than to check them; parameters are changed, never replaced
        return LayerWeights(tensor for layer in self.layers for tensor in cast(Layer, layer).weights())

    def draft(self) -> DraftGPT | None:
        """Its likeness for guessing, made when first asked for and once weights change; None if it has none."""
        if self.layer_weights.dtype is None or not DraftGPT.is_fast(self.config):
            return None
        if self._draft is None or not self._draft.is_up_to_date:
            self._draft = None  # frees what it takes first
            self._draft = DraftGPT(self)
        return self._draft

    @property
    def draft_bytes(self) -> int:
        """What the likeness takes at present."""
        return 0 if self._draft is None else DraftGPT.bytes_of(self.config)

    def logits(self, hidden: Tensor, low: int, high: int, scratch: Scratch | None = None) -> Tensor:
        """Rows [low, high) of the head for hidden states (rows, n_embd): (rows, high - low).

        scratch: as in `forward`. It has room for the widest layer, 4 * n_embd outputs; of more, k is not split.
        """
        weight = self.head.weight[low:high]
        fits = len(weight) <= 4 * self.config.n_embd
        return norm_linear(hidden, self.ln_f.weight, self.ln_f.bias, weight, scratch=scratch if fits else None)
