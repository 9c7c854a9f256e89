"""The launches Bark's models make, by operation family: what must compile, and run, on every GPU named.

A family is a module of this folder with `launches(device)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

import torch

FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = {"small": (768, 12), "large": (1024, 16)}
"""n_embd and n_head of Bark's two sizes; the head size is 64, the context 1,024."""

ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of a decode step, which is captured as a graph for each of these."""
BIAS_ROWS = (1, 4, 16)
"""Rows of linear layers with biases, which Bark's published ones do not have."""


@dataclass(frozen=True)
class Launch:
    """One call of a kernel's launcher at a production shape.

    name: shape and dtype, for tables. call: launches it, on tensors of the device given to `launches`.
    loads_at_once: 128-bit loads that a thread must issue before it waits for the first, see `sass`.
    """

    name: str
    call: Callable[[], object]
    loads_at_once: int = 0


def tf32(call: Callable[[], object]) -> None:
    """A call while torch is told that fp32 may be multiplied as TF32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        call()
    finally:
        matmul.allow_tf32 = before


def launches(family: str, device: torch.device) -> Iterator[Launch]:
    """All production launches of a family. device: "cuda" to run them, "meta" to compile them only."""
    module = import_module(f"production.{family}")
    return cast(Iterator[Launch], module.launches(device))
