"""What a listing of machine code (SASS) says of its loads: how wide, and how many before the first wait.

A listing has an instruction a line, 16 bytes each, as `compiled.disassemble` gives it; branches name addresses
of its first line on. ptxas orders instructions to save registers, so loads that stand side by side in a
kernel's source may be issued one by one, each waited for before the next: a register count shows nothing of it.
"""

from __future__ import annotations

import re

INSTRUCTION_BYTES = 16

_BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
_WIDE_LOAD = re.compile(r"\bLDG\.\S*\b128\S* R(\d+),")
_LOAD = re.compile(r"\bLDG(?:STS)?\.\S*")
_WIDTH = re.compile(r"\.(?:[US]?(8|16)|(64|128|256))\b")
_REGISTER = re.compile(r"\bR(\d+)\b")


def loops(code: str) -> list[list[str]]:
    """The instructions of each innermost loop: from the target of a branch backwards to the branch.

    A branch back from behind the kernel's end is none: pieces that seldom run lie there.
    """
    lines = code.splitlines()
    spans = []
    for end, line in enumerate(lines):
        branch = _BRANCH.search(line)
        begin = int(branch[1], 16) // INSTRUCTION_BYTES if branch else len(lines)
        # a kernel ends in a branch to itself
        if begin < end and not any(each.startswith("EXIT") for each in lines[begin:end]):
            spans.append((begin, end + 1))
    innermost = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [lines[begin:end] for begin, end in innermost]


def load_bytes(lines: list[str]) -> list[int]:
    """Bytes a thread reads from global memory with each load, to registers or to shared memory."""
    loads = (load[0] for line in lines if (load := _LOAD.search(line)))
    widths = (_WIDTH.search(load) for load in loads)
    return [int(width[1] or width[2]) // 8 if width else 4 for width in widths]


def serialised(code: str) -> bool:
    """Whether Hopper's products are waited for one by one (ptxas's C7515), instead of running on meanwhile."""
    products, waits = code.count("HGMMA."), code.count("WARPGROUP.DEPBAR")
    return 0 < products <= waits


def wide_share(code: str) -> float:
    """Share of the bytes loaded that comes from loads of 128 bits; a stream of narrow loads has as many bytes.

    Of the loop that loads most, or of the kernel, where that has less than a quarter of what its lines load.
    """
    whole = load_bytes(code.splitlines())
    busiest = max((load_bytes(lines) for lines in loops(code)), key=sum, default=[])
    stream = busiest if 4 * sum(busiest) >= sum(whole) else whole
    return sum(size for size in stream if size >= 16) / sum(stream) if stream else 1.0


def loads_at_once(code: str) -> int:
    """128-bit loads issued before one is waited for, in the loop that has most of them, else in the kernel."""
    counts = [(sum(bool(_WIDE_LOAD.search(line)) for line in lines), lines) for lines in loops(code)]
    most, lines = max(counts, key=lambda each: each[0], default=(0, []))
    return loads_before_wait(lines if most else code.splitlines())


def loads_before_wait(lines: list[str]) -> int:
    """128-bit loads into registers before the first instruction that touches what one of them loads."""
    pending: set[int] = set()
    count = 0
    for line in lines:
        load = _WIDE_LOAD.search(line)
        touched = {int(register) for register in _REGISTER.findall(line)}
        if touched & pending:
            break
        if load:
            pending |= set(range(int(load[1]), int(load[1]) + 4))
            count += 1
    return count
