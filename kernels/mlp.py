"""x + proj(gelu(fc(LN(x)))): two launches at decode, LN + fc + GELU and proj + residual.

At one row every product streams its weight once, and the hidden row, 4 k wide, crosses from one launch to the
other through the L2, rounded to the weights' dtype.
"""

from __future__ import annotations

from torch import Tensor

from bark_fast.kernels.norm_linear import linear
from bark_fast.kernels.target import on_its_device


@on_its_device
def layernorm_gelu_mlp(
    x: Tensor,
    norm: tuple[Tensor, Tensor | None],
    fc: tuple[Tensor, Tensor | None],
    proj: tuple[Tensor, Tensor | None],
    *,
    scratch: tuple[Tensor, Tensor] | None = None,
    pdl: bool = False,
) -> Tensor:
    """x + proj(gelu(fc(LN(x)))) for x (rows, k), in x's dtype; norm, fc and proj are (weight, bias or None)."""
    hidden = linear(x, *fc, norm=norm, gelu=True, scratch=scratch, pdl=pdl)
    return linear(hidden, *proj, residual=x, scratch=scratch, pdl=pdl)
