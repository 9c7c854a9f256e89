"""What weights and caches take, and how many pages there is room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from bark_fast.config import GPTConfig
from bark_fast.engine.kv_pool import PAGE_SIZE


def pages_of_context(config: GPTConfig) -> int:
    """Pages of one sequence as long as the model's context."""
    return -(-config.block_size // PAGE_SIZE)


def context_bytes(config: GPTConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one sequence as long as the model's context."""
    return 2 * config.n_layer * pages_of_context(config) * PAGE_SIZE * config.n_embd * dtype.itemsize


def cache_pages(
    configs: Mapping[str, GPTConfig], dtype: torch.dtype, max_sequences: int, max_bytes: int | None = None
) -> dict[str, int]:
    """Pages of each model for `max_sequences` whole contexts, or as many of them as `max_bytes` has room for.

    Every model has at least one context, also where `max_bytes` is too small for that.
    """
    contexts = float(max_sequences)
    if max_bytes is not None:
        contexts = min(contexts, max_bytes / sum(context_bytes(config, dtype) for config in configs.values()))
    return {name: int(max(1.0, contexts) * pages_of_context(config)) for name, config in configs.items()}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; what several share counts once."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


class Offloader:
    """Keeps the weights of several modules on the host and brings those of one at a time to the device."""

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        self.modules, self.device = dict(modules), device
        self.resident: str | None = None
        self._away: str | None = None  # whose weights may be on the device, in part
        self.moves = 0
        self._host = {
            name: self._copies(module.parameters(), self._kept) for name, module in self.modules.items()
        }
        for name in self.modules:
            self._put(name, self._host[name])

    def bring(self, name: str) -> None:
        """Make `name` the module whose weights are on the device."""
        if name == self.resident:
            return
        self.resident = None  # until all is in place: there may be no room, or an interrupt
        if self._away is not None:
            self._put(self._away, self._host[self._away])
            self._away = None
        with torch.inference_mode(False):  # a parameter cannot hold an inference tensor
            there = self._copies(self._host[name], lambda tensor: tensor.to(self.device, non_blocking=True))
        self._away = name
        self._put(name, there)
        self.resident = name
        self.moves += 1

    @staticmethod
    def _copies(tensors: Iterable[Tensor], copy: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Each tensor's copy; what is one in memory is one again, so tied weights stay tied."""
        copies: dict[tuple[object, ...], Tensor] = {}
        places = []
        for tensor in tensors:
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if place not in copies:
                copies[place] = copy(tensor.detach())
            places.append(place)
        return [copies[place] for place in places]

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor.cpu().pin_memory() if self.device.type == "cuda" else tensor.cpu()

    def _put(self, name: str, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self.modules[name].parameters(), tensors, strict=True):
            parameter.data = tensor
