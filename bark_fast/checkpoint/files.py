"""Opening weight and JSON files without trusting them: nothing is run, every failure is a CheckpointError."""

from __future__ import annotations

import ctypes
import json
import mmap
import struct
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bark_fast.errors import CheckpointError

_AGAIN = "download it again"
_LFS = b"version https://git-lfs"
# numpy's type codes and those of struct
_SCALAR_FORMATS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I",
                   "u8": "Q", "f2": "e", "f4": "f", "f8": "d"}  # fmt: skip
# torch keeps the allow-list of its unpickler in a process-wide set: two loads at once would undo each other's.
_ALLOW_LIST_LOCK = threading.Lock()


class _Dtype:
    """Stands for `numpy.dtype` inside a checkpoint's pickle, so that no file builds a numpy object."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _SCALAR_FORMATS:
            raise ValueError(f"numpy scalars of type {code!r} are not allowed")
        self.format, self.order = _SCALAR_FORMATS[code], "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _scalar(dtype: _Dtype, data: bytes) -> bool | int | float:
    """Stands for `numpy.core.multiarray.scalar`: bool, int and float scalars become Python numbers."""
    value: bool | int | float = struct.unpack(dtype.order + dtype.format, data)[0]
    return value


def _one_line(error: BaseException) -> str:
    text = str(error)
    if "Weights only load failed" in text:  # torch goes on to advise letting the file run code
        text = text.partition("WeightsUnpickler error: ")[2] or "it cannot be unpickled"
    lines = text.strip().splitlines()
    return (lines[0].rstrip(".") if lines else type(error).__name__)[:200]


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    if "Cannot allocate memory" in str(error):  # the system's words; a damaged length has others
        return CheckpointError(
            f"there is no memory to map {path}; end other programs, or raise the limit on memory"
        )
    return CheckpointError(f"{path} is damaged or not a checkpoint ({_one_line(error)}); {_AGAIN}")


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {_AGAIN}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; {_AGAIN}")
    with suppress(PermissionError), path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` beside it"
            )


def open_torch(path: Path) -> dict[str, Any]:
    """The dict in a `torch.save` file, its tensors memory-mapped where the file's age allows.

    Only tensors, plain containers and numpy bool, int and float scalars are unpickled; any other global in
    the pickle is refused before it is called.
    """
    _require_file(path)
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    allowed: list[Any] = [
        (_Dtype, "numpy.dtype"),
        _Dtype,
        (_scalar, "numpy.core.multiarray.scalar"),  # numpy 1
        (_scalar, "numpy._core.multiarray.scalar"),  # numpy 2
    ]
    try:
        with _ALLOW_LIST_LOCK, torch.serialization.safe_globals(allowed):
            # files older than torch 1.6 are no zip archives and cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); change its permissions") from None
    except Exception as error:  # an unpickler may raise anything on damaged bytes
        message = str(error)
        for mark in ("Unsupported global", "unsupported GLOBAL"):
            if mark in message:
                found = message[message.index(mark) :].splitlines()[0].split(" was not")[0][:120]
                raise CheckpointError(
                    f"{path} holds code that weights never need ({found}); none of it was run: delete the file"
                ) from None
        raise _unreadable(path, error) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a dict of weights is wanted; {_AGAIN}")
    return content


def open_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, memory-mapped."""
    from safetensors import safe_open

    _require_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); change its permissions") from None
    except Exception as error:  # SafetensorError, and OSError or RuntimeError on short files
        raise _unreadable(path, error) from None


def tensors_of(content: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """`content`, if it maps names to plain CPU tensors; CheckpointError otherwise."""
    for name, value in content.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path} has the key {name!r} among its weights; names are wanted; {_AGAIN}")
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(f"{path} holds no plain tensor under {name!r}; {_AGAIN}")
    return {name: value.detach() for name, value in content.items()}


def open_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    _require_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); change its permissions") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({_one_line(error)}); {_AGAIN}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; an object is wanted; {_AGAIN}")
    return content


class MappedPages:
    """Where files are mapped into memory, so that pages already read need not stay resident. Linux; else inert.

    A mapped file's pages count in the process's resident memory until they are given back. Only addresses that
    the kernel lists as mapped from one of `paths` are touched: the same advice would zero heap memory.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._libc: ctypes.CDLL | None = None
        if not sys.platform.startswith("linux"):
            return
        names = {str(path.resolve()) for path in paths}
        try:
            for line in Path("/proc/self/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5] in names:
                    low, high = (int(address, 16) for address in fields[0].split("-"))
                    self._ranges.append((low, high))
            self._libc = ctypes.CDLL(None)
        except (OSError, ValueError):
            self._ranges = []

    def drop(self, tensor: torch.Tensor) -> None:
        """Give back the pages wholly inside contiguous `tensor`; they can still be read again."""
        if self._libc is None or not tensor.is_contiguous():
            return
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        if not any(low <= start and end <= high for low, high in self._ranges):
            return
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self._libc.madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_DONTNEED)
            )
