"""Tensors on their way to a device, without the host waiting for what the device still has to do.

A copy out of pageable memory returns when all that was launched before it is done: a burst, for one. A copy
out of pinned memory is enqueued as a kernel is; torch gives the memory to nobody else until it is over. For one
to the host, the host has to wait: what it reads next must have arrived.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`: itself where it is there already, else a copy.

    A copy to a GPU is enqueued on the current stream; one to the host is there when this returns.
    """
    return _pinned(tensor, device).to(device, non_blocking=device.type != "cpu")


def overwrite(target: Tensor, source: Tensor) -> None:
    """Copy `source` into `target`; enqueued, or waited for, likewise."""
    target.copy_(_pinned(source, target.device), non_blocking=not target.is_cpu)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
