"""Linear layers with everything that can stand around them, their definition in fp64, and what may differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bark_fast import extension

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton runs on CPU tensors only interpreted, where there is no GPU"
)
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["torch", pytest.param("triton", marks=interpreted)]
"""For tests on CPU tensors."""


@dataclass(frozen=True)
class Case:
    """act(LN(x) @ weight.T + bias) + residual; norm, bias and residual may be missing."""

    x: Tensor
    weight: Tensor
    norm: tuple[Tensor, Tensor | None] | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    gelu: bool = False

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype."""
        changed = {name: t.to(dtype) for name, t in vars(self).items() if isinstance(t, Tensor)}
        if self.norm is not None:
            weight, bias = self.norm
            changed["norm"] = (weight.to(dtype), None if bias is None else bias.to(dtype))
        return replace(self, **changed)

    def by_torch(self, eps: float = 1e-5, approximate: str = "none") -> Tensor:
        """In the dtype at hand, rounding after every operation; other arguments than the defaults are wrong."""
        y = self.x
        if self.norm is not None:
            y = F.layer_norm(y, y.shape[-1:], *self.norm, eps)
        y = F.linear(y, self.weight, self.bias)
        if self.gelu:
            y = F.gelu(y, approximate=approximate)
        return y if self.residual is None else y + self.residual

    def expected(self) -> Tensor:
        """In fp64, from the same numbers."""
        return self.to(torch.float64).by_torch()

    def among_nan(self) -> Case:
        """The same, with NaN before, behind and between what lies in memory."""

        def moved(t: Tensor) -> Tensor:
            padded = torch.full([size + 40 for size in t.shape], float("nan"), dtype=t.dtype)
            return padded[tuple(slice(20, 20 + size) for size in t.shape)].copy_(t)

        changed: dict[str, Any] = {name: moved(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        if self.norm is not None:
            weight, bias = self.norm
            changed["norm"] = (moved(weight), None if bias is None else moved(bias))
        return replace(self, **changed)

    def bound(self) -> float:
        """Twice the error of torch in this dtype, and one rounding of the largest value."""
        expected = self.expected()
        floor = torch.finfo(self.x.dtype).eps * expected.abs().max().item()
        return 2 * error(self.by_torch(), expected) + floor


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference."""
    return (got.double() - expected).abs().max().item()


def by_extension(c: Case, threads: int = 1) -> Tensor:
    """The case by the compiled extension on the CPU, into rows that lie apart."""
    module = extension.load()
    assert module is not None
    norm_weight, norm_bias = c.norm or (None, None)
    room = torch.full((len(c.x), len(c.weight) + 5), 7.0, dtype=c.x.dtype)
    out = room[:, : len(c.weight)]
    module.linear(c.x, norm_weight, norm_bias, c.weight, c.bias, c.residual, out, c.gelu, threads)
    assert (room[:, len(c.weight) :] == 7).all()  # what lies between the rows stays
    return out


def case(
    rows: int, n: int, k: int, dtype: torch.dtype = torch.float32, device: str = "cpu", *,
    norm: bool = True, norm_bias: bool = True, bias: bool = True, residual: bool = True, gelu: bool = True,
) -> Case:  # fmt: skip
    """Random numbers; x and residual have strided rows, weight is a slice of the rows of a larger one."""
    random = torch.Generator().manual_seed(rows * 1_000_003 + n * 1009 + k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    pair = (1 + draw(k) / 4, draw(k) / 4 if norm_bias else None) if norm else None
    return Case(
        x=draw(rows, k + 16)[:, :k],
        weight=(draw(n + 8, k) / k**0.5)[3 : n + 3],
        norm=pair,
        bias=draw(n) if bias else None,
        residual=draw(rows, n + 16)[:, :n] if residual else None,
        gelu=gelu,
    )


def _without(c: Case, columns: Tensor) -> Tensor:
    return replace(c, weight=c.weight.index_fill(1, columns, 0)).by_torch()


MUTATIONS: dict[str, Callable[[Case], Tensor]] = {
    "no eps": lambda c: c.by_torch(eps=0.0),
    "bias missing": lambda c: replace(c, bias=None).by_torch(),
    "tanh GELU": lambda c: c.by_torch(approximate="tanh"),
    "norm bias missing": lambda c: replace(c, norm=c.norm and (c.norm[0], None)).by_torch(),
    "residual missing": lambda c: replace(c, residual=None).by_torch(),
    "wrong row": lambda c: c.by_torch().roll(1, 0),
    "weight off by a line": lambda c: replace(c, weight=c.weight.roll(1, 0)).by_torch(),
    "first 32 columns missing": lambda c: _without(c, torch.arange(32)),
    "last column missing": lambda c: _without(c, torch.tensor([c.weight.shape[1] - 1])),
    "first 64 columns twice": lambda c: replace(
        c, weight=torch.cat([c.weight[:, :64] * 2, c.weight[:, 64:]], 1)
    ).by_torch(),
}
"""What may go wrong with a case that has everything, by torch: a test's bound must notice each."""
