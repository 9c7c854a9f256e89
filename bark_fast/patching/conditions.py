"""When a layer may run fast."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from bark_fast.ops.norm_linear import FLOATING
from bark_fast.patching.shared import why_not_plain

# what transformers calls the keys and values so far: `past_key_values` before 5.24
CACHE_NAMES = ("cache", "past_key_values")


def cache_in(kwargs: dict[str, Any]) -> Any:
    """The cache among a Hugging Face forward's arguments, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def tracing() -> bool:
    """Whether somebody records the model: torch.compile and jit take the original code, without a word."""
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state())


def is_hooked(module: nn.Module) -> bool:
    """Whether anything below `module` has a forward hook, or a forward of its own as accelerate gives one."""
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    inner = module.modules()
    next(inner)
    return any(one._forward_hooks or one._forward_pre_hooks or "forward" in one.__dict__ for one in inner)


def why_hooked(model: nn.Module) -> str | None:
    """None if nobody hooks into `model`, or anything below it; else how, in the user's words."""
    if is_hooked(model) or model._forward_hooks or model._forward_pre_hooks or hasattr(model, "_hf_hook"):
        return "a model with a hook (accelerate's offloading is one)"
    if "forward" in vars(model):  # as of `model.forward = torch.compile(model.forward)`
        return "a model whose forward was replaced"
    return None


def why_not_called(module: nn.Module) -> str | None:
    """None if calling `module` comes to its class's forward; else who stands in front of it."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "torch.compile, which records the original"
    # accelerate wraps the bound method that it found, and keeps it by this name
    found = vars(module).get("_old_forward", vars(module).get("forward"))
    if found is not None and getattr(found, "__func__", None) is not type(module).forward:
        return "a forward of its own"
    return None


def why_not_now(module: nn.Module, x: Tensor, layers: Iterable[nn.Module]) -> str | None:
    """None if `module` may run fast on `x` through its plain `layers`; else the reason, in the user's words."""
    if module.training:
        return "training mode"
    if x.dtype not in FLOATING or x.is_meta:
        return f"{x.dtype} on {x.device}"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    if torch._C._are_functorch_transforms_active():
        return "function transforms"
    if forward_ad._current_level >= 0:
        return "forward-mode gradients"
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
