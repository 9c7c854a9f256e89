"""When a layer may run fast."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bark_fast.ops.norm_linear import FLOATING
from bark_fast.patching.shared import why_not_plain


def tracing() -> bool:
    """Whether somebody records the model: torch.compile and jit take the original code, without a word."""
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state())


def why_not_now(module: nn.Module, x: Tensor, layers: Iterable[nn.Module]) -> str | None:
    """None if `module` may run fast on `x` through its plain `layers`; else the reason, in the user's words."""
    if module.training:
        return "training mode"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    if x.dtype not in FLOATING:
        return f"{x.dtype}"
    wants_gradients = torch.is_grad_enabled()
    if wants_gradients and x.requires_grad:
        return "gradients"
    for layer in layers:
        if reason := why_not_plain(layer):
            return f"a layer {reason}"
        for parameter in layer._parameters.values():
            if parameter is None:
                continue
            if parameter.dtype != x.dtype or parameter.device != x.device:
                return f"weights of {parameter.dtype} on {parameter.device} for {x.dtype} on {x.device}"
            if wants_gradients and parameter.requires_grad:
                return "gradients (call under torch.no_grad)"
    return None
