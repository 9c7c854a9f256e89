"""Replacing the class of single objects, and undoing it: nothing but `type(module)` changes.

A fast class is a subclass of the object's own class, made once for each pair of classes and named as the
original, so isinstance, state_dict and what transformers writes into config.json stay as they were. It is found
nowhere by name: pickle and deepcopy make it anew from the original class and the mixin, which both are.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import cache, wraps
from threading import RLock
from types import FunctionType, MethodType
from typing import Any, ClassVar

import torch
from torch import nn

from bark_fast.errors import InvalidInput, NotCovered

STATE = "_bark_fast"
"""Attribute of a patched object that holds its `State`."""


class Policy:
    """What one call of `patch` asked for, shared by everything it replaced.

    engine: stages run in the engine. dtype: of the engine's weights, None for the model's own. rng: "torch" or
    "philox". strict: raise where the fast path does not cover a call. speculative: guess tokens on a CPU.
    warned: kinds of reasons already given.
    """

    def __init__(
        self, engine: bool, dtype: torch.dtype | None, rng: str, strict: bool, speculative: bool = True
    ) -> None:
        self.engine, self.dtype, self.rng, self.strict = engine, dtype, rng, strict
        self.speculative = speculative
        self.warned: set[str] = set()

    def decline(self, reason: str) -> None:
        """The original code takes a call: say why, once; raise `NotCovered` if strict."""
        if self.strict:
            raise NotCovered(
                f"bark_fast does not cover {reason}; the original code does: patch with strict=False"
            )
        kind = re.sub(r"\d[\d.e+-]*", "0", reason)  # another value is no other reason
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(f"bark_fast leaves {reason} to the original code", RuntimeWarning, stacklevel=4)


class State:
    """What a patched object keeps. Copies and pickles of it keep the policy, and nothing else.

    cache: what the mixin made and can make again. lock: held by the thread that runs the engine.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.cache: dict[str, Any] = {}
        self.lock = RLock()

    def __reduce__(self) -> Any:
        return State, (self.policy,)


class Patched:
    """Base of the mixins: what every replaced class has in common."""

    _bark_fast_original: ClassVar[type]
    _bark_fast_mixin: ClassVar[type]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Whoever makes another of the class means the original: what a patch keeps is not of a class."""
        return cls._bark_fast_original(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        assert isinstance(made, tuple)
        return (_blank, (self._bark_fast_original, self._bark_fast_mixin), *made[2:])

    def _replicate_for_data_parallel(self) -> Any:
        """Of `torch.nn.DataParallel`, whose replicas have no parameters: they are of the original class."""
        plain: Any = object.__new__(self._bark_fast_original)
        plain.__dict__.update(self.__dict__)
        plain.__dict__.pop(STATE, None)
        return plain._replicate_for_data_parallel()

    @property
    def _fast(self) -> State:
        state: State = self.__dict__[STATE]
        return state


def is_fast(obj: object) -> bool:
    """Whether `obj` has a fast class."""
    return isinstance(obj, Patched)


def fast_class(original: type, mixin: type) -> type:
    """The subclass of `original` whose methods `mixin` has. One for each pair."""
    return _fast_class(original, mixin)


@cache
def _fast_class(original: type, mixin: type) -> type:
    methods = {
        name: _in_place_of(getattr(original, name), function)
        for base in reversed(mixin.__mro__)
        for name, function in vars(base).items()
        if issubclass(base, Patched) and isinstance(function, FunctionType) and not name.startswith("__")
        if hasattr(original, name)
    }
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"_bark_fast_original": original, "_bark_fast_mixin": mixin}
    return type(original.__name__, (mixin, original), {**names, **own, **methods})


def _in_place_of(original: Callable[..., Any], function: FunctionType) -> Callable[..., Any]:
    """`function` with the signature and docstring of the method it overrides.

    A bound method may outlive the patch, kept by a hook or the caller: it then does what the object now does.
    """

    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_fast(self):
            return getattr(type(self), function.__name__)(self, *args, **kwargs)
        return function(self, *args, **kwargs)

    return method


def swap(module: nn.Module, mixin: type[Patched], policy: Policy) -> None:
    """Give `module` the fast class; one that has it already gets the new policy."""
    fast = type(module) if is_fast(module) else fast_class(type(module), mixin)
    module.__dict__[STATE] = State(policy)  # first: an interrupt must not leave the class without it
    module.__class__ = fast


def check_outermost(module: nn.Module) -> None:
    """Raise InvalidInput if `module` has a class that was made of its fast class: `restore` would lose it."""
    kind = type(module)
    if isinstance(module, Patched) and "_bark_fast_original" not in vars(kind):
        raise InvalidInput(
            f"a module is of {kind.__name__}, a class put on top of the patched "
            f"{module._bark_fast_original.__name__}: undo that first, or patch after it"
        )


def restore(module: nn.Module) -> None:
    """Give `module` its own class back, and to hooks the forward they would have wrapped."""
    if not isinstance(module, Patched):
        module.__dict__.pop(STATE, None)  # of a swap that was interrupted
        return
    fast, original = type(module), module._bark_fast_original
    for name, value in list(module.__dict__.items()):
        # accelerate keeps the bound forward it wrapped; one it kept while patched is the fast one
        if isinstance(value, MethodType) and value.__self__ is module:
            if value.__func__ is getattr(fast, value.__name__, None) and hasattr(original, value.__name__):
                module.__dict__[name] = MethodType(getattr(original, value.__name__), module)
    module.__class__ = original
    module.__dict__.pop(STATE, None)


def _blank(original: type, mixin: type) -> Any:
    """An empty object of the fast class, for pickle and deepcopy."""
    return object.__new__(fast_class(original, mixin))
