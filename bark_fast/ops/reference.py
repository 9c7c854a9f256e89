"""The operations of Bark's transformers in plain torch: any device, any floating dtype.

Every other backend is held against these. Weights are as `torch.nn.Linear` keeps them, (out, in).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """LayerNorm over the last dimension, eps 1e-5, bias optional (torch accumulates in fp32)."""
    return F.layer_norm(x, weight.shape, weight, bias, LAYER_NORM_EPS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias. x: (..., in) -> (..., out)."""
    return F.linear(x, weight, bias)


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x) with the exact error function, as suno and Hugging Face use it."""
    return F.gelu(x)


def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, per head.

    query: (..., heads, time, head_dim). key, value: (..., heads, keys, head_dim), keys >= time when causal.
    Causal is aligned bottom-right: the last query sees every key. Returns the shape of query.
    """
    time, keys = query.shape[-2], key.shape[-2]
    if not causal or time == 1:
        return F.scaled_dot_product_attention(query, key, value)
    if time == keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    visible = torch.ones(time, keys, dtype=torch.bool, device=query.device).tril(keys - time)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
