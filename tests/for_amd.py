"""Compiles each kernel for AMD's GPUs, and each N-th production launch: prints faults and kernels, as JSON.

A process of its own, without TRITON_INTERPRET: python for_amd.py N. Launchers are called on meta tensors;
nothing is launched.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import patch

import torch
from compiled import pretend
from production import FAMILIES, launches
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from bark_fast.kernels.target import Target, assume

CHIPS = {
    GPUTarget("hip", "gfx942", 64): Target(94, 304, 65_536),  # MI300X
    GPUTarget("hip", "gfx1100", 32): Target(110, 96, 65_536),  # RX 7900
}


def main() -> None:
    """For all chips."""
    step = int(sys.argv[1])
    faults: list[str] = []
    kernels: set[str] = set()
    count = 0
    run = JITFunction.run

    def compile_some(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        nonlocal count
        count += 1
        name = f"{target.arch} {self.fn.__name__}"
        if name in kernels and count % step:
            return
        kernels.add(name)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.metadata.shared > chip.shared_memory:
            faults.append(f"{name}, {launch.name}: {kernel.metadata.shared} bytes of shared memory")

    torch.version.hip = "7.0"  # what launchers ask
    with patch.object(JITFunction, "run", compile_some):
        for target, chip in CHIPS.items():
            pretend(target)
            for launch in (each for family in FAMILIES for each in launches(family, torch.device("meta"))):
                try:
                    with assume(chip):
                        if "pdl" not in launch.name:  # AMD's have none
                            launch.call()
                except Exception as error:
                    faults.append(f"{target.arch}, {launch.name}: {type(error).__name__} {error}"[:400])
    print(json.dumps([faults, sorted(kernels)]))


if __name__ == "__main__":
    main()
