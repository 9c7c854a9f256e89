"""Every Triton kernel, at Bark's shapes, compiles for the GPUs we name and could be launched there."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import RESULTS, Compiled
from demands import WIDE_SHARE, wants_tensor_cores
from production import FAMILIES
from sass import loads_at_once, serialised, wide_share

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "compiled.py"
SAMPLES = {(80,): 6, (90,): 6, (100,): 6, (75, 86, 89, 120): 24}
"""Of kernels that the table lists as this version of Triton compiles them, each N-th is compiled anew."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("archs", SAMPLES, ids=str)  # apart, so that workers share the longest family
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compile_and_fit(family: str, archs: tuple[int, ...]) -> None:
    triton = pytest.importorskip("triton")
    with RESULTS.open(newline="") as file:
        recorded = [row for row in csv.DictReader(file) if row["triton"] == triton.__version__]
    if len(archs) > 1 and not recorded:
        pytest.skip(f"all would be compiled: {RESULTS.name} is not of Triton {triton.__version__}")
    options = ("--family", family, "--json", "--sample", str(SAMPLES[archs]), "--arch", *map(str, archs))
    compiled = in_triton(str(SCRIPT), *options)
    assert {c["arch"] for c in compiled} == set(archs) - ({75} if family == "attention" else set())
    for c in compiled:
        print(
            f"sm_{c['arch']} {c['launch']:44} {c['kernel']:28} {c['warps']:2} warps {c['registers']:3} regs "
            f"{c['shared_bytes']:6} B shared {c['tensor_core_instructions']:4} mma {c['wide_share']:4.0%} wide "
            f"{c['loads_at_once']:2} at once {c['row']['occupancy']} occupied{' anew' * c['anew']}"
        )
    assert not [(c["arch"], c["launch"], c["kernel"], c["faults"]) for c in compiled if c["faults"]]
    if recorded:  # another version of Triton makes other code
        names = {f"sm_{arch}" for arch in archs}
        rows = [row for row in recorded if row["family"] == family and row["arch"] in names]
        assert not differences(rows, [c["row"] for c in compiled]), "run benchmarks/compiled.py --rows"


def differences(recorded: list[dict[str, str]], rows: list[dict[str, object]]) -> list[dict[str, str]]:
    """Rows of either table that the other lacks."""
    compiled = [{name: str(value) for name, value in row.items()} for row in rows]
    return [row for row in recorded if row not in compiled] + [row for row in compiled if row not in recorded]


CHANGED = """
import json
import compiled
from bark_fast.kernels.decode_state import _advance_kernel
known = compiled.known_kernels()
never = 1 << 70
def anew(table):
    return [c.anew for c in compiled.compile_family("decode_state", 90, table, never)]
found = {"unchanged": anew(known), "unlisted": anew({})}
_advance_kernel._unsafe_update_src(_advance_kernel.src.replace("+ 1", "+ 2", 1))
found["changed"] = anew(known)
print(json.dumps([bool(known), found]))
"""


def test_what_is_not_in_the_table_or_has_changed_is_compiled(tmp_path: Path) -> None:
    script = tmp_path / "changed.py"  # with -c the checkout would come first
    script.write_text(CHANGED)
    listed, found = in_triton(str(script))
    assert found == {"unchanged": [not listed], "unlisted": [True], "changed": [True]}


@pytest.mark.parametrize("change", [{"registers": 57}, {"occupancy": "0.25"}, {"shared_bytes": 0}])
def test_a_table_of_other_kernels_is_noticed(change: dict[str, object]) -> None:
    row: dict[str, object] = {"launch": "l", "registers": 56, "occupancy": "0.50", "shared_bytes": 1024}
    recorded = [{name: str(value) for name, value in row.items()}]
    assert differences(recorded, [row]) == []
    assert len(differences(recorded, [{**row, **change}])) == 2
    assert differences(recorded, []) == differences([], [row]) == recorded


def in_triton(*command: str) -> Any:
    """What Python prints, as JSON, where Triton compiles instead of interpreting."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # an empty part would be the checkout, where the package has no kernels beside it
    paths = filter(None, (str(SCRIPT.parent), environment.get("PYTHONPATH")))
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        (sys.executable, *command), capture_output=True, text=True, env=environment, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(600)
def test_kernels_compile_for_amds_gpus_and_fit() -> None:
    """Faults are of shared memory, or of what AMD's compiler does not know."""
    pytest.importorskip("triton.backends.amd.compiler")
    faults, kernels = in_triton(str(Path(__file__).with_name("for_amd.py")), "20")
    assert not faults
    assert set(kernels) == {f"{arch} {name}" for arch in ("gfx942", "gfx1100") for name in WIDE_SHARE}


def specialised(*options: str) -> dict[str, int]:
    """Of each kernel, how many Triton would compile as the batch changes size (`specialised.py`)."""
    counts: dict[str, int] = in_triton(str(Path(__file__).with_name("specialised.py")), *options)
    return counts


