"""Compile every Triton kernel at Bark's shapes for a GPU that need not be there, and say what came out.

python benchmarks/compiled.py --arch 90 [--family attention]. Launchers are called on meta tensors, so that the
kernels, constants and options are those a real call would use; Triton compiles them down to machine code and
nothing is launched. Registers, spills, shared memory and instructions are read off the cubin.

That takes half an hour of one core. A kernel's key is of its source, its constants, its options and the types
of its arguments. What has the key of a row of the table under results/ would be compiled to what is said
there, by the same version of Triton: --sample N takes the table's word but for each N-th such key.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from demands import WIDE_SHARE, wants_ampere, wants_tensor_cores
from production import FAMILIES, launches
from sass import INSTRUCTION_BYTES, loads_at_once, serialised, wide_share

RESULTS = Path(__file__).parent / "results" / "compiled.csv"
WARPS_PER_PROCESSOR = {75: 32, 80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
SHARED_PER_PROCESSOR = {
    75: 65_536, 80: 167_936, 86: 102_400, 89: 102_400, 90: 233_472, 100: 233_472, 120: 102_400
}  # fmt: skip
REGISTERS_PER_PROCESSOR = 65_536
MAX_BLOCKS_PER_PROCESSOR = {75: 16, 80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}


@dataclass(frozen=True)
class Compiled:
    """One kernel of one launch as compiled: what it takes from the chip, and which instructions it has.

    key: of what it is compiled from. anew: it was compiled, not read off the table, which has none that is
    serialised.
    """

    family: str
    launch: str
    kernel: str
    arch: int
    key: str
    anew: bool
    grid: tuple[int, ...]
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    scratch_bytes: int
    tensor_core_instructions: int
    wide_loads: int
    wide_share: float
    loads_at_once: int
    wants_tensor_cores: bool
    wants_wide_share: float
    wants_loads_at_once: int
    serialised: bool = False

    @property
    def occupancy(self) -> float:
        """Share of a processor's warps that can be resident at once."""
        registers_a_warp = -(-self.registers // 8) * 8 * 32
        blocks = min(
            WARPS_PER_PROCESSOR[self.arch] // self.warps,
            REGISTERS_PER_PROCESSOR // (registers_a_warp * self.warps),
            SHARED_PER_PROCESSOR[self.arch] // (self.shared_bytes + 1024),
            MAX_BLOCKS_PER_PROCESSOR[self.arch],
        )
        return blocks * self.warps / WARPS_PER_PROCESSOR[self.arch]

    def faults(self, shared_limit: int) -> list[str]:
        """Why this could not be launched on the chip, or is not the code it ought to be."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > shared_limit:
            found.append(f"wants {self.shared_bytes} bytes of shared memory, the chip has {shared_limit}")
        if self.warps > 32:
            found.append(f"has {self.warps} warps, a block holds 32")
        if self.registers * 32 * self.warps > REGISTERS_PER_PROCESSOR:
            found.append(f"wants {self.registers} registers in {self.warps} warps")
        if self.tensor_memory_columns > 512:
            found.append(f"wants {self.tensor_memory_columns} columns of tensor memory, the chip has 512")
        if self.scratch_bytes:
            found.append(f"wants {self.scratch_bytes} bytes of global scratch, which nobody allocates")
        if any(not 0 < size < (2**31 if axis == 0 else 2**16) for axis, size in enumerate(self.grid)):
            found.append(f"has grid {self.grid}")
        if self.wants_tensor_cores and not self.tensor_core_instructions:
            found.append("has no tensor-core instruction")
        if self.wide_share < self.wants_wide_share:
            found.append(f"loads {self.wide_share:.0%} 128 bits wide, not {self.wants_wide_share:.0%}")
        if self.loads_at_once < self.wants_loads_at_once:
            found.append(f"waits after {self.loads_at_once} loads of {self.wants_loads_at_once}")
        if self.serialised:
            found.append("waits for each of its products")
        return found


FIGURES = {
    "warps": int, "registers": int, "spill_bytes": int, "shared_bytes": int, "tensor_memory_columns": int,
    "scratch_bytes": int, "tensor_core_instructions": int, "wide_loads": int, "wide_share": float,
    "loads_at_once": int,
}  # fmt: skip
"""Columns of the table that only a compiled kernel tells."""


def inspect(cubins: list[bytes], arch: int) -> list[dict[str, int | float]]:
    """Registers, spilled bytes and counts of instructions of cubins with one kernel each."""
    from triton import backends

    tools = Path(backends.__file__).parent / "nvidia" / "bin"
    results = []
    for cubin, code in zip(cubins, disassemble(cubins, arch, tools / "nvdisasm"), strict=True):
        usage = _output(cubin, tools / "cuobjdump", "-res-usage")
        figures = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
        spilling = len(re.findall(r"^(?:@!?U?P\d+ )?(?:STL|LDL)\b", code, re.MULTILINE))
        results.append({
            "registers": int(figures["REG"]),
            "spill_bytes": max(int(figures["STACK"]), int(figures["LOCAL"])) if spilling else 0,
            "tensor_core_instructions": len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|UTC[A-Z]*MMA)\b", code)),
            "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.\S*\b(?:128|256)\b", code)),
            "wide_share": round(wide_share(code), 4),
            "loads_at_once": loads_at_once(code),
            "serialised": serialised(code),
        })  # fmt: skip
    return results


def disassemble(cubins: list[bytes], arch: int, nvdisasm: Path) -> list[str]:
    """The instructions of each, a line each. nvdisasm takes half a second to begin: it gets all at once."""
    from elftools.elf.elffile import ELFFile

    if not cubins:  # all are known
        return []
    sections = [ELFFile(io.BytesIO(cubin)).iter_sections() for cubin in cubins]
    codes = [b"".join(one.data() for one in parts if one.name.startswith(".text.")) for parts in sections]
    accelerated = "a" if arch >= 90 else ""  # what Triton compiles for
    listing = _output(b"".join(codes), nvdisasm, "--binary", f"SM{arch}{accelerated}")
    instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*)$", listing, re.MULTILINE)
    counts = [len(code) // INSTRUCTION_BYTES for code in codes]
    if len(instructions) != sum(counts) or not all(counts):
        raise SystemExit(f"nvdisasm printed {len(instructions)} instructions of {sum(counts)}")
    following = iter(instructions)
    begins = [0, *accumulate(count * INSTRUCTION_BYTES for count in counts)]
    return [
        "\n".join(_of_first_line_on(line, begin) for line in islice(following, count))
        for begin, count in zip(begins, counts, strict=False)
    ]


def _of_first_line_on(line: str, begin: int) -> str:
    """A branch's address, from the beginning of its kernel instead of that of the listing."""
    return re.sub(r"(\bBRA\b.*\b)0x([0-9a-f]+)", lambda m: f"{m[1]}{int(m[2], 16) - begin:#x}", line)


def _output(content: bytes, *command: str | Path) -> str:
    """What a tool prints of a file with this content."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        return subprocess.run((*command, file.name), capture_output=True, text=True, check=True).stdout


def set_offline(arch: int) -> None:
    """Let Triton compile for a GPU of this compute capability, there or not."""
    from triton.backends.compiler import GPUTarget

    pretend(GPUTarget("cuda", arch, 32))


def pretend(target: Any) -> None:
    """Let Triton compile for this target of its, there or not."""
    from triton.runtime import driver

    class Offline:
        """A driver that knows its target and has no device behind it."""

        def get_current_target(self) -> Any:
            return target

        def get_current_device(self) -> Any:
            return target.arch  # a device each: Triton keeps what it compiled by device

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    driver.set_active(Offline())


Known = Mapping[tuple[int, str], Mapping[str, Any]]

KEYS: dict[Any, str] = {}
"""Of kernels compiled in this process, which Triton keeps and does not look up again."""


def known_kernels() -> Known:
    """The table's figures by architecture and key, where this version of Triton made it."""
    from triton import __version__

    with RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["triton"] == __version__]
    figures = [{name: of(row[name]) for name, of in FIGURES.items()} for row in rows]
    return {(int(row["arch"][3:]), row["key"]): found for row, found in zip(rows, figures, strict=True)}


