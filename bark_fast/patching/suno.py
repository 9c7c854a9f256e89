"""suno's `bark` module, patched as a whole: its generating functions run in the engine.

Every name in `bark`, `bark.api` and `bark.generation` that refers to one of the functions in `REPLACED` refers
to ours while patched. Whoever took one of ours along calls the original through it afterwards.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from bark_fast.errors import NotCovered
from bark_fast.patching.report import Entry, PatchReport
from bark_fast.patching.suno_engine import autocast_dtype
from bark_fast.patching.suno_files import opening_suno_files
from bark_fast.patching.suno_modules import targets
from bark_fast.patching.suno_stages import Refused, SunoStages
from bark_fast.patching.swap import STATE, Policy, is_fast, restore, swap

Function = Callable[..., Any]

STAGES = ("generate_text_semantic", "generate_coarse", "generate_fine")
REPLACED = (*STAGES, "codec_decode", "_load_model")
_CONTENTS = (*REPLACED, "preload_models", "load_model", "_load_history_prompt", "_tokenize", "models",
             "models_devices", "OFFLOAD_CPU", "TEXT_ENCODING_OFFSET", "COARSE_INFER_TOKEN", "tqdm")  # fmt: skip


def is_suno_module(obj: object) -> bool:
    """Whether `obj` is suno's package `bark`, or its `bark.generation` or `bark.api`, by what they hold."""
    return isinstance(obj, ModuleType) and _generation_of(obj) is not None


def patch_module(module: ModuleType, policy: Policy) -> None:
    """Patch what `module` belongs to; what is patched already gets the new policy."""
    generation = _checked(module)
    known: ModulePatch | None = generation.__dict__.get(STATE)
    if known is not None and known.displaced():  # by importlib.reload
        unpatch_module(module)
        known = None
    patch = known or ModulePatch(generation, policy)
    try:
        if known is None:
            generation.__dict__[STATE] = patch
            patch.install()
        patch.obey(policy)
    except BaseException:
        if known is None:
            unpatch_module(module)
        raise


def unpatch_module(module: ModuleType) -> None:
    """Undo `patch_module`; nothing happens where nothing is patched."""
    generation = _checked(module)
    patch: ModulePatch | None = generation.__dict__.get(STATE)
    if patch is not None:
        patch.remove()
        del generation.__dict__[STATE]


@contextmanager
def patched_module(module: ModuleType) -> Iterator[None]:
    """Whatever is patched within, afterwards `module` is as it was before, patched or not."""
    generation = _checked(module)
    before: ModulePatch | None = generation.__dict__.get(STATE)
    policy = before.policy if before is not None else None
    try:
        yield
    finally:
        if policy is not None:
            patch_module(module, policy)
        else:
            unpatch_module(module)


def is_module_patched(module: ModuleType) -> bool:
    """Whether `patch_module` is in force."""
    generation = _generation_of(module)
    return generation is not None and STATE in generation.__dict__


def report_of(module: ModuleType) -> PatchReport:
    """What is replaced. Bytes are those held at present: copies are made when a stage first runs."""
    generation = _checked(module)
    patch: ModulePatch | None = generation.__dict__.get(STATE)
    return (patch or ModulePatch(generation, Policy(True, None, "torch", False))).report()


