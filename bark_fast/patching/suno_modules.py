"""Fast forwards for the blocks of suno's `GPT` and `FineGPT`, on their own parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from bark_fast.ops.attention import attention
from bark_fast.ops.mlp import layernorm_gelu_mlp
from bark_fast.ops.norm_linear import linear_residual, norm_linear
from bark_fast.patching.conditions import tracing, why_not_now
from bark_fast.patching.report import Entry, PatchReport
from bark_fast.patching.shared import why_not_plain
from bark_fast.patching.swap import Patched, is_fast

_MODELS = {("bark.model", "GPT"), ("bark.model_fine", "FineGPT")}
_BLOCKS = {("bark.model", "Block"), ("bark.model_fine", "FineBlock")}
_ATTENTIONS = {("bark.model", "CausalSelfAttention"), ("bark.model_fine", "NonCausalSelfAttention")}
_SUNO = _MODELS | _BLOCKS | _ATTENTIONS | {("bark.model", "MLP")}
_CONTAINERS = (nn.ModuleDict, nn.ModuleList)


def is_suno_model(obj: object) -> bool:
    """Whether `obj` is a `GPT` or `FineGPT` of suno's `bark`, or of a class derived from one."""
    return isinstance(obj, nn.Module) and any(_name(kind) in _MODELS for kind in type(obj).__mro__)


def targets(obj: nn.Module) -> list[tuple[str, nn.Module, type[Patched]]]:
    """Which sub-modules of a suno `GPT` or `FineGPT` get which mixin; nothing for another object."""
    if not is_suno_model(obj):
        return []
    mixins: dict[tuple[str, str], type[Patched]] = {
        ("bark.model", "Block"): FastSunoBlock,
        ("bark.model_fine", "FineBlock"): FastSunoFineBlock,
    }
    named = ((name, module, mixins.get(_name(type(module)))) for name, module in obj.named_modules())
    return [(name, module, mixin) for name, module, mixin in named if mixin is not None]


def report_of(obj: nn.Module) -> PatchReport:
    """Which blocks of a suno model run fast as they are now, and why others do not."""
    replaced: list[Entry] = []
    left: list[Entry] = []
    for name, block, _ in targets(obj):
        reason = (why_not_suno(block, within=True) if is_fast(block) else "not patched") or (
            "training mode" if block.training else None
        )
        entry = Entry(name, type(block).__name__, reason or "fused attention, LayerNorm and MLP")
        (left if reason else replaced).append(entry)
    return PatchReport(tuple(replaced), tuple(left))


