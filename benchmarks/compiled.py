"""Compile every Triton kernel at Bark's shapes for a GPU that need not be there, and say what came out.

python benchmarks/compiled.py --arch 90 [--family attention]. Launchers are called on meta tensors, so that the
kernels, constants and options are those a real call would use; Triton compiles them down to machine code and
nothing is launched. Registers, spills, shared memory and instructions are read off the cubin.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from demands import WIDE_SHARE, wants_tensor_cores
from production import FAMILIES, launches
from sass import INSTRUCTION_BYTES, loads_at_once, wide_share

RESULTS = Path(__file__).parent / "results" / "compiled.csv"
WARPS_PER_PROCESSOR = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
SHARED_PER_PROCESSOR = {80: 167_936, 86: 102_400, 89: 102_400, 90: 233_472, 100: 233_472, 120: 102_400}
REGISTERS_PER_PROCESSOR = 65_536
MAX_BLOCKS_PER_PROCESSOR = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}


@dataclass(frozen=True)
class Compiled:
    """One kernel of one launch as compiled: what it takes from the chip, and which instructions it has."""

    family: str
    launch: str
    kernel: str
    arch: int
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
        return found


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
            "wide_share": wide_share(code),
            "loads_at_once": loads_at_once(code),
        })  # fmt: skip
    return results


def disassemble(cubins: list[bytes], arch: int, nvdisasm: Path) -> list[str]:
    """The instructions of each, a line each. nvdisasm takes half a second to begin: it gets all at once."""
    from elftools.elf.elffile import ELFFile

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
    from triton.runtime import driver

    class Offline:
        """A driver that knows its target and has no device behind it."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return arch  # a device each: Triton keeps what it compiled by device

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    driver.set_active(Offline())


def compile_family(family: str, arch: int) -> list[Compiled]:
    """Compile all launches of a family; a kernel that two launches share in every way is listed once."""
    from triton.runtime import JITFunction

    from bark_fast.kernels.target import KNOWN, assume

    made: list[tuple[Any, tuple[int, ...], bool]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        size = grid(options) if callable(grid) else grid
        dtypes = {each.dtype for each in args if isinstance(each, torch.Tensor)}
        wants = wants_tensor_cores(self.fn.__name__, dtypes, options)
        made.append((kernel, tuple(int(n) for n in size), wants))
        return kernel

    set_offline(arch)
    JITFunction.run = compile_only
    distinct: dict[tuple[str, int], tuple[Any, dict[str, Any]]] = {}
    with assume(KNOWN[arch]):
        for launch in launches(family, torch.device("meta")):
            made.clear()
            launch.call()
            if not made:
                raise SystemExit(f"{family}: {launch.name} launched nothing")
            for kernel, grid, tensor_cores in made:
                named = {
                    "launch": launch.name, "grid": grid, "wants_tensor_cores": tensor_cores,
                    "wants_wide_share": WIDE_SHARE[kernel.metadata.name],
                    "wants_loads_at_once": launch.loads_at_once,
                }  # fmt: skip
                distinct.setdefault((kernel.metadata.hash, launch.loads_at_once), (kernel, named))
    JITFunction.run = run
    seen = inspect([kernel.asm["cubin"] for kernel, _ in distinct.values()], arch)
    return [
        Compiled(
            family=family, kernel=kernel.metadata.name, arch=arch, warps=kernel.metadata.num_warps,
            shared_bytes=kernel.metadata.shared,
            tensor_memory_columns=getattr(kernel.metadata, "tmem_size", 0) or 0,
            scratch_bytes=getattr(kernel.metadata, "global_scratch_size", 0) or 0, **named, **figures,
        )
        for (kernel, named), figures in zip(distinct.values(), seen, strict=True)
    ]  # fmt: skip


def table(compiled: list[Compiled]) -> list[dict[str, object]]:
    """Rows for people and for the file under results/."""
    from triton import __version__

    return [
        {
            "triton": __version__, "arch": f"sm_{c.arch}", "family": c.family, "launch": c.launch,
            "kernel": c.kernel, "grid": "x".join(map(str, c.grid)), "warps": c.warps, "registers": c.registers,
            "shared_bytes": c.shared_bytes, "occupancy": f"{c.occupancy:.2f}",
            "tensor_core_instructions": c.tensor_core_instructions, "wide_loads": c.wide_loads,
            "loads_at_once": c.loads_at_once, "spill_bytes": c.spill_bytes,
        }
        for c in compiled
    ]  # fmt: skip


def main() -> None:
    """Compile, print, and on request write the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(WARPS_PER_PROCESSOR)
    )
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--json", action="store_true", help="Print JSON for a program.")
    parser.add_argument("--rows", action="store_true", help=f"Write {RESULTS.name} anew.")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("TRITON_INTERPRET is set, so Triton interprets and compiles nothing; unset it")
    from bark_fast.kernels.target import KNOWN

    compiled = [c for arch in options.arch for family in options.family for c in compile_family(family, arch)]
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
