"""One pre-norm transformer layer, shared by the causal and the non-causal models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from bark_fast.config import GPTConfig
from bark_fast.ops.mlp import layernorm_gelu_mlp
from bark_fast.ops.norm_linear import Scratch, linear_residual, norm_linear

Attend: TypeAlias = Callable[[Tensor], Tensor]
"""From the packed projection (..., 3 * n_embd) to the merged heads (..., n_embd)."""


class LayerNorm(nn.Module):
    """Parameters of a LayerNorm, its bias optional; what follows it normalises."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None


class Linear(nn.Module):
    """Parameters of a linear layer, left to the checkpoint (no initialisation); operations multiply by them."""

    def __init__(self, size_in: int, size_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in))
        self.bias = nn.Parameter(torch.empty(size_out)) if bias else None


class Layer(nn.Module):
    """x + out(attend(qkv(LN(x)))), then x + proj(gelu(fc(LN(x)))). x: (..., rows, n_embd).

    rows: which of x's go on, None for all. The last layer of a model need not finish rows that nobody reads;
    their keys and values are all that the others want of them. `attend` returns the rows that go on.
    scratch: from `ops.norm_linear.linear_scratch`, for steps that are captured.
    """

    def __init__(self, config: GPTConfig, norm_bias: bool) -> None:
        super().__init__()
        width = config.n_embd
        self.ln_1 = LayerNorm(width, norm_bias)
        self.qkv = Linear(width, 3 * width, config.bias)
        self.out = Linear(width, width, config.bias)
        self.ln_2 = LayerNorm(width, norm_bias)
        self.fc = Linear(width, 4 * width, config.bias)
        self.proj = Linear(4 * width, width, config.bias)

    def forward(
        self, x: Tensor, attend: Attend, rows: Tensor | slice | None = None, scratch: Scratch | None = None
    ) -> Tensor:
        ln_1, ln_2, qkv, out, fc, proj = self.ln_1, self.ln_2, self.qkv, self.out, self.fc, self.proj
        seen = attend(norm_linear(x, ln_1.weight, ln_1.bias, qkv.weight, qkv.bias, scratch=scratch))
        x = linear_residual(seen, out.weight, x if rows is None else x[..., rows, :], out.bias, scratch=scratch)
        return layernorm_gelu_mlp(
            x, ln_2.weight, ln_2.bias, fc.weight, fc.bias, proj.weight, proj.bias, scratch=scratch
        )

    def weights(self) -> list[Tensor | None]:
        """As `ops.decode_layers` takes them."""
        parts = (self.ln_1, self.qkv, self.out, self.ln_2, self.fc, self.proj)
        return [tensor for part in parts for tensor in (part.weight, part.bias)]


class Embedding(nn.Module):
    """Embedding table whose weight is left to the checkpoint; models sum several in one operation."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))