def compile_family(family: str, arch: int, known: Known, sample: int) -> list[Compiled]:
    """Compile all launches of a family; a kernel that two launches share in every way is listed once.

    known: figures of kernels that are compiled for each `sample`-th key only.
    """
    from triton.runtime import JITFunction
    from triton.runtime.jit import JITCallable

    from bark_fast.kernels.target import KNOWN, assume

    made: list[tuple[str, Any, dict[str, Any]]] = []
    key = ""
    run, do_compile = JITFunction.run, JITFunction._do_compile

    def compile_unknown(self: Any, lookup: str, *args: Any, **options: Any) -> Any:
        nonlocal key
        key = hashlib.sha256(f"{self.cache_key} {lookup}".encode()).hexdigest()[:16]
        if (arch, key) in known and int(key, 16) % sample:
            return None
        kernel = do_compile(self, lookup, *args, **options)
        KEYS[kernel] = key
        return kernel

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        name, size = self.fn.__name__, grid(options) if callable(grid) else grid
        dtypes = {each.dtype for each in args if isinstance(each, torch.Tensor)}
        if wants_ampere(name, dtypes, options) and not KNOWN[arch].tensor_cores:
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        named = {
            "kernel": name, "grid": tuple(int(n) for n in size), "wants_wide_share": WIDE_SHARE[name],
            "wants_tensor_cores": wants_tensor_cores(name, dtypes, options),
        }  # fmt: skip
        made.append((key if kernel is None else KEYS[kernel], kernel, named))
        return kernel

    set_offline(arch)
    distinct: dict[tuple[str, int], tuple[Any, dict[str, Any]]] = {}
    # Triton's key has the line that a kernel begins in: one that only moved within its file is the same
    unmoved = property(lambda self: 0, lambda self, line: None)
    with (
        assume(KNOWN[arch]),
        patch.object(JITFunction, "run", compile_only),
        patch.object(JITFunction, "_do_compile", compile_unknown),
        patch.object(JITCallable, "starting_line_number", unmoved, create=True),
    ):
        for launch in launches(family, torch.device("meta")):
            made.clear()
            launch.call()
            if not made and KNOWN[arch].tensor_cores:
                raise SystemExit(f"{family}: {launch.name} launched nothing")
            for one, kernel, named in made:
                named |= {"launch": launch.name, "wants_loads_at_once": launch.loads_at_once}
                distinct.setdefault((one, launch.loads_at_once), (kernel, named))
    seen = iter(inspect([kernel.asm["cubin"] for kernel, _ in distinct.values() if kernel], arch))
    return [
        Compiled(
            family=family, arch=arch, key=one, anew=kernel is not None, **named,
            **(known[arch, one] if kernel is None else _metadata(kernel) | next(seen)),
        )
        for (one, _), (kernel, named) in distinct.items()
    ]  # fmt: skip


