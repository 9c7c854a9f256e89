"""Whether a Hugging Face model, or a block of one, still computes what transformers wrote."""

from __future__ import annotations

from typing import Any

from torch import nn

from bark_fast.config import GPTConfig
from bark_fast.patching.shared import Names, places_of

MODULE = "transformers.models.bark.modeling_bark"
_OVERRIDDEN = ("forward", "_sample", "prepare_inputs_for_generation")


def why_not_block(block: Any) -> str | None:
    """None if `block` does with its layers what transformers' block does; asked at every call."""
    attn, mlp = block.attn, block.mlp
    if type(attn).__name__ != "BarkSelfAttention":
        return f"attention of class {type(attn).__name__}"
    for part in (block, attn, mlp):
        kind = _original(part)
        if kind.__module__ != MODULE:
            return f"a block with a {kind.__name__} of {kind.__module__}"
    if type(mlp.gelu) is not nn.GELU or mlp.gelu.approximate != "none":
        return f"an activation other than the exact GELU, {mlp.gelu}"
    if "_attn" in vars(attn):
        return "attention that was replaced"
    return next(filter(None, map(_why_not_dropout, (attn.attn_dropout, attn.resid_dropout, mlp.dropout))), None)


def why_not_model(model: Any, config: GPTConfig, names: Names, causal: bool) -> str | None:
    """None if `model` does with its blocks and parameters what transformers' model does.

    names: of Bark's parameters within it. Its blocks have been looked at.
    """
    kind = _original(model)
    for name in _OVERRIDDEN:
        method = getattr(kind, name, None)
        if method is not None and not method.__module__.startswith("transformers."):
            return f"a {kind.__name__} with a {name} of its own"
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


def _original(module: nn.Module) -> type:
    kind: type = getattr(type(module), "_bark_fast_original", type(module))
    return kind


def _why_not_dropout(module: nn.Module) -> str | None:
    if type(module) is not nn.Dropout:
        return f"a {type(module).__name__} in place of a dropout"
    return "active dropout" if module.training and module.p > 0 else None
