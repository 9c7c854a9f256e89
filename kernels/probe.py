"""The least that can be asked of a GPU: one kernel of one number."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bark_fast.kernels.target import COMPILE, on_its_device


@triton.jit
def _probe_kernel(out_ptr):
    tl.store(out_ptr, 1)


@on_its_device
def probe(out: Tensor) -> None:
    """Set out (1,) int32 to 1. Raises what Triton raises where it cannot compile or launch there."""
    _probe_kernel[(1,)](out, num_warps=1, **COMPILE)