class ModulePatch:
    """The replacements in one `bark`, what they need, and how to take them out."""

    def __init__(self, generation: ModuleType, policy: Policy) -> None:
        self.generation, self.policy = generation, policy
        self.stages = SunoStages(generation)
        self.active = True
        self.ours: dict[str, tuple[Function, Function]] = {}  # by name: the original, and what stands for it
        self.swapped: WeakSet[nn.Module] = WeakSet()

    def install(self) -> None:
        """Put the replacements in place."""
        for name in REPLACED:
            original = getattr(self.generation, name)
            if not self._is_own(original):
                continue  # somebody put another there, which is to be called
            if name in STAGES:
                ours = self._stage(original, getattr(self.stages, name))
            else:
                ours = self._codec(original) if name == "codec_decode" else self._loader(original)
            self.ours[name] = (original, _dressed(ours, original))
        self._rename({id(original): ours for original, ours in self.ours.values()})

    def remove(self) -> None:
        """Put the originals back, wherever ours still stand."""
        self.active = False
        current = self.displaced()
        self._rename({id(ours): current.get(name, original) for name, (original, ours) in self.ours.items()})
        self._slow_blocks()
        self.stages.models.forget()

    def displaced(self) -> dict[str, Function]:
        """Functions of suno's own, by name, that stand where ours stood, since the module was reloaded."""
        found: dict[str, Function] = {}
        for name, (_, ours) in self.ours.items():
            one: Any = getattr(self.generation, name, None)
            if self._is_own(one) and one is not ours:
                found[name] = one
        return found

    def _is_own(self, function: Any) -> bool:
        return isinstance(function, FunctionType) and function.__globals__ is vars(self.generation)

    def obey(self, policy: Policy) -> None:
        """Follow another policy from now on."""
        self._slow_blocks()
        self.policy = policy
        if not policy.engine:
            self.stages.models.forget()
            self._fast_blocks(self.generation.models.values())

    def report(self) -> PatchReport:
        """See `report_of`."""
        name = self.generation.__name__
        if not self.policy.engine:
            how = "the original, over blocks with a fast forward"
        elif self.policy.dtype is not None:
            how = f"runs in the engine, weights in {self.policy.dtype}"
        elif dtype := autocast_dtype(self.generation, torch.device("cuda")):
            how = f"runs in the engine, on a GPU with the weights in {dtype}, as suno's autocast multiplies"
        else:
            how = "runs in the engine"
        what = {
            **dict.fromkeys(STAGES, how),
            "codec_decode": "the original, without recording gradients",
            "_load_model": "reads files without running what is pickled in them",
        }
        displaced = self.displaced()
        replaced = [Entry(f"{name}.{one}", "function", what[one]) for one in self.ours if one not in displaced]
        reason = "is not suno's own" if self.ours else "not patched"
        left = [Entry(f"{name}.{one}", "function", reason) for one in REPLACED if one not in self.ours]
        left += [Entry(f"{name}.{one}", "function", "was reloaded: patch again") for one in displaced]
        return PatchReport(tuple(replaced), tuple(left), self.stages.models.copied_bytes)

    def _stage(self, original: Function, method: Function) -> Function:
        signature, known = inspect.signature(original), inspect.signature(method).parameters

        def stage(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return original(*args, **kwargs)
            policy = self.policy
            if not policy.engine:
                self._fast_blocks(self.generation.models.values())
                return original(*args, **kwargs)
            reason = None
            try:
                return method(policy, **_arguments(signature, known, args, kwargs))
            except Refused:
                pass
            except NotCovered as error:
                reason = str(error)
            if reason is not None:
                policy.decline(reason)
            return original(*args, **kwargs)

        return stage

    def _codec(self, original: Function) -> Function:
        def codec_decode(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return original(*args, **kwargs)
            with torch.no_grad():  # suno records gradients here, and drops them
                return original(*args, **kwargs)

        return codec_decode

    def _loader(self, original: FunctionType) -> Function:
        def _load_model(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return original(*args, **kwargs)
            loaded = opening_suno_files(original)(*args, **kwargs)
            if not self.policy.engine:
                self._fast_blocks([loaded])
            return loaded

        return _load_model

    def _rename(self, by_id: dict[int, Function]) -> None:
        for namespace in _family(self.generation):
            for name, value in list(vars(namespace).items()):
                if id(value) in by_id:
                    setattr(namespace, name, by_id[id(value)])

    def _fast_blocks(self, models: Any) -> None:
        for entry in list(models):
            model = entry.get("model") if isinstance(entry, dict) else entry
            for _, block, mixin in targets(model) if isinstance(model, nn.Module) else ():
                if not is_fast(block):  # what was patched by itself stays so when this is undone
                    swap(block, mixin, self.policy)
                    self.swapped.add(block)

    def _slow_blocks(self) -> None:
        for block in list(self.swapped):
            restore(block)
        self.swapped.clear()


def _arguments(
    signature: inspect.Signature, known: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What a call passes, defaults included. Raises `Refused` and `NotCovered`."""
    try:
        call = signature.bind(*args, **kwargs)
    except TypeError:
        raise Refused from None
    call.apply_defaults()
    if unknown := call.arguments.keys() - known:
        raise NotCovered(f"the argument {min(unknown)}")
    return call.arguments


def _dressed(ours: Function, original: Function) -> Function:
    """`ours` with the name, documentation and signature of `original`, and nothing that leads past it."""
    update_wrapper(ours, original)
    del ours.__wrapped__  # type: ignore[attr-defined]
    ours.__dict__.update(original.__dict__)  # which may lead on itself
    ours.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return ours


def _checked(module: ModuleType) -> ModuleType:
    generation = _generation_of(module)
    if generation is None:
        raise NotCovered(f"the module {module.__name__}, which is not suno's bark")
    return generation


def _generation_of(module: ModuleType) -> ModuleType | None:
    """The `bark.generation` that `module` is, or belongs to."""
    names = {getattr(getattr(module, name, None), "__module__", "") for name in STAGES}
    nearby = [module, getattr(module, "generation", None), *(sys.modules.get(name or "") for name in names)]
    for candidate in nearby:
        if _is_generation(candidate) and module in _family(candidate):
            return candidate
    return None


def _is_generation(module: Any) -> bool:
    models = (getattr(module, name, None) for name in ("GPT", "FineGPT"))
    return (
        isinstance(module, ModuleType)
        and all(hasattr(module, name) for name in _CONTENTS)
        and [(kind.__module__, kind.__name__) for kind in models if isinstance(kind, type)]
        == [("bark.model", "GPT"), ("bark.model_fine", "FineGPT")]
    )


def _family(generation: Any) -> list[ModuleType]:
    """`bark.generation`, `bark` and `bark.api`, as far as they are imported."""
    package = generation.__name__.rpartition(".")[0]
    return [
        generation,
        *(m for name in (package, f"{package}.api") if (m := sys.modules.get(name)) is not None),
    ]
