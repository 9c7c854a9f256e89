"""A likeness of a GPT that decodes in less time, for tokens that the GPT itself then checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from bark_fast.config import GPTConfig
from bark_fast.ops import int8
from bark_fast.ops.decode_layers import PagedRows
from bark_fast.ops.embedding import embed

if TYPE_CHECKING:
    from bark_fast.modules.gpt import GPT


class DraftGPT:
    """A GPT's decode steps with its matrices in int8. It reads and writes the GPT's own keys and values."""

    def __init__(self, gpt: GPT) -> None:
        self.gpt = gpt
        self._versions = _versions(gpt)
        self.layers = int8.Int8Layers(gpt.layer_weights)
        self.head = int8.quantise(gpt.head.weight)

    @staticmethod
    def is_fast(config: GPTConfig) -> bool:
        """Whether it is any faster here than such a GPT."""
        return int8.is_fast(config.head_dim)

    @staticmethod
    def bytes_of(config: GPTConfig) -> int:
        """What it takes beside the GPT's own weights."""
        width = config.n_embd
        outputs, elements = 9 * width, 12 * width * width  # of qkv, out, fc and proj together
        head = int8.bytes_of(config.output_vocab_size, config.output_vocab_size * width)
        return config.n_layer * int8.bytes_of(outputs, elements) + head

    @property
    def is_up_to_date(self) -> bool:
        """Whether the weights it was made from have not been written to since."""
        return self._versions == _versions(self.gpt)

    def decode(self, ids: Tensor, positions: Tensor, cache: PagedRows) -> Tensor:
        """As `GPT.decode`."""
        x = embed(ids, positions, self.gpt.wte.weight, self.gpt.wpe.weight)
        return int8.decode_layers(x, self.layers, cache)

    def logits(self, hidden: Tensor, low: int, high: int) -> Tensor:
        """As `GPT.logits`."""
        head = int8.Int8Matrix(self.head.weight[low:high], self.head.scales[low:high])
        return int8.norm_linear(hidden, self.gpt.ln_f.weight, self.gpt.ln_f.bias, head)


def version_of(tensor: Tensor) -> int:
    """A number that changes when it is written to; an inference tensor's is always 0."""
    return 0 if tensor.is_inference() else tensor._version


def _versions(gpt: GPT) -> list[int]:
    """Numbers that change when the matrices are written to."""
    matrices = (*gpt.layer_weights.matrices(), gpt.head.weight)
    return [version_of(weight) for weight in matrices]
