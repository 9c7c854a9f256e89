"""Contiguous key-value cache of one sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from bark_fast.config import GPTConfig


class KVCache:
    """Keys and values (n_layer, n_head, block_size, head_dim) of one sequence; the first `length` are live."""

    def __init__(self, config: GPTConfig, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layer, config.n_head, config.block_size, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (time, n_head, head_dim) after `length`; return views (n_head, length + time, head_dim) of all.

        `length` itself moves on once all layers are done, by the caller.
        """
        start, stop = self.length, self.length + len(key)
        self.keys[layer, :, start:stop] = key.transpose(0, 1)
        self.values[layer, :, start:stop] = value.transpose(0, 1)
        return self.keys[layer, :, :stop], self.values[layer, :, :stop]
