"""What the GPUs of this machine can do for Triton's kernels. It is found out once a process.

Triton names compute capability 8.0 as the least it supports. For 7.5 (Turing: T4, RTX 20) these kernels compile
in float32 and float16; in bfloat16 they do not, and matrices would be multiplied without tensor cores.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

LEAST = (7, 5)
"""Compute capability below which nothing is launched."""
AMPERE = (8, 0)


@cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return find_spec("triton") is not None


def number_of(device: torch.device) -> int:
    """The GPU that a CUDA device is: the current one where it has no number."""
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def is_from_ampere_on(gpu: int) -> bool:
    """Whether this GPU has bfloat16, and tensor cores that Triton uses."""
    return _capability(gpu) >= AMPERE


@cache
def triton_fault(gpu: int, dtype: torch.dtype = torch.float32) -> str:
    """What keeps kernels that compute in `dtype` from running on this GPU; empty when nothing does.

    Raises what Triton or torch does where the GPU has no memory left to find out.
    """
    if not has_triton():
        return "triton is not installed: install it"
    capability = _capability(gpu)
    if capability < LEAST:
        return f"compute capability {_dotted(capability)} is too old: Triton's kernels want {_dotted(LEAST)}"
    if dtype == torch.bfloat16 and not is_from_ampere_on(gpu):
        return f"compute capability {_dotted(capability)} has no bfloat16: choose float16 or float32"
    return _launch_fault(gpu)


@cache
def _launch_fault(gpu: int) -> str:
    """Why Triton cannot launch there: it wants a C compiler, Python's headers, a driver that knows its code."""
    from bark_fast.kernels.probe import probe

    try:
        probe(torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", gpu)))
    except Exception as error:  # whatever Triton, its compilers or the driver raise
        if "out of memory" in str(error):
            raise  # it may pass: nothing is remembered
        first, *_ = str(error).strip().splitlines() or [""]
        return f"Triton cannot launch a kernel ({type(error).__name__}: {first})"
    return ""


def _capability(gpu: int) -> tuple[int, int]:
    """Compute capability; for AMD's GPUs, which number theirs otherwise, one that everything runs on."""
    return AMPERE if torch.version.hip else torch.cuda.get_device_capability(gpu)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
