"""Whether a Hugging Face model, or a block of one, still computes what transformers wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from bark_fast.config import GPTConfig
from bark_fast.patching.shared import Names, places_of

MODULE = "transformers.models.bark.modeling_bark"
_OF_ATTENTION = ("forward", "_attn", "_split_heads", "_merge_heads")
_OF_MODELS = ("forward", "_sample", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
_CAUSAL: WeakKeyDictionary[nn.Module, tuple[ReferenceType[Tensor], int]] = WeakKeyDictionary()
"""Attentions whose mask was found to be causal, and which tensor of which version it was."""


def why_not_block(block: Any) -> str | None:
    """None if `block` does with its layers what transformers' block does; asked at every call."""
    attn, mlp = block.attn, block.mlp
    if type(attn).__name__ != "BarkSelfAttention":
        return f"attention of class {type(attn).__name__}"
    for part in (block, attn, mlp):
        kind = _original(part)
        if kind.__module__ != MODULE:
            return f"a block with a {kind.__name__} of {kind.__module__}"
        if name := _replaced(part, _OF_ATTENTION if part is attn else ("forward",)):
            return f"a {kind.__name__} whose {name} was replaced"
    if type(mlp.gelu) is not nn.GELU or mlp.gelu.approximate != "none":
        return f"an activation other than the exact GELU, {mlp.gelu}"
    if attn.is_causal and not _masks_the_future(attn):
        return "attention with a causal mask of its own"
    return next(filter(None, map(_why_not_dropout, (attn.attn_dropout, attn.resid_dropout, mlp.dropout))), None)


def why_not_model(model: Any, config: GPTConfig, names: Names, causal: bool) -> str | None:
    """None if `model` does with its blocks and parameters what transformers' model does.

    names: of Bark's parameters within it. Its blocks have been looked at.
    """
    if name := _replaced(model, _OF_MODELS):
        return f"a {_original(model).__name__} with a {name} of its own"
    if reason := _why_not_dropout(model.drop):
        return reason
    for block in model.layers:
        attn = block.attn
        if (attn.num_heads, attn.head_dim, attn.is_causal) != (config.n_head, config.head_dim, causal):
            return "attention with other heads, or another mask, than the model's configuration has"
    found = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if added := found - {f"{path}.{leaf}" for _, path, leaf, _ in places_of(config, names)}:
        return f"{min(added)}, a parameter that Bark has not"
    return None


def _replaced(module: nn.Module, names: Iterable[str]) -> str | None:
    """The first of these methods that transformers did not write: of the class, or of the object alone.

    A fast class is passed over, and so is an object's own forward, which is a hook (`is_hooked`). What wraps
    one of theirs is told by where it was defined, not by its name.
    """
    kind = _original(module)
    for name in names:
        method = getattr(kind, name, None)
        where = getattr(method, "__globals__", {}).get("__name__", "")
        if method is not None and not where.startswith("transformers."):
            return name
        if name != "forward" and name in vars(module):
            return name
    return None


def _masks_the_future(attn: Any) -> bool:
    """Whether the buffer by which they mask is what they made it; read anew only when it was written to."""
    mask = attn.bias
    if not isinstance(mask, Tensor) or mask.is_meta:
        return False
    version = 0 if mask.is_inference() else mask._version
    known = _CAUSAL.get(attn)
    if known is None or known[0]() is not mask or known[1] != version:
        size = mask.shape[-1]
        causal = torch.ones(size, size, dtype=torch.bool, device=mask.device).tril()
        if mask.dtype != torch.bool or mask.shape != (1, 1, size, size) or not mask[0, 0].equal(causal):
            return False
        _CAUSAL[attn] = ref(mask), version
    return True


def _original(module: nn.Module) -> type:
    kind: type = getattr(type(module), "_bark_fast_original", type(module))
    return kind


def _why_not_dropout(module: nn.Module) -> str | None:
    if type(module) is not nn.Dropout:
        return f"a {type(module).__name__} in place of a dropout"
    return "active dropout" if module.training and module.p > 0 else None
