"""Which backend an operation runs on, and how operations are made known to torch's tracers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from bark_fast.errors import InvalidInput
from bark_fast.ops.gpus import is_from_ampere_on, triton_fault

Backend = Literal["auto", "torch", "triton"]

HEAD_DIMS = (32, 64, 128)
"""Sizes of a head that the extension and Triton have. Bark's is 64; others run on torch, on every device."""

_preferred: ContextVar[Backend] = ContextVar("preferred_backend", default="auto")


@contextmanager
def prefer(backend: Backend) -> Iterator[None]:
    """Run operations on `backend` in this thread or task: for comparisons, tests and bug hunts.

    "auto", the default, is the compiled extension where it has the operation, else Triton on a CUDA GPU that it
    runs on, else torch.
    """
    if backend not in get_args(Backend):
        raise InvalidInput(f"backend is {backend!r}; it must be one of {', '.join(get_args(Backend))}")
    token = _preferred.set(backend)
    try:
        yield
    finally:
        _preferred.reset(token)


def preferred() -> Backend:
    """What `prefer` asked for here."""
    return _preferred.get()


def uses_triton(tensor: Tensor, head_dim: int | None = None, multiplies: bool = False) -> bool:
    """Whether an operation on `tensor` runs Triton kernels.

    head_dim: of its heads, if it has any. multiplies: it multiplies matrices, which is worth it on tensor cores
    only.
    """
    if _preferred.get() != "auto":
        return _preferred.get() == "triton"
    if not tensor.is_cuda or (head_dim is not None and head_dim not in HEAD_DIMS):
        return False
    gpu = tensor.device.index
    return not triton_fault(gpu, tensor.dtype) and (not multiplies or is_from_ampere_on(gpu))


def is_eager(tensor: Tensor) -> bool:
    """No tracer is looking: an operation may skip the dispatcher, which costs more than the call."""
    return (
        not torch.compiler.is_compiling()  # first, since torch.compile can make nothing of the rest
        and type(tensor) is Tensor
        and not tensor.is_neg()
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
    )


def multiplies_faster(module: ModuleType, dtype: torch.dtype) -> bool:
    """Whether the extension multiplies many rows of this dtype faster than torch on this CPU, from AVX2 on.

    float32: where MKL, with which torch multiplies, is not at its best: on CPUs that are not Intel's. 16-bit:
    where oneDNN has no such products and torch falls back on plain loops.
    """
    if module.isa() == "portable":
        return False
    return not (module.cpu_is_intels() if dtype == torch.float32 else torch_multiplies(dtype))


@cache
def torch_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch leaves this dtype to oneDNN here: bfloat16 from AVX-512 on, float16 from AVX-512-FP16."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    ask = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return ask is None or bool(ask())


def all_plain(dtype: torch.dtype, tensors: Iterable[Tensor | None]) -> bool:
    """Whether the extension can read these, None among them, where they lie."""
    for one in tensors:
        if one is None:
            continue
        if type(one) not in (Tensor, Parameter):  # a subclass may keep its numbers elsewhere
            return False
        if one.dtype != dtype or not one.is_cpu or one.is_neg() or one.stride(-1) != 1 or not len(one):
            return False
    return True


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register `torch.ops.bark_fast.<name>` for CPU and CUDA tensors, for the life of the process.

    schema: name and signature in torch's notation. fake: the same on shapes alone.
    """
    library = _library()
    name = schema[: schema.index("(")]
    library.define(schema, tags=(torch.Tag.needs_exact_strides,))
    for key in ("CPU", "CUDA"):
        library.impl(name, implementation, key)
    torch.library.register_fake(f"bark_fast::{name}", fake, lib=library)


def writes_in_place(*arguments: object, **named: object) -> None:
    """The fake of an operation that returns nothing and changes no shape."""


@cache
def _library() -> Any:
    make: Any = torch.library.Library  # untyped in torch
    return make("bark_fast", "FRAGMENT")
