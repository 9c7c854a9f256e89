"""All layers of a decode step in one call: a few new rows a sequence, keys and values in pages.

On the CPU a layer of a small batch is some hundred microseconds of reading weights, beside which entering and
leaving five operations shows. The extension takes all layers in one parallel region; elsewhere, and for more
rows than it takes, the operations run one after another. The extension's bits are those of its operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bark_fast.ops import paged_kv
from bark_fast.ops.dispatch import HEAD_DIMS, all_plain, is_eager
from bark_fast.ops.mlp import layernorm_gelu_mlp
from bark_fast.ops.norm_linear import extension_for, has_few_rows, linear_residual, norm_linear, rows_of

WEIGHTS = 12
"""Tensors of a layer: weight and bias of ln_1, qkv, out, ln_2, fc and proj; a bias may be None."""
MATRICES = (2, 4, 8, 10)
"""Which of them are matrices."""


class LayerWeights(list[Tensor | None]):
    """`WEIGHTS` tensors of each layer, one layer after another, as they lie from now on."""

    def matrices(self) -> list[Tensor]:
        """The four matrices of each layer."""
        places = (layer + matrix for layer in range(0, len(self), WEIGHTS) for matrix in MATRICES)
        return [weight for place in places if (weight := self[place]) is not None]

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """What the extension can read all of them as, which takes longer to find out than a layer; or None."""
        first = self[0]
        return first.dtype if first is not None and all_plain(first.dtype, self) else None


@dataclass(frozen=True)
class PagedRows:
    """Where the new keys and values of a step go and what its rows attend to, in all layers.

    keys, values: per layer (num_pages, n_head, page_size, head_dim). block_table: (sequences, columns) int32.
    lengths: (sequences,) int32, new keys included. query_starts: (sequences + 1,) int32, their first rows;
    each has at most 8. slots: (rows,) int64, of the rows' own keys, or -1 to store none.
    """

    keys: list[Tensor]
    values: list[Tensor]
    block_table: Tensor
    lengths: Tensor
    query_starts: Tensor
    slots: Tensor


def decode_layers(x: Tensor, weights: LayerWeights, cache: PagedRows) -> Tensor:
    """Each layer x + out(attend(qkv(LN(x)))), then x + proj(gelu(fc(LN(x)))): (rows, n_embd), a new tensor.

    x: (rows, n_embd), those of a sequence next to each other: each sees the keys up to its own. weights: of
    x's dtype. Errors are those of the operations: what does not fit raises `InvalidInput` or ValueError.
    """
    head_dim = cache.keys[0].shape[3]
    x = rows_of(x)
    plain = x.dtype == weights.dtype and head_dim in HEAD_DIMS
    if is_eager(x) and plain and has_few_rows(x) and (module := extension_for(x)):
        return by_extension(module, x, weights, [], cache)
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        parts: Any = weights[layer * WEIGHTS : (layer + 1) * WEIGHTS]
        ln_1, ln_1_bias, qkv, qkv_bias, out, out_bias, *mlp = parts
        projected = norm_linear(x, ln_1, ln_1_bias, qkv, qkv_bias)
        seen = paged_kv.append_attention(
            projected, keys, values, cache.block_table, cache.lengths, cache.query_starts, cache.slots,
            torch.empty_like(x),
        )  # fmt: skip
        x = linear_residual(seen, out, x, out_bias)
        x = layernorm_gelu_mlp(x, *mlp)
    return x


def by_extension(
    module: ModuleType, x: Tensor, weights: list[Tensor | None], scales: list[Tensor], cache: PagedRows
) -> Tensor:
    """All layers in one call of the extension. scales: of matrices in int8, four a layer; else none."""
    out = x.new_empty(x.shape)
    module.decode_layers(
        x, weights, cache.keys, cache.values, cache.block_table, cache.lengths, cache.query_starts, cache.slots,
        out, cache.keys[0].shape[3] ** -0.5, torch.get_num_threads(), scales,
    )  # fmt: skip
    return out
