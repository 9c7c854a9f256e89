"""Our transformers around somebody else's Parameter objects, or around copies where a dtype is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import nn

from bark_fast.checkpoint.names import gpt_shapes
from bark_fast.config import FineConfig, GPTConfig
from bark_fast.errors import NotCovered
from bark_fast.modules.draft import version_of
from bark_fast.modules.fine import FineGPT
from bark_fast.modules.gpt import GPT
from bark_fast.ops.norm_linear import FLOATING
from bark_fast.ops.reference import LAYER_NORM_EPS

Model = TypeVar("Model", GPT, FineGPT)
Names = Callable[[str], str]
"""From our parameter name to theirs, within their module."""
Parameters = dict[str, nn.Parameter]

_PLAIN = (nn.Linear, nn.Embedding, nn.LayerNorm)


class Bound(Generic[Model]):
    """One of our models on `parameters`, which are theirs, or copies in `dtype`.

    copied_bytes: what these copies take.
    """

    def __init__(self, config: GPTConfig, parameters: Parameters, dtype: torch.dtype | None) -> None:
        first = next(iter(parameters.values()))
        self.dtype, self.device = dtype or first.dtype, first.device
        self._theirs = parameters
        with torch.device("meta"):
            self.model: Model = FineGPT(config) if isinstance(config, FineConfig) else GPT(config)  # type: ignore[assignment]
        self.copied_bytes = 0
        copies: dict[int, nn.Parameter] = {}  # tied weights are copied once
        for name, parameter in parameters.items():
            held = parameter
            if parameter.dtype != self.dtype:
                if id(parameter) not in copies:
                    copy = parameter.detach().to(self.dtype)
                    copies[id(parameter)] = nn.Parameter(copy, requires_grad=False)
                    self.copied_bytes += copy.numel() * copy.element_size()
                held = copies[id(parameter)]
            path, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(path), leaf, held)
        self._versions = _versions(parameters, self.copied_bytes > 0)
        self.model.eval()

    @property
    def held_twice(self) -> int:
        """Bytes of all copies there are, of the engine's draft too."""
        return self.copied_bytes + (self.model.draft_bytes if isinstance(self.model, GPT) else 0)

    def holds(self, parameters: Parameters, dtype: torch.dtype | None) -> bool:
        """Whether `bind` would make the same: tensors of the same place, and unchanged if they were copied."""
        first = next(iter(parameters.values()))
        if (dtype or first.dtype, first.device) != (self.dtype, self.device):
            return False
        same = parameters.keys() == self._theirs.keys()
        return same and _versions(parameters, self.copied_bytes > 0) == self._versions


def bind(
    theirs: nn.Module, config: GPTConfig, names: Names, dtype: torch.dtype | None, known: Bound[Model] | None
) -> Bound[Model]:
    """Our model on their parameters; `known` again where nothing changed. Raises `NotCovered`."""
    parameters = parameters_of(theirs, config, names)
    if known is not None and known.holds(parameters, dtype):
        return known
    return Bound(config, parameters, dtype)


def parameters_of(theirs: nn.Module, config: GPTConfig, names: Names) -> Parameters:
    """Their parameters under our names. Raises `NotCovered` where a layer was replaced, hooked or misfits."""
    found: Parameters = {}
    owners: dict[str, nn.Module] = {}
    for ours, path, leaf, shape in places_of(config, names):
        if path not in owners:
            try:
                owners[path] = theirs.get_submodule(path)
            except AttributeError:
                raise NotCovered(f"a model without {path}") from None
            if reason := why_not_plain(owners[path]):
                raise NotCovered(f"{path}, {reason}")
        parameter = owners[path]._parameters.get(leaf)
        if parameter is None or tuple(parameter.shape) != shape:
            shown = "nothing" if parameter is None else tuple(parameter.shape)
            raise NotCovered(f"{path}.{leaf}, which is {shown} where {shape} was expected")
        found[ours] = parameter
    kinds = {(parameter.dtype, parameter.device) for parameter in found.values()}
    if len(kinds) > 1:
        raise NotCovered(f"weights of several dtypes or devices, {', '.join(sorted(map(str, kinds)))}")
    ((dtype, device),) = kinds
    if dtype not in FLOATING or device.type not in ("cpu", "cuda"):  # whose generators are not known here
        raise NotCovered(f"weights of {dtype} on {device}")
    return found


@cache
def places_of(config: GPTConfig, names: Names) -> tuple[tuple[str, str, str, tuple[int, ...]], ...]:
    """Of each parameter our name, the path of its module and its name there, and its shape."""
    return tuple(
        (ours, *names(ours).rpartition(".")[::2], tuple(shape)) for ours, shape in gpt_shapes(config).items()
    )


def why_not_plain(module: nn.Module) -> str | None:
    """None for a layer of torch, or suno's LayerNorm, that nothing hooks into; else what is the matter."""
    kind = type(module)
    if kind not in _PLAIN and (kind.__module__, kind.__name__) != ("bark.model", "LayerNorm"):
        return f"which is a {kind.__name__}"
    if module._parameters.get("weight") is None:
        return "without a weight"
    for name, parameter in module._parameters.items():
        # of another class are quantised ones, and those that lie on several GPUs
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"whose {name} is a {type(parameter).__name__}"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return "which has a hook"
    if kind is nn.LayerNorm and module.eps != LAYER_NORM_EPS:
        return f"whose eps is {module.eps}"
    if kind is nn.Embedding and module.max_norm is not None:
        return "which renormalises its rows"
    return None


def _versions(parameters: Parameters, contents: bool) -> list[tuple[int, tuple[int, ...], int]]:
    """Where each tensor lies and how, and, with `contents`, a number that changes when it is written to."""
    return [(p.data_ptr(), p.stride(), version_of(p) if contents else 0) for p in parameters.values()]
