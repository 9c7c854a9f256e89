"""The operations of Bark's transformers in plain torch: any device, any floating dtype.

Every other backend is held against these. Weights are as `torch.nn.Linear` keeps them, (out, in).
"""

from __future__ import annotations

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