def _metadata(kernel: Any) -> dict[str, int]:
    """Figures that Triton knows of a kernel."""
    found = kernel.metadata
    return {
        "warps": found.num_warps,
        "shared_bytes": found.shared,
        "tensor_memory_columns": getattr(found, "tmem_size", 0) or 0,
        "scratch_bytes": getattr(found, "global_scratch_size", 0) or 0,
    }


def table(compiled: list[Compiled]) -> list[dict[str, object]]:
    """Rows for people and for the file under results/."""
    from triton import __version__

    return [
        {
            "triton": __version__, "arch": f"sm_{c.arch}", "family": c.family, "launch": c.launch,
            "kernel": c.kernel, "grid": "x".join(map(str, c.grid)), "occupancy": f"{c.occupancy:.2f}",
            **{name: getattr(c, name) for name in FIGURES}, "key": c.key,
        }
        for c in compiled
    ]  # fmt: skip


def main() -> None:
    """Compile, print, and on request write the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=sorted(WARPS_PER_PROCESSOR), choices=sorted(WARPS_PER_PROCESSOR)
    )
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument(
        "--sample",
        type=int,
        default=1,
        help=f"Of kernels that {RESULTS.name} has, compile each N-th. [default: 1]",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON for a program.")
    parser.add_argument("--rows", action="store_true", help=f"Write {RESULTS.name} anew.")
    options = parser.parse_args()
    if options.sample < 1:
        parser.error(f"--sample is {options.sample}; it must be at least 1, which compiles all")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("TRITON_INTERPRET is set, so Triton interprets and compiles nothing; unset it")
    from bark_fast.kernels.target import KNOWN

    known = known_kernels()
    pairs = [(family, arch) for arch in options.arch for family in options.family]
    compiled = [c for family, arch in pairs for c in compile_family(family, arch, known, options.sample)]
    rows = table(compiled)
    if options.json:
        found = (c.faults(KNOWN[c.arch].shared_memory) for c in compiled)
        parts = zip(compiled, rows, found, strict=True)
        json.dump([{**asdict(c), "row": row, "faults": faults} for c, row, faults in parts], sys.stdout)
        return
    for row in rows:
        print("  ".join(str(value) for value in row.values()))
    if options.rows:
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    faulty = [(c, fault) for c in compiled for fault in c.faults(KNOWN[c.arch].shared_memory)]
    for c, fault in faulty:
        print(f"FAULT sm_{c.arch} {c.family} {c.launch} {c.kernel}: {fault}")
    raise SystemExit(1 if faulty else 0)


if __name__ == "__main__":
    main()
