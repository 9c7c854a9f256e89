"""A likeness of a GPT that decodes in less time, for tokens that the GPT itself then checks."""

from __future__ import annotations

from torch import Tensor

from bark_fast.config import GPTConfig
from bark_fast.modules.gpt import GPT
from bark_fast.ops import int8
from bark_fast.ops.decode_layers import PagedRows
from bark_fast.ops.embedding import embed


class DraftGPT:
    """A GPT's decode steps with its matrices in int8. It reads and writes the GPT's own keys and values."""

    @staticmethod
    def can_be_of(gpt: GPT) -> bool:
        """Whether the extension takes its weights, and multiplies int8 in vectors."""
        return int8.takes(gpt.layer_weights, gpt.config.head_dim)

    @staticmethod
    def bytes_of(config: GPTConfig) -> int:
        """What it takes beside the GPT's own weights."""
        width = config.n_embd
        outputs, elements = 9 * width, 12 * width * width  # of qkv, out, fc and proj together
        head = int8.bytes_of(config.output_vocab_size, config.output_vocab_size * width)
        return config.n_layer * int8.bytes_of(outputs, elements) + head

    def __init__(self, gpt: GPT) -> None:
        self.gpt = gpt
        self.layers = int8.Int8Layers(gpt.layer_weights)
        self.head = int8.quantise(gpt.head.weight)

    def decode(self, ids: Tensor, positions: Tensor, cache: PagedRows) -> Tensor:
        """As `GPT.decode`."""
        x = embed(ids, positions, self.gpt.wte.weight, self.gpt.wpe.weight)
        return int8.decode_layers(x, self.layers, cache)

    def logits(self, hidden: Tensor, low: int, high: int) -> Tensor:
        """As `GPT.logits`."""
        head = int8.Int8Matrix(self.head.weight[low:high], self.head.scales[low:high])
        return int8.norm_linear(hidden, self.gpt.ln_f.weight, self.gpt.ln_f.bias, head)
