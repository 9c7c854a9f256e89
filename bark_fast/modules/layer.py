"""One pre-norm transformer layer, shared by the causal and the non-causal models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from bark_fast.config import GPTConfig
from bark_fast.ops import reference as ops

Attend: TypeAlias = Callable[[Tensor], Tensor]
"""From the packed projection (..., 3 * n_embd) to the merged heads (..., n_embd)."""


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias)


class Linear(nn.Module):
    """Linear layer whose weight is left to the checkpoint (no initialisation)."""

    def __init__(self, size_in: int, size_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in))
        self.bias = nn.Parameter(torch.empty(size_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Layer(nn.Module):
    """x + out(attend(qkv(LN(x)))), then x + proj(gelu(fc(LN(x)))). x: (..., n_embd)."""

    def __init__(self, config: GPTConfig, norm_bias: bool) -> None:
        super().__init__()
        width = config.n_embd
        self.ln_1 = LayerNorm(width, norm_bias)
        self.qkv = Linear(width, 3 * width, config.bias)
        self.out = Linear(width, width, config.bias)
        self.ln_2 = LayerNorm(width, norm_bias)
        self.fc = Linear(width, 4 * width, config.bias)
        self.proj = Linear(4 * width, width, config.bias)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.out(attend(self.qkv(self.ln_1(x))))
        y: Tensor = x + self.proj(ops.gelu(self.fc(self.ln_2(x))))
        return y


class Embedding(nn.Module):
    """Embedding table whose weight is left to the checkpoint; models sum several in one operation."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))