class FastSunoBlock(Patched):
    """`bark.model.Block` in fewer passes over memory."""

    def forward(self, x: Tensor, past_kv: Any = None, use_cache: bool = False) -> Any:
        if (
            not torch.compiler.is_compiling()
        ):  # a compiler fuses the original, and cannot look through our checks
            reason = _why_not_here(self, x) or _why_not_past(self, x, past_kv)
            if reason is None:
                return self._block(x, past_kv, use_cache)
            self._fast.policy.decline(reason)
        return super().forward(x, past_kv=past_kv, use_cache=use_cache)  # type: ignore[misc]

    def _block(self, x: Tensor, past_kv: Any, use_cache: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        query, key, value = _project(self, x)
        if past_kv is not None:
            key, value = torch.cat((past_kv[0], key), dim=-2), torch.cat((past_kv[1], value), dim=-2)
        # after a cache suno masks nothing
        seen = attention(query, key, value, causal=past_kv is None)
        return _finish(self, x, seen), (key, value) if use_cache is True else None


class FastSunoFineBlock(Patched):
    """`bark.model_fine.FineBlock` in fewer passes over memory."""

    def forward(self, x: Tensor) -> Any:
        if not tracing():
            reason = _why_not_here(self, x)
            if reason is None:
                return _finish(self, x, attention(*_project(self, x), causal=False))
            self._fast.policy.decline(reason)
        return super().forward(x)  # type: ignore[misc]


def _project(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (batch, heads, time, head_dim), views of one packed projection."""
    norm, attn = block.ln_1, block.attn
    qkv = norm_linear(x, norm.weight, norm.bias, attn.c_attn.weight, attn.c_attn.bias)
    query, key, value = qkv.view(*x.shape[:2], 3, attn.n_head, -1).permute(2, 0, 3, 1, 4)
    return query, key, value


def _finish(block: Any, x: Tensor, seen: Tensor) -> Tensor:
    """What follows attention in a block."""
    out, norm, fc, proj = block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj
    x = linear_residual(seen.transpose(1, 2).reshape(x.shape), out.weight, x, out.bias)
    return layernorm_gelu_mlp(x, norm.weight, norm.bias, fc.weight, fc.bias, proj.weight, proj.bias)


def why_not_suno(root: nn.Module, within: bool = False) -> str | None:
    """None if `root` and all in it compute what suno wrote, in inference; else what differs.

    within: hooks of `root` itself do not matter, since it is called as a module.
    """
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "calls under global hooks"
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if reason := _why_not_module(module, hooked=not (within and module is root)):
            return reason
        waiting += module._modules.values()  # type: ignore[arg-type]  # none of these has an empty place
    return None


def _why_not_module(module: nn.Module | None, hooked: bool) -> str | None:
    if module is None:
        return "a model with a missing part"
    kind = getattr(type(module), "_bark_fast_original", type(module))
    name = f"a {kind.__name__}"
    if kind in _CONTAINERS:
        return None
    part: Any = module
    if hooked and (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__):
        return f"{name} with a hook"
    if kind is nn.Dropout:
        return "active dropout" if module.training and part.p > 0 else None
    if kind is nn.GELU:
        return None if part.approximate == "none" else f"GELU approximated by {part.approximate}"
    where = _name(kind)
    if where not in _SUNO:
        reason = why_not_plain(module)
        return None if reason is None else f"a layer {reason}"
    if getattr(kind.forward, "__module__", None) != kind.__module__:
        return f"{name} whose forward was replaced"
    if where in _ATTENTIONS and (part.dropout or not part.flash):
        return "attention with dropout or without SDPA"  # suno drops out whenever this is set, in inference too
    return None


def _why_not_here(block: Any, x: Tensor) -> str | None:
    """None if a call of `block` on `x` is plain inference."""
    if type(x) is not Tensor or x.dim() != 3 or not x.numel():
        return "an input that is no (batch, time, n_embd) tensor"
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "calls under global hooks"
    attn, mlp = block.attn, block.mlp
    # as `why_not_suno`, but what follows looks at the layers already, and this is done for every token
    for module in (attn, mlp, attn.attn_dropout, attn.resid_dropout, mlp.gelu, mlp.dropout):
        if reason := _why_not_module(module, hooked=True):
            return reason
    if x.shape[-1] != attn.n_embd:
        return f"an input {x.shape[-1]} wide"
    return why_not_now(block, x, (block.ln_1, attn.c_attn, attn.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj))


def _why_not_past(block: Any, x: Tensor, past_kv: Any) -> str | None:
    """None if the cache is absent or fits `x`."""
    if past_kv is None:
        return None
    heads = block.attn.n_head
    past = [*past_kv[:2]] if isinstance(past_kv, (tuple, list)) else []
    fits = len(past) == 2 and all(
        type(one) is Tensor
        and one.dim() == 4
        and (one.shape[0], one.shape[1], one.shape[3]) == (len(x), heads, x.shape[-1] // heads)
        and (one.dtype, one.device) == (x.dtype, x.device)
        and not (torch.is_grad_enabled() and one.requires_grad)
        for one in past
    )
    return None if fits and past[0].shape == past[1].shape else "a past_kv of another kind"


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__name__
