"""What a launch table asks of a GPU, and the compile options all kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from threading import RLock
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Target:
    """A GPU as launch tables see it.

    arch: compute capability, 90 for 9.0. processors: streaming multiprocessors. shared_memory: bytes one block
    may ask for.
    """

    arch: int
    processors: int
    shared_memory: int

    @property
    def small(self) -> bool:
        """Whether a processor holds one large block only: desktop chips have less shared memory."""
        return self.shared_memory < 128 << 10

    @property
    def tensor_cores(self) -> bool:
        """Whether Triton multiplies on tensor cores there; else each thread multiplies and adds."""
        return self.arch >= 80

    @property
    def mma_sync(self) -> bool:
        """Whether these are fed from registers, warp by warp: Ampere's, Ada's, desktop Blackwell's."""
        return self.arch < 90 or self.arch >= 120


KNOWN = {
    75: Target(75, 40, 65_536),  # T4
    80: Target(80, 108, 166_912),  # A100
    86: Target(86, 84, 101_376),  # RTX 3090
    89: Target(89, 128, 101_376),  # RTX 4090
    90: Target(90, 132, 232_448),  # H100, H200
    100: Target(100, 148, 232_448),  # B200
    120: Target(120, 170, 101_376),  # RTX 5090
}
"""One chip of each capability (CUDA programming guide, technical specifications)."""

COMPILE = {"enable_fp_fusion": True}
"""Passed with every launch: the default of this option differs between Triton versions."""

ONE_LAUNCH = RLock()
"""Two threads must not be the first to launch a kernel: both would compile it, and Triton keep the second's and
unload the first's, which a captured graph may hold (so do 3.7.1 to 3.9.0). Reentrant: launchers call others."""

_assumed: ContextVar[Target] = ContextVar("assumed_target", default=KNOWN[90])


def target_of(device: torch.device) -> Target:
    """The GPU behind `device`; for a device that is none (the interpreter, tracers), the one assumed."""
    return _cuda_target(device.index) if device.type == "cuda" else _assumed.get()


def registers(most: int) -> dict[str, int]:
    """Compile option that lets a thread have so many registers; ptxas then saves none below that.

    Left to itself it weighs them against programs a processor, and may load into the same few again and again,
    waiting each time. AMD's compiler has no such option.
    """
    return {} if torch.version.hip else {"maxnreg": most}


def precision(dtype: torch.dtype) -> str:
    """How tensor-core kernels multiply: fp32 as fp32, or as TF32 where torch is told to, for its own products.

    That is `torch.backends.cuda.matmul.fp32_precision`, or its older names; by default it is not. Triton does
    not have it on all of AMD's GPUs: they keep to fp32.
    """
    asked = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if asked and torch.version.hip is None else "ieee"


def on_its_device(launch: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`launch`, one at a time, with its first argument's GPU as the current one, which Triton launches on."""

    @wraps(launch)
    def launched(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        tensor = arguments[0]
        assert isinstance(tensor, Tensor)
        with ONE_LAUNCH:
            if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
                return launch(*arguments, **named)
            with torch.cuda.device(tensor.device):
                return launch(*arguments, **named)

    return launched


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own is made for kernels, and takes a host several times as long."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is n or more, n at least 1."""
    return 1 << (n - 1).bit_length()


@contextmanager
def assume(target: Target) -> Iterator[None]:
    """Let launch tables see `target` where tensors lie on no GPU."""
    token = _assumed.set(target)
    try:
        yield
    finally:
        _assumed.reset(token)


@cache
def _cuda_target(index: int | None) -> Target:
    properties = torch.cuda.get_device_properties(index)
    arch = 10 * properties.major + properties.minor
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 65_536)  # ROCm does not tell
    return Target(arch, properties.multi_processor_count, shared_memory)
