"""The CUDA sources compile for every architecture we ship, without spills. Needs nvcc, not a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc" / "paged_kv.cu"
ARCHS = (75, 80, 86, 89, 90, 100, 120)
DTYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
needs_source = pytest.mark.skipif(not SOURCE.exists(), reason="an installed package has no sources")

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def short(mangled: str) -> str:
    """attend<bfloat16, 64> of its mangled name."""
    template = re.search(r"6attendI(\w+?)Li(\d+)EE", mangled)
    if template:
        dtype = next((d for code, d in DTYPES.items() if template[1] == code), template[1])
        return f"attend<{dtype}, {template[2]}>"
    return next((name for name in ("append", "gather", "copy") if f"{len(name)}{name}" in mangled), mangled)


def table(said: str) -> list[dict[str, str]]:
    """Rows of arch, kernel, registers, shared memory, stack and spills of what `ptxas -v` said."""
    rows = []
    for entry in ENTRY.finditer(said):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        rows.append(
            {
                "arch": f"sm_{entry['arch']}",
                "kernel": short(entry["name"]),
                "registers": entry["registers"],
                "shared": shared[1] if shared else "0",
                "stack": entry["stack"],
                "spills": str(int(entry["stores"]) + int(entry["loads"])),
            }
        )
    return rows


@needs_nvcc
@needs_source
def test_every_kernel_compiles_for_every_architecture_without_spills(tmp_path: Path) -> None:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    codes.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
    options = ("-std=c++17", "-O3", "-t2", "-Xptxas", "-v", "-DBARK_FAST_CUDA=1", "-c")
    command = ("nvcc", *options, *codes, str(SOURCE), "-o", str(tmp_path / "paged_kv.o"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    rows = sorted(table(done.stdout + done.stderr), key=lambda row: (row["kernel"], int(row["arch"][3:])))
    print()
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        print(f"{row['arch']:8}{row['kernel']:24}" + "".join(f"{row[c]:>11}" for c in list(row)[2:]))
    assert len(rows) == len(ARCHS) * (3 * 3 + 3)
    assert {row["spills"] for row in rows} == {"0"}
    assert {row["stack"] for row in rows} == {"0"}


def test_a_spill_is_noticed() -> None:
    said = (
        "ptxas info : Compiling entry function '_Z3copyv' for 'sm_90'\n"
        "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info : Used 255 registers, used 1 barriers, 545 bytes smem\n"
    )
    (row,) = table(said)
    assert row["spills"] == "12" and row["stack"] == "16" and row["shared"] == "545"
