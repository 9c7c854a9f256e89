"""Which implementations of the operations are in use, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from bark_fast.extension import describe, load


@dataclass(frozen=True)
class Backend:
    """One way to run the operations: whether it is in use, and the reason."""

    name: str
    active: bool
    reason: str


def backends() -> list[Backend]:
    """All backends this version knows, those in use first."""
    import torch

    return [
        Backend("torch", True, f"eager operations of torch {torch.__version__}"),
        Backend("triton", False, _why_no_triton(torch.cuda.is_available())),
        Backend("extension", load() is not None, describe()),
    ]


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _why_no_triton(has_gpu: bool) -> str:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if not has_gpu:
        return "no CUDA GPU is visible to torch"
    return "this version has no Triton kernels yet"
