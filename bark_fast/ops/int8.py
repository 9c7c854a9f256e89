"""Matrices in int8 with a scale for each row: a likeness of a model in a quarter, or half, of its bytes.

For drafts that the model itself checks. Activations, keys and values keep their dtype. On the CPU, by the
extension alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bark_fast import extension
from bark_fast.ops.decode_layers import MATRICES, WEIGHTS, LayerWeights, PagedRows, by_extension
from bark_fast.ops.dispatch import HEAD_DIMS
from bark_fast.ops.norm_linear import extension_for

LARGEST = 127


class Int8Matrix(NamedTuple):
    """weight (n, k) int8, to be multiplied by scales (n,) float32, row by row."""

    weight: Tensor
    scales: Tensor


def quantise(weight: Tensor) -> Int8Matrix:
    """The nearest int8 of each element, where a row's largest is 127. weight: (n, k), finite."""
    scales = weight.abs().amax(dim=1).float() / LARGEST
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return Int8Matrix((weight.float() * inverse[:, None]).round_().to(torch.int8), scales)


def bytes_of(rows: int, elements: int) -> int:
    """What matrices of so many rows and elements take."""
    return elements + 4 * rows


def is_fast(head_dim: int) -> bool:
    """Whether the extension is there, has heads of this size, and vector instructions for products of int8."""
    module = extension.load()
    return module is not None and module.isa() != "portable" and head_dim in HEAD_DIMS


class Int8Layers:
    """`LayerWeights` with int8 matrices, and the scales of each layer's four."""

    def __init__(self, weights: LayerWeights) -> None:
        matrices = [quantise(weight) for weight in weights.matrices()]
        own = iter(matrix.weight for matrix in matrices)
        self.weights = [next(own) if i % WEIGHTS in MATRICES else one for i, one in enumerate(weights)]
        self.scales = [matrix.scales for matrix in matrices]


def decode_layers(x: Tensor, layers: Int8Layers, cache: PagedRows) -> Tensor:
    """As `ops.decode_layers`, of at most `COMPILED_ROWS` rows on the CPU."""
    module = extension_for(x)
    assert module is not None
    return by_extension(module, x, layers.weights, layers.scales, cache)


def norm_linear(x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, matrix: Int8Matrix) -> Tensor:
    """As `ops.norm_linear`, of at most `COMPILED_ROWS` rows (rows, k) on the CPU."""
    module = extension_for(x)
    assert module is not None
    out = x.new_empty(len(x), len(matrix.weight))
    module.linear(
        x, norm_weight, norm_bias, matrix.weight, None, None, out, False, torch.get_num_threads(), matrix.scales
    )
    return out
