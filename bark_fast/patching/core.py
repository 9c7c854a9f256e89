"""`patch` and its company: somebody else's Bark made fast in place, and put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from bark_fast.errors import InvalidInput
from bark_fast.modules.codec import Codec
from bark_fast.modules.fine import FineGPT
from bark_fast.modules.gpt import GPT
from bark_fast.ops.norm_linear import FLOATING
from bark_fast.options import check_flag
from bark_fast.patching import hf, suno, suno_modules
from bark_fast.patching.report import Entry, PatchReport
from bark_fast.patching.swap import STATE, Patched, Policy, State, check_outermost, is_fast, restore, swap

T = TypeVar("T")
OURS = (GPT, FineGPT, Codec)


def patch(
    obj: T,
    *,
    engine: bool = True,
    dtype: str | torch.dtype | None = None,
    rng: Literal["torch", "philox"] = "torch",
    strict: bool = False,
    speculative: bool = True,
) -> T:
    """Make somebody else's Bark fast in place, with the same output; returns `obj`.

    obj: a transformers `BarkModel`, or its semantic, coarse or fine model alone; suno's module `bark`, or a
        `GPT` or `FineGPT` of it (layers only). Single objects change their class for a subclass of it; weights
        are shared, nothing in torch or transformers is replaced, other models stay as they are. In suno's
        module, functions are replaced. Patching again takes the new options.
    engine: True runs whole stages of `generate` in bark_fast's engine; False replaces layers only.
    dtype: of the weights the engine runs with, "float32", "float16" or "bfloat16": copies, unless the model
        has that dtype. None shares the model's own; suno's module multiplies in bfloat16 on a GPU that has it,
        as its own autocast does, and so does the engine, on copies.
    rng: "torch" draws from torch's generators as the original does: the same seed gives the same tokens.
        "philox" seeds bark_fast's own noise from them, which needs no host on a GPU: other tokens, as random.
    strict: raise `NotCovered` where a call is left to the original code; otherwise it is, with one warning.
    speculative: on a CPU, as of `Bark.from_pretrained`: the same tokens sooner where few rows decode,
        for a copy of the decoding weights in int8, made by the first `generate`. False: do without.

    Pages for the keys and values of the batches last seen, and graphs of their steps, are kept for the next
    call; `unpatch` lets them go.
    Patch and unpatch between calls, not while another thread is in one. Copies of weights are made anew when
    the model's are moved or written to; what is written through `.data` nobody can see: patch again after it.

    Raises TypeError for anything else than a Bark, InvalidInput for an option out of range.
    """
    policy = Policy(
        check_flag("engine", engine), _dtype(dtype), _rng(rng), check_flag("strict", strict),
        check_flag("speculative", speculative),
    )  # fmt: skip
    if not engine and (dtype is not None or rng != "torch"):
        raise InvalidInput(
            f"dtype={dtype!r} and rng={rng!r} are for the engine; with engine=False layers keep the model's "
            f"own: leave them out"
        )
    if isinstance(obj, ModuleType) and suno.is_suno_module(obj):
        suno.patch_module(obj, policy)
        return obj
    target = _module_of(obj)
    if isinstance(target, OURS):
        return obj
    chosen = [(module, mixin) for _, module, mixin in suno_modules.targets(target)]
    chosen += hf.targets(target, policy)
    modules = _restorable(target)
    before = _fast_parts(modules)
    try:
        for module in modules:
            restore(module)
        for module, mixin in chosen:
            swap(module, mixin, policy)
    except BaseException:
        _put_back(modules, before)
        raise
    return obj


def unpatch(obj: T) -> T:
    """Undo `patch`: every class is the one it was. Returns `obj`, which need not be patched.

    Raises InvalidInput where somebody put a class on top since (FSDP does): undo that first.
    """
    if isinstance(obj, ModuleType) and suno.is_suno_module(obj):
        suno.unpatch_module(obj)
        return obj
    for module in _restorable(_module_of(obj)):
        restore(module)
    return obj


@contextmanager
def patched(obj: T, **options: Any) -> Iterator[T]:
    """`patch(obj, **options)` within a `with`; afterwards `obj` is as it was before, patched or not."""
    if isinstance(obj, ModuleType) and suno.is_suno_module(obj):
        with suno.patched_module(obj):
            yield patch(obj, **options)
        return
    target = _module_of(obj)
    before = _fast_parts(target.modules())
    try:
        yield patch(obj, **options)
    finally:
        _put_back(_restorable(target), before)


def is_patched(obj: object) -> bool:
    """Whether any part of `obj` is replaced."""
    if isinstance(obj, ModuleType) and suno.is_suno_module(obj):
        return suno.is_module_patched(obj)
    return any(map(is_fast, _module_of(obj).modules()))


def patch_report(obj: object) -> PatchReport:
    """What runs fast in `obj` as it is now, what is left to the original code and why; `print` shows it."""
    if isinstance(obj, ModuleType) and suno.is_suno_module(obj):
        return suno.report_of(obj)
    target = _module_of(obj)
    if suno_modules.is_suno_model(target):
        return suno_modules.report_of(target)
    if isinstance(target, OURS):
        entry = Entry("", type(target).__name__, "bark_fast's own, fast as it is")
        return PatchReport((), (entry,))
    return hf.report_of(target)


def _restorable(target: nn.Module) -> list[nn.Module]:
    """`target` and all below it. Raises InvalidInput where `restore` would lose a class."""
    modules = list(target.modules())
    for module in modules:
        check_outermost(module)
    return modules


def _fast_parts(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, type[Patched], State]]:
    """Those that are patched, with what `_put_back` needs."""
    return [
        (module, module._bark_fast_mixin, module.__dict__[STATE])
        for module in modules
        if isinstance(module, Patched)
    ]


def _put_back(modules: Iterable[nn.Module], before: list[tuple[nn.Module, type[Patched], State]]) -> None:
    """What was patched is patched again, by the very same states; all else is not."""
    for module in modules:
        restore(module)
    for module, mixin, state in before:
        swap(module, mixin, state.policy)
        module.__dict__[STATE] = state


def _module_of(obj: object) -> nn.Module:
    """The module that `obj` is, or that torch.compile wrapped. Raises TypeError for what is no Bark."""
    inner = getattr(obj, "_orig_mod", obj)  # torch.compile(model)
    if isinstance(inner, nn.Module) and (
        isinstance(inner, OURS) or hf.is_hf_bark(inner) or suno_modules.is_suno_model(inner)
    ):
        return inner
    kind = f"the module {obj.__name__}" if isinstance(obj, ModuleType) else type(obj).__name__
    raise TypeError(
        f"cannot patch {kind}: give a transformers BarkModel, its semantic, coarse_acoustics or "
        f"fine_acoustics, suno's module bark, or a GPT or FineGPT of it"
    )


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if (found is not None and found not in FLOATING) or (dtype is not None and found is None):
        raise InvalidInput(f"dtype is {dtype!r}; choose float32, float16, bfloat16, or None: the model's")
    return found


def _rng(rng: str) -> str:
    if rng not in ("torch", "philox"):
        raise InvalidInput(f"rng is {rng!r}; choose 'torch' or 'philox'")
    return rng
