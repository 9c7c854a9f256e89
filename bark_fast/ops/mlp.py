"""The feed-forward half of a pre-norm transformer layer: x + proj(gelu(fc(LN(x)))).

Accumulation and rounding are those of `ops.norm_linear`; the hidden row is rounded to the weights' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bark_fast.errors import InvalidInput
from bark_fast.ops import reference
from bark_fast.ops.dispatch import define, is_eager, uses_triton
from bark_fast.ops.norm_linear import (
    Scratch,
    check,
    extension_for,
    has_few_rows,
    rows_of,
    with_adjacent_columns,
)


def layernorm_gelu_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    scratch: Scratch | None = None,
    pdl: bool = False,
) -> Tensor:
    """x + proj(gelu(fc(LayerNorm(x)))), eps 1e-5, exact GELU: the shape and dtype of x, a new tensor.

    x: (..., k), rows any stride apart. fc_weight: (hidden, k), proj_weight: (k, hidden), both in x's dtype, as
    torch.nn.Linear keeps them. Biases may be None. scratch, pdl: as in `ops.norm_linear.norm_linear`.
    """
    check(x, fc_weight, fc_bias, norm_weight, norm_bias)
    if proj_weight.shape != (x.shape[-1], len(fc_weight)) or proj_weight.dtype != x.dtype:
        raise InvalidInput(
            f"proj_weight is {tuple(proj_weight.shape)} {proj_weight.dtype}; it must be "
            f"{(x.shape[-1], len(fc_weight))} {x.dtype}, from fc's outputs back to x"
        )
    if proj_bias is not None and proj_bias.shape != x.shape[-1:]:
        raise InvalidInput(f"proj_bias is {tuple(proj_bias.shape)}; it must be ({x.shape[-1]},)")
    arguments = (x, norm_weight, norm_bias, fc_weight, fc_bias, proj_weight, proj_bias)
    partials, counters = scratch or (None, None)
    if is_eager(x):
        return _layernorm_gelu_mlp(*arguments, partials, counters, pdl)
    result: Tensor = torch.ops.bark_fast.layernorm_gelu_mlp(*arguments, partials, counters, pdl)
    return result


def _layernorm_gelu_mlp(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, fc_weight: Tensor, fc_bias: Tensor | None,
    proj_weight: Tensor, proj_bias: Tensor | None, partials: Tensor | None = None,
    counters: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    if uses_triton(x):
        from bark_fast.kernels import mlp as kernels

        y: Tensor = kernels.layernorm_gelu_mlp(
            rows_of(x), (norm_weight, norm_bias), (with_adjacent_columns(fc_weight), fc_bias),
            (with_adjacent_columns(proj_weight), proj_bias),
            scratch=None if partials is None or counters is None else (partials, counters), pdl=pdl,
        )  # fmt: skip
        return y.view(x.shape)
    if module := extension_for(x, norm_weight, norm_bias, fc_weight, fc_bias, proj_weight, proj_bias):
        rows, threads = rows_of(x), torch.get_num_threads()
        y = rows.new_empty(rows.shape)
        if has_few_rows(x):
            module.mlp(rows, norm_weight, norm_bias, fc_weight, fc_bias, proj_weight, proj_bias, y, threads)
        else:
            hidden = rows.new_empty(len(rows), len(fc_weight))
            module.linear(rows, norm_weight, norm_bias, fc_weight, fc_bias, None, hidden, True, threads)
            module.linear(hidden, None, None, proj_weight, proj_bias, rows, y, False, threads)
        return y.view(x.shape)
    hidden = reference.linear(reference.layer_norm(x, norm_weight, norm_bias), fc_weight, fc_bias)
    return x + reference.linear(reference.gelu(hidden), proj_weight, proj_bias)


def _fake_layernorm_gelu_mlp(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, fc_weight: Tensor, fc_bias: Tensor | None,
    proj_weight: Tensor, proj_bias: Tensor | None, partials: Tensor | None = None,
    counters: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


define(
    "layernorm_gelu_mlp(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor fc_weight, Tensor? fc_bias, "
    "Tensor proj_weight, Tensor? proj_bias, Tensor(a!)? partials=None, Tensor(b!)? counters=None, "
    "bool pdl=False) -> Tensor",
    _layernorm_gelu_mlp,
    _fake_layernorm_gelu_mlp,
)
