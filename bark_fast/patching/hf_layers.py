"""Hugging Face's `BarkBlock` with fused operations, for every loop that runs the model's forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bark_fast.ops.attention import attention
from bark_fast.ops.mlp import layernorm_gelu_mlp
from bark_fast.ops.norm_linear import linear_residual, norm_linear
from bark_fast.patching.conditions import CACHE_NAMES, cache_in, is_hooked, tracing, why_not_now
from bark_fast.patching.hf_build import why_not_block
from bark_fast.patching.swap import Patched

_UNDERSTOOD = {
    *CACHE_NAMES,
    "attention_mask",
    "use_cache",
    "output_attentions",
    "head_mask",
    "cache_position",
}


class FastBlock(Patched):
    """`BarkBlock`: x + out_proj(attn(att_proj(LN(x)))), then x + mlp(LN(x)). x: (batch, time, hidden).

    Masks and caches are theirs: an additive mask is added as they add it, the cache says what keys there are.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        block: Any = self
        if not tracing():
            reason = _why_not(block, hidden_states, args, kwargs)
            if reason is None:
                return _forward(block, hidden_states, **kwargs), None
            self._fast.policy.decline(reason)
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


def standing_reason(block: Any) -> str | None:
    """Why a block never runs fast, as it stands; None if it does."""
    if reason := why_not_block(block):
        return reason
    if is_hooked(block):
        return "a layer with a hook"
    # the question is not how a call may go, only what the layers are
    x = next(block.parameters(), torch.empty(0)).detach()
    with torch.no_grad():
        return why_not_now(_EVALUATING, x, _layers(block))


_EVALUATING = nn.Identity().eval()


def _layers(block: Any) -> tuple[nn.Module, ...]:
    attn, mlp = block.attn, block.mlp
    return (block.layernorm_1, attn.att_proj, attn.out_proj, block.layernorm_2, mlp.in_proj, mlp.out_proj)


def _why_not(block: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if args or not kwargs.keys() <= _UNDERSTOOD:
        return "unknown arguments of a block"
    if kwargs.keys() >= set(CACHE_NAMES):
        return "a cache given twice"
    if kwargs.get("output_attentions"):
        return "output_attentions"
    if kwargs.get("head_mask") is not None:
        return "head_mask"
    mask = kwargs.get("attention_mask")
    if mask is not None and not (mask.dim() == 4 and mask.is_floating_point()):
        return f"an attention mask of {mask.dtype} with {mask.dim()} dimensions"
    if is_hooked(block):
        return "a layer with a hook"
    if reason := why_not_block(block):
        return reason
    if torch.is_grad_enabled() and _learns(mask, cache_in(kwargs), block.attn.layer_idx):
        return "gradients"
    return why_not_now(block, x, _layers(block))


def _learns(mask: Tensor | None, cache: Any, layer: int) -> bool:
    """Whether gradients go to the mask, or to keys and values so far, as in prefix tuning."""
    layers = getattr(cache, "layers", ())
    so_far = [layers[layer]] if layer is not None and layer < len(layers) else []
    tensors = [mask, *(getattr(one, name, None) for one in so_far for name in ("keys", "values"))]
    return any(isinstance(one, Tensor) and one.requires_grad for one in tensors)


def _forward(block: Any, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    attn, mlp, ln_1, ln_2 = block.attn, block.mlp, block.layernorm_1, block.layernorm_2
    batch, time, _ = x.shape
    qkv = norm_linear(x, ln_1.weight, ln_1.bias, attn.att_proj.weight, attn.att_proj.bias)
    query, key, value = qkv.view(batch, time, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    cache = cache_in(kwargs)
    if cache is not None:
        # transformers before 5.8 says where the tokens go; a static cache needs it
        place = ({"cache_position": kwargs["cache_position"]},) if "cache_position" in kwargs else ()
        key, value = cache.update(key, value, attn.layer_idx, *place)
    if attention_mask is None:
        seen = attention(query, key, value, causal=attn.is_causal)
    else:
        seen = scaled_dot_product_attention(
            query, key, value, attn_mask=_bias(attn, attention_mask, query, key)
        )
    merged = seen.transpose(1, 2).reshape(batch, time, -1)
    x = linear_residual(merged, attn.out_proj.weight, x, attn.out_proj.bias)
    return layernorm_gelu_mlp(
        x, ln_2.weight, ln_2.bias, mlp.in_proj.weight, mlp.in_proj.bias, mlp.out_proj.weight, mlp.out_proj.bias
    )


def _bias(attn: Any, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """What their attention adds to the scores: `mask`, and the dtype's minimum where the causal mask forbids.

    They replace forbidden scores by the minimum, which swallows any score it is added to.
    """
    time, keys = query.shape[2], key.shape[2]
    mask = mask.to(query.dtype).expand(-1, -1, time, -1)
    if not attn.is_causal:
        return mask
    forbidden = attn.bias[:, :, keys - time : keys, :keys].logical_not()
    lowest = torch.zeros_like(forbidden, dtype=query.dtype).masked_fill_(
        forbidden, torch.finfo(query.dtype).min
    )
    return lowest + mask
