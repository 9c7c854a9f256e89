"""Every Triton kernel, at Bark's shapes, compiles for the GPUs we name and could be launched there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import Compiled
from production import FAMILIES
from sass import loads_at_once

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "compiled.py"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compile_and_fit(family: str) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    archs = (80, 90, 100)  # in one process, which takes seconds to begin
    command = (sys.executable, SCRIPT, "--arch", *map(str, archs), "--family", family, "--json")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = json.loads(done.stdout)
    assert {c["arch"] for c in compiled} == set(archs)
    for c in compiled:
        print(
            f"sm_{c['arch']} {c['launch']:44} {c['kernel']:28} {c['warps']:2} warps {c['registers']:3} regs "
            f"{c['shared_bytes']:6} B shared {c['tensor_core_instructions']:4} mma {c['wide_loads']:3} wide "
            f"{c['loads_at_once']:2} at once"
        )
    assert not [(c["arch"], c["launch"], c["kernel"], c["faults"]) for c in compiled if c["faults"]]


def specialised(*options: str) -> dict[str, int]:
    """Of each kernel, how many Triton would compile as the batch changes size (`specialised.py`)."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # an empty part would be the checkout, where the package has no kernels beside it
    paths = filter(None, (str(SCRIPT.parent), environment.get("PYTHONPATH")))
    command = (sys.executable, Path(__file__).with_name("specialised.py"), *options)
    done = subprocess.run(
        command, capture_output=True, text=True, env={**environment, "PYTHONPATH": os.pathsep.join(paths)}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_batch_that_changes_size_compiles_nothing_anew() -> None:
    counts = specialised()
    assert len(counts) == 9 and set(counts.values()) == {1}, counts


def test_specialising_on_every_argument_would_be_noticed() -> None:
    assert min(specialised("--all").values()) > 1


SOUND = Compiled(
    family="f", launch="l", kernel="k", arch=90, grid=(8, 1, 1), warps=4, registers=64, spill_bytes=0,
    shared_bytes=1024, tensor_memory_columns=0, scratch_bytes=0, tensor_core_instructions=1, wide_loads=8,
    loads_at_once=8, wants_tensor_cores=True, wants_wide_loads=True, wants_loads_at_once=8,
)  # fmt: skip


def test_a_sound_kernel_has_no_faults() -> None:
    assert SOUND.faults(232_448) == []
    assert SOUND.occupancy == 0.5  # 64 registers: 65,536 / (64 * 32 * 4) = 8 blocks of 4 warps


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 232_449}, "232449 bytes of shared memory"),
        ({"warps": 33, "registers": 1}, "33 warps"),
        ({"registers": 255, "warps": 16}, "255 registers"),
        ({"tensor_memory_columns": 513}, "tensor memory"),
        ({"scratch_bytes": 4}, "global scratch"),
        ({"grid": (1, 65_536, 1)}, "grid"),
        ({"grid": (0, 1, 1)}, "grid"),
        ({"tensor_core_instructions": 0}, "no tensor-core"),
        ({"wide_loads": 0}, "no 128-bit load"),
        ({"loads_at_once": 7}, "waits after 7 loads of 8"),
    ],
)
def test_what_cannot_be_launched_is_named(change: dict[str, object], fault: str) -> None:
    found = Compiled(**{**vars(SOUND), **change}).faults(232_448)
    assert len(found) == 1 and fault in found[0]


LISTING = [
    "LDG.E.128 R4, desc[UR8][R4.64] ;",
    "@P0 LDG.E.128 R8, desc[UR8][R2.64+0x10] ;",
    "FADD R0, R0, R11 ;",  # the last of four registers
    "LDG.E.128 R12, desc[UR8][R2.64+0x20] ;",
    "@!P1 BRA 0x0 ;",
]


@pytest.mark.parametrize(
    ("code", "at_once"),
    [
        (LISTING, 2),
        (["FADD R4, R4, R8 ;", *LISTING[:2], "FADD R0, R0, R11 ;"], 2),  # what was in R4 before is no load
        ([*LISTING[:1], "FADD R0, R0, R7 ;", *LISTING[1:]], 1),
        ([*LISTING[:1], "MOV R8, R0 ;", *LISTING[1:]], 2),
        (LISTING[2:4], 1),  # no loop
        (["LDG.E.128 R4, desc[UR8][R2.64] ;", "FADD R0, R0, R4 ;", *LISTING[:4], "@!P1 BRA 0x20 ;"], 2),
        (["LDG.E.64 R4, desc[UR8][R2.64] ;", "BRA 0x10;"], 0),  # a kernel ends in a branch to itself
    ],
)
def test_loads_at_once_are_those_before_the_first_wait(code: list[str], at_once: int) -> None:
    assert loads_at_once("\n".join(code)) == at_once
