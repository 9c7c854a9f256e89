"""Host tensors on their way to a device, without the host waiting for what the device still has to do.

A copy out of pageable memory returns when all that was launched before it is done: a burst, for one. A copy
out of pinned memory is enqueued as a kernel is; torch gives the memory to nobody else until it is over.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`: itself where it is there already, else a copy enqueued on the current stream."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def overwrite(target: Tensor, source: Tensor) -> None:
    """Copy `source`, from the host or from the target's device, into `target`; enqueued likewise."""
    target.copy_(_pinned(source, target.device), non_blocking=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