def test_a_batch_that_changes_size_compiles_nothing_anew() -> None:
    counts = specialised()
    assert len(counts) == 9 and set(counts.values()) == {1}, counts


def test_specialising_on_every_argument_would_be_noticed() -> None:
    assert min(specialised("--all").values()) > 1


SOUND = Compiled(
    family="f", launch="l", kernel="k", arch=90, key="", anew=True, grid=(8, 1, 1), warps=4, registers=64,
    spill_bytes=0, shared_bytes=1024, tensor_memory_columns=0, scratch_bytes=0, tensor_core_instructions=1,
    wide_loads=8, wide_share=0.9, loads_at_once=8, wants_tensor_cores=True, wants_wide_share=0.9,
    wants_loads_at_once=8,
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
        ({"wide_share": 0.89}, "89% 128 bits wide, not 90%"),
        ({"loads_at_once": 7}, "waits after 7 loads of 8"),
        ({"serialised": True}, "waits for each of its products"),
    ],
)
def test_what_cannot_be_launched_is_named(change: dict[str, object], fault: str) -> None:
    found = Compiled(**{**vars(SOUND), **change}).faults(232_448)
    assert len(found) == 1 and fault in found[0]


@pytest.mark.parametrize(("waits", "found"), [(2, True), (1, False)])
def test_products_that_are_waited_for_one_by_one_are_noticed(waits: int, found: bool) -> None:
    product = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;"
    code = [product] * 2 + ["WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"] * waits
    assert serialised("\n".join(code)) == found
    assert not serialised("HMMA.16816.F32.BF16 R4, R8, R12, R4 ;")


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


def weights_and_x(weights: str, x: str) -> str:
    """A loop that multiplies 16 bytes of weights a thread by 16 of x, however it loads each."""
    loads = {
        "wide": ["LDG.E.128 R4, desc[UR8][R2.64] ;"],
        "to shared memory": ["LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR8][R2.64] ;"],
        "by 64 bits": [f"LDG.E.64 R4, desc[UR8][R2.64+{8 * i:#x}] ;" for i in range(2)],
        "one by one": [f"@P0 LDG.E R4, desc[UR8][R2.64+{4 * i:#x}] ;" for i in range(4)],
        "by 16 bits": [f"LDG.E.U16.CONSTANT R4, desc[UR8][R2.64+{2 * i:#x}] ;" for i in range(8)],
    }
    return "\n".join([*loads[weights], *loads[x], "@!P1 BRA 0x0 ;"])


@pytest.mark.parametrize("x", ["wide", "to shared memory"])
def test_weights_read_in_small_pieces_beside_a_wide_x_are_noticed(x: str) -> None:
    assert wide_share(weights_and_x("wide", x)) == wide_share(weights_and_x("to shared memory", x)) == 1
    for weights in ("by 64 bits", "one by one", "by 16 bits"):
        assert wide_share(weights_and_x(weights, x)) == wide_share(weights_and_x(x, weights)) == 0.5


def test_wide_loads_before_a_loop_do_not_excuse_narrow_ones_in_it() -> None:
    before = ["LDG.E.128 R8, desc[UR8][R2.64] ;"] * 8
    loop = ["LDG.E R4, desc[UR8][R2.64] ;"] * 16 + ["@!P1 BRA 0x80 ;"]
    assert wide_share("\n".join([*before, *loop])) == 0
    assert wide_share("FADD R0, R0, R1 ;") == 1  # nothing is loaded


def test_what_lies_behind_the_end_of_a_kernel_makes_no_loop() -> None:
    loop = ["LDG.E.128 R4, desc[UR8][R2.64] ;"] * 8 + ["@!P1 BRA 0x0 ;"]
    rest = ["LDG.E R4, desc[UR8][R2.64] ;"] * 40 + ["{} ;", "WARPSYNC R36 ;", "BRA 0x90 ;"]
    assert wide_share("\n".join([*loop, *rest]).format("EXIT")) == 1
    assert wide_share("\n".join([*loop, *rest]).format("@P0 EXIT")) == 0


@pytest.mark.parametrize(
    ("kernel", "dtype", "rows", "wanted"),
    [
        ("_matmul_kernel", torch.float16, None, True),
        ("_matmul_kernel", torch.bfloat16, None, True),
        ("_matmul_kernel", torch.float32, None, False),
        ("_attention_kernel", torch.float16, None, True),
        ("_head_sample_kernel", torch.float16, 16, True),
        ("_head_sample_kernel", torch.float16, 1, False),
        ("_gemv_kernel", torch.float16, 4, False),
        ("_layer_norm_kernel", torch.float16, None, False),
    ],
)
def test_products_of_16_bits_want_tensor_cores(kernel: str, dtype: object, rows: object, wanted: bool) -> None:
    assert wants_tensor_cores(kernel, {dtype, torch.float32}, {"ROWS": rows}) == wanted  # type: ignore[arg-type]
