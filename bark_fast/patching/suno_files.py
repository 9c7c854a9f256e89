"""suno's `_load_model` on today's torch, which by default refuses what suno's files hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch

from bark_fast.checkpoint.files import open_torch
from bark_fast.errors import CheckpointError


def opening_suno_files(load_model: FunctionType) -> Callable[..., Any]:
    """suno's own code, in which the name `torch` stands for a torch that opens suno's files."""
    names = {**load_model.__globals__, "torch": _Torch(load_model.__globals__.get("torch", torch))}
    function = FunctionType(
        load_model.__code__, names, load_model.__name__, load_model.__defaults__, load_model.__closure__
    )
    function.__kwdefaults__ = load_model.__kwdefaults__
    return function


class _Torch:
    """torch with a `load` that opens suno's files: besides tensors they hold a numpy scalar, the loss.

    Since torch 2.6 `torch.load` refuses that. What is anything else goes to torch's own.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def load(self, file: Any, *args: Any, **options: Any) -> Any:
        """`torch.load`, whose arguments these are."""
        if isinstance(file, (str, os.PathLike)) and not args and options.keys() <= {"map_location"}:
            with suppress(CheckpointError):
                content = open_torch(Path(file))
                if isinstance(loss := content.get("best_val_loss"), (int, float)):
                    content["best_val_loss"] = np.float64(loss)  # suno calls .item()
                return content
        return self._torch.load(file, *args, **options)
