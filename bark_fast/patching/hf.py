"""Which parts of a Hugging Face Bark model are replaced, and by what."""

from __future__ import annotations

from typing import Any

from torch import nn

from bark_fast.errors import NotCovered
from bark_fast.patching.conditions import is_hooked, why_hooked, why_not_called
from bark_fast.patching.hf_build import MODULE
from bark_fast.patching.hf_layers import FastBlock, standing_reason
from bark_fast.patching.hf_models import FastCausal, FastCoarse, FastFine, FastSemantic
from bark_fast.patching.report import Entry, PatchReport
from bark_fast.patching.swap import Patched, Policy, is_fast

_MODELS: dict[str, type[Patched]] = {
    "BarkSemanticModel": FastSemantic,
    "BarkCoarseModel": FastCoarse,
    "BarkFineModel": FastFine,
}
_ACCEPTED = {"BarkModel", *_MODELS}


def is_hf_bark(obj: nn.Module) -> bool:
    """Whether `obj` is a transformers BarkModel, one of its three transformers, or of a subclass of these."""
    return bool(_names(obj) & _ACCEPTED)


def targets(obj: nn.Module, policy: Policy) -> list[tuple[nn.Module, type[Patched]]]:
    """The modules of `obj` that are replaced, and the mixin of each."""
    found: list[tuple[nn.Module, type[Patched]]] = []
    for module in obj.modules():
        names = _names(module)
        if "BarkBlock" in names:
            found.append((module, FastBlock))
        elif policy.engine:
            found += [(module, mixin) for name, mixin in _MODELS.items() if name in names]
    return found


def report_of(obj: nn.Module) -> PatchReport:
    """What runs fast in `obj` now, and what does not."""
    replaced: list[Entry] = []
    left: list[Entry] = []
    copied = 0
    for path, module in obj.named_modules():
        names = _names(module)
        kind = type(module).__name__
        if "BarkBlock" in names:
            reason: str | None = "not patched"
            if is_fast(module):
                reason = standing_reason(module) or _training(module) or why_not_called(module)
            entry = Entry(path, kind, reason or "fused attention, LayerNorm and MLP")
            (left if reason else replaced).append(entry)
        elif names & _MODELS.keys():
            reason, more = _of_model(module)
            copied += more
            what = "generate in the engine" if isinstance(module, FastCausal) else "fused forward"
            (left if reason else replaced).append(Entry(path, kind, reason or what))
    codec = getattr(obj, "codec_model", None)
    if codec is not None:
        left.append(Entry("codec_model", type(codec).__name__, "about 1 % of the time"))
    return PatchReport(tuple(replaced), tuple(left), copied)


def _of_model(module: nn.Module) -> tuple[str | None, int]:
    """Why the engine does not run a model, if so, and the bytes it copies."""
    if not isinstance(module, (FastCausal, FastFine)):
        return "generate as it was (engine=False)" if any(map(is_fast, module.modules())) else "not patched", 0
    reason = _training(module)
    if isinstance(module, FastCausal):
        reason = reason or why_hooked(module)
    else:
        reason = reason or why_not_called(module) or ("a layer with a hook" if is_hooked(module) else None)
    try:
        return reason, module.bound().held_twice
    except NotCovered as uncovered:
        return reason or str(uncovered), 0


def _training(module: nn.Module) -> str | None:
    return "training mode" if module.training else None


def _names(module: Any) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__ if kind.__module__ == MODULE}
