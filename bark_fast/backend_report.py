"""Which implementations of the operations are in use, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from bark_fast.extension import describe, load
from bark_fast.ops.attention import attends_faster
from bark_fast.ops.dispatch import multiplies_faster
from bark_fast.ops.gpus import has_triton, triton_fault


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
        _triton(torch.cuda.device_count() if torch.cuda.is_available() else 0),
        Backend("extension", load() is not None, describe() + _cpu_work() + _cuda_fault()),
    ]


def _cpu_work() -> str:
    """What the extension computes on this CPU, and with which instructions."""
    import torch

    module = load()
    if module is None:
        return ""
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    ours = [name for name, dtype in dtypes.items() if multiplies_faster(module, dtype)]
    passes = f", in {' and '.join(ours)} prompts and fine windows too" if ours else ""
    seen = [name for name, dtype in dtypes.items() if name not in ours and attends_faster(module, dtype)]
    attention = f", in {' and '.join(seen)} their attention" if seen else ""
    return f"; on this CPU {module.isa()} takes decode steps{passes}{attention}; the rest is torch's"


def _cuda_fault() -> str:
    """What keeps the extension's CUDA part from running on the GPUs that are here."""
    import torch

    module = load()
    if module is None or not module.build_info()["cuda_archs"]:
        return ""
    faults = {gpu: module.cuda_fault(gpu) for gpu in range(torch.cuda.device_count())}
    told = [
        f"; {'torch' if _triton_fault(gpu) else 'Triton'} takes its place on cuda:{gpu} ({fault})"
        for gpu, fault in faults.items()
        if fault
    ]
    return "".join(told)


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _triton_fault(gpu: int) -> str:
    """Why nothing could be launched there just now, also where others have its memory."""
    try:
        return triton_fault(gpu)
    except RuntimeError as error:
        return str(error).splitlines()[0]


def _triton(gpus: int) -> Backend:
    if not has_triton():
        return Backend("triton", False, "the package triton is not installed")
    if not gpus:
        return Backend("triton", False, "no CUDA GPU is visible to torch")
    faults = {f"cuda:{gpu}": fault for gpu in range(gpus) if (fault := _triton_fault(gpu))}
    told = "; ".join(f"torch takes their place on {gpu}: {fault}" for gpu, fault in faults.items())
    if len(faults) == gpus:
        return Backend("triton", False, told)
    kernels = f"kernels of triton {installed_version('triton')} for tensors on the GPU"
    return Backend("triton", True, "; ".join(filter(None, (kernels, told))))
