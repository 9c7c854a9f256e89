"""The CUDA sources of the paged cache, compiled as C++ and run on a CPU by csrc/tests/simulated_cuda."""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

CSRC = Path(__file__).parent.parent / "csrc"
SIMULATOR = CSRC / "tests" / "simulated_cuda"
SOURCES = (
    *(CSRC / f"{name}.cpp" for name in ("paged_kv_bindings", "paged_kv", "paged_kv_portable")),
    *(CSRC / f"{name}.cpp" for name in ("attention_stage", "isa", "parallel", "stages")),
    *(SIMULATOR / f"{name}.cpp" for name in ("simulator", "module")),
)
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
DLPACK_CUDA = 2


def why_not() -> str:
    """Why it cannot be compiled here; empty if it can."""
    if sys.platform != "linux":
        return "the simulator is written for Linux"
    if COMPILER is None:
        return "no C++ compiler"
    if find_spec("pybind11") is None:
        return "the package pybind11 is not installed"
    return "" if CSRC.exists() else "an installed package has no sources"


def build(output: Path, *flags: str) -> Path:
    """Compile the module to `output`; with `flags` beside its own."""
    import pybind11

    includes = [SIMULATOR, CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-DBARK_FAST_CUDA=1", *flags]
    command += [f"-I{folder}" for folder in includes]
    command += [*map(str, SOURCES), "-x", "c++", str(CSRC / "paged_kv.cu"), "-o", str(output)]
    subprocess.run(command, check=True)
    return output


def load(path: Path) -> ModuleType:
    """The compiled module at `path`."""
    spec = spec_from_file_location(
        "simulated_cuda", path, loader=ExtensionFileLoader("simulated_cuda", str(path))
    )
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OnCuda:
    """A tensor of the CPU that says it lies on the first CUDA device."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self) -> Any:
        capsule = self.tensor.__dlpack__()
        address_of = ctypes.pythonapi.PyCapsule_GetPointer
        address_of.restype, address_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        device_type = address_of(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
        ctypes.c_int32.from_address(device_type).value = DLPACK_CUDA
        return capsule


class SimulatedCuda:
    """What `bark_fast._C` is to GPU tensors, for CPU tensors."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Callable[..., None]:
        operation = getattr(self.module, name)

        def call(*arguments: Any) -> None:
            tensors = [OnCuda(one) if isinstance(one, Tensor) else one for one in arguments]
            if name == "swap_pages":
                tensors[2] = arguments[2]  # the host reads the pairs
            operation(*tensors)

        return call


folder: Path | None = None
"""Where the module is kept: the same for all processes of a test run. Set by conftest.py."""


@cache
def simulated_cuda() -> SimulatedCuda:
    """Compiled once a test run: whoever comes first does it for the others."""
    assert folder is not None
    module = folder / "simulated_cuda.so"
    with (folder / "simulated_cuda.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            build(folder / "building.so").rename(module)
    return SimulatedCuda(load(module))
